"""What `compress`, `compress_into` and `for_budget` are given is checked before anything is fitted."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from tests.cases import CASES, CONFIGS, IDS, NUM_ROWS, contexts, counts, dense_collection, fitted, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into, decompress
from torchrec_compress.compression.budget import for_budget
from torchrec_compress.fit import fit_mec, fit_product, fit_residual, kmeans, quantile_codes
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    Int4Config,
    Int8Config,
    MEmComConfig,
    MethodConfig,
    PQConfig,
    TableData,
)

every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
HASH, PQ = HashConfig(num_buckets=40), PQConfig(num_codes=4, codebook_size=16)


def changed(tensor: torch.Tensor, number: int, value: float) -> torch.Tensor:
    tensor = tensor.float()
    tensor[number] = value
    return tensor


BAD_COUNTS = {
    "nan": (changed(counts(), 3, float("nan")), r"counts must be finite and >= 0, got nan for id 3"),
    "infinite": (changed(counts(), 9, float("inf")), r"counts must be finite and >= 0, got inf for id 9"),
    "negative": (-counts(), r"counts must be finite and >= 0, got -\d+ for id 0"),
    "short": (counts()[:9], r"counts must be a tensor of shape \(403,\), one per id, got \(9,\) on cpu"),
    "column": (counts()[:, None], r"counts must be a tensor of shape \(403,\), one per id, got \(403, 1\) on cpu"),
    "meta": (counts().to("meta"), r"counts must be a tensor of shape \(403,\), one per id, got \(403,\) on meta"),
    "bool": (counts() > 0, r"counts must be look-ups per id, integers or floats, got torch.bool"),
    "complex": (counts().to(torch.complex64), r"counts must be look-ups per id, .*got torch.complex64"),
    "unsigned": (counts().to(torch.uint64), r"counts must be look-ups per id, .*got torch.uint64"),
    "sparse": (counts().to_sparse(), r"counts must be look-ups per id, .*got torch.int64 \(torch.sparse_coo\)"),
    "shares": (counts() / counts().sum(), r"counts must be look-ups per id, the most of them from 1 .*multiply shares"),
    "huge": (counts() * 1e34, r"counts must be look-ups per id, the most of them from 1 to 2\*\*53"),
    "list": (counts().tolist(), r"counts must be a tensor of shape \(403,\), one per id, got 'list'"),
}


@every
@pytest.mark.parametrize("kind", BAD_COUNTS)
def test_counts(config, kind):
    bad, message = BAD_COUNTS[kind]
    with pytest.raises(ValueError, match=rf"table 'item': {message}"):
        compress(dense_collection(), config, counts={"item": bad}, contexts={"item": contexts()})
    with pytest.raises(ValueError, match=rf"table 'item': {message}"):  # the method asked by itself
        config.fit(table(), TableData(rows(), counts=bad, contexts=contexts()))


@pytest.mark.parametrize("config", [HASH, MEmComConfig(num_buckets=40), PQConfig(num_codes=2, popularity="count")])
def test_counts_of_zero_everywhere_weigh_all_ids_alike(config):
    made = compress(dense_collection(), config, counts={"item": torch.zeros(NUM_ROWS)})
    same = compress(dense_collection(), config, counts={"item": torch.ones(NUM_ROWS)})
    ids = torch.arange(NUM_ROWS)
    torch.testing.assert_close(made.table_rows("item", ids), same.table_rows("item", ids), rtol=1e-3, atol=1e-3)


IDS_OF, OTHERS = contexts()
BAD_CONTEXTS = {
    "one": (IDS_OF, r"contexts must be two vectors, \(ids, context ids\), got Tensor"),
    "three": ((IDS_OF, OTHERS, OTHERS), r"contexts must be two vectors, .*got \[\(3000,\), \(3000,\), \(3000,\)\]"),
    "flat": ((IDS_OF[:, None], OTHERS), r"contexts must be two vectors, .*got \[\(3000, 1\), \(3000,\)\]"),
    "lists": ((IDS_OF.tolist(), OTHERS.tolist()), r"contexts must be two vectors, .*got \['list', 'list'\]"),
    "unequal": ((IDS_OF[:5], OTHERS), r"contexts must be vectors of one length above 0, got \[\(5,\), \(3000,\)\]"),
    "empty": ((IDS_OF[:0], OTHERS[:0]), r"contexts must be vectors of one length above 0"),
    "floats": ((IDS_OF.float(), OTHERS), r"contexts' ids must be integers, got torch.float32"),
    "bools": ((IDS_OF, OTHERS > 3), r"contexts' context ids must be integers, got torch.bool"),
    "large": ((changed(IDS_OF, 7, 403).long(), OTHERS), r"contexts' ids must be in \[0, 403\), got 403"),
    "low": ((changed(IDS_OF, 7, -2).long(), OTHERS), r"contexts' ids must be in \[0, 403\), got -2"),
    "lower": ((IDS_OF, changed(OTHERS, 7, -1).long()), r"contexts' context ids must be >= 0, got -1"),
}


@pytest.mark.parametrize("kind", BAD_CONTEXTS)
@pytest.mark.parametrize("config", [CASES["quantile"][0], HASH])
def test_contexts(config, kind):
    bad, message = BAD_CONTEXTS[kind]
    with pytest.raises(ValueError, match=rf"table 'item': {message}"):
        compress(dense_collection(), config, counts={"item": counts()}, contexts={"item": bad})


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(config, bad):
    dense = dense_collection()
    with torch.no_grad():
        dense.embedding_bags["item"].weight[77, 2] = bad
    with pytest.raises(ValueError, match=r"table 'item': pre-trained rows must be finite, .* in the row of id 77"):
        compress(dense, config, counts={"item": counts()}, contexts={"item": contexts()})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(NUM_ROWS, 16, dtype=torch.int64), r"rows must be a tensor of floating-point .* got torch.int64"),
        (
            torch.zeros(NUM_ROWS, 16, device="meta"),
            r"rows must be a tensor of floating-point .* got torch.float32 on meta",
        ),
        (torch.zeros(16, NUM_ROWS), r"the pre-trained table must be 403 x 16, got \(16, 403\)"),
        ([[0.0]], r"rows must be a tensor of floating-point values, got list"),
    ],
)
def test_rows_given_by_hand(bad, message):
    with pytest.raises(ValueError, match=rf"table 'item': .*{message}"):
        compress_into(fresh(PQ), {"item": bad})


def test_mistakes_with_the_last_table_show_before_the_first_is_fitted(monkeypatch):
    both = [table(name="a"), table(name="b")]
    dense = EmbeddingBagCollection(both)
    fits = []
    monkeypatch.setattr(PQConfig, "fit", lambda *_: fits.append(1))
    tiers = PQConfig(num_codes=2, codebook_size=32, num_hot_rows=9)
    weighted = PQConfig(num_codes=2, codebook_size=32, popularity="count")
    nan = {"a": counts(), "b": changed(counts(), 3, float("nan"))}
    for last, given in ((PQ, nan), (tiers, None), (weighted, None), (CASES["quantile"][0], None)):
        with pytest.raises(ValueError, match="table 'b': "):
            compress(dense, {"a": PQ, "b": last}, counts=given)
    with torch.no_grad():
        dense.embedding_bags["b"].weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"table 'b': .*in the row of id 5"):
        compress(dense, PQ)
    with pytest.raises(ValueError, match="table 'b': this method must be fitted to a pre-trained table, got none"):
        compress_into(CompressedEmbeddingBagCollection(both, compression=PQ), {"a": rows()})
    assert not fits


class Model(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.sparse = inside


def quantised():
    dense = dense_collection()
    observer = torch.ao.quantization.PlaceholderObserver
    dense.qconfig = torch.ao.quantization.QConfig(
        activation=observer.with_args(dtype=torch.float32), weight=observer.with_args(dtype=torch.qint8)
    )
    return QuantEmbeddingBagCollection.from_float(dense)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (lambda: Model(quantised()), "got Model; make an EmbeddingBagCollection of the trained rows"),
        (lambda: nn.Linear(9, 4), "got Linear; make an EmbeddingBagCollection of the trained rows"),
        (lambda: fresh(PQ).to("meta"), "collection must hold values, got .* on the meta device"),
        (
            quantised,
            "got torchrec.quant.embedding_modules.EmbeddingBagCollection; compress the floating-point collection",
        ),
        (
            lambda: torch.fx.symbolic_trace(dense_collection()),
            "got an fx trace of EmbeddingBagCollection; compress the module that it was made from, and trace or script",
        ),
        (
            lambda: torch.jit.script(nn.Linear(2, 2)),
            "got a TorchScript module of Linear; compress the module that it was made from, and trace or script",
        ),
        (lambda: {"item": rows()}, "got dict; make an EmbeddingBagCollection"),
        (lambda: None, "got NoneType; make an EmbeddingBagCollection"),
        (lambda: EmbeddingBagCollection([table()], device=torch.device("meta")), r"got \['item'\] on the meta device"),
    ],
)
def test_what_is_compressed(dense, message):
    with pytest.raises(ValueError, match=rf"compress: .*{message}"):
        compress(dense(), HASH)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ("pq", r"compression: must be a method such as PQConfig\(num_codes=8\), or a mapping .*got 'pq'"),
        (None, r"CompressedEmbeddingBagCollection: compression must be given, got None"),
        (PQConfig, r"compression: must be a method with its options, got the class; call it, PQConfig\(...\)"),
        ({"item": PQConfig}, r"compression\['item'\]: must be a method with its options, got the class"),
        ({"item": "pq"}, r"compression\['item'\]: must be a method such as .*got 'pq'"),
        ({"method": "pq", "num_codes": 4}, r"must be a method, got plain data .*; read it by compression.parse"),
        ({"item": {"method": "pq"}}, r"compression\['item'\]: must be a method, got plain data"),
        ({3: PQ}, r"compression\[3\]: must be a method such as"),
        ([PQ], r"compression: must be a method such as"),
        ({"user": PQ, "*": PQ}, r"every key must fit a table, got \['user'\]"),
    ],
)
def test_how_it_is_compressed(compression, message):
    with pytest.raises(ValueError, match=message):
        compress(dense_collection(), compression)


@pytest.mark.parametrize("seed", [-1, 0.0, 1.5, True, "0", None, 2**63, float("nan"), torch.tensor(0.5)])
def test_seeds(seed):
    if seed is not None:
        with pytest.raises(ValueError, match="seed must be an int"):
            compress(dense_collection(), PQ, seed=seed)
    data, weights = rows(), counts().clamp(min=1).float()
    for fit in (
        lambda: kmeans(data, 4, seed=seed),
        lambda: fit_product(data, 4, 16, seed=seed),
        lambda: fit_residual(data, 4, 16, seed=seed, weights=weights),
        lambda: fit_mec(data, 4, 16, seed=seed),
        lambda: quantile_codes(*contexts(), num_rows=NUM_ROWS, num_codes=4, codebook_size=16, seed=seed),
        lambda: for_budget({"item": data}, {"item": counts()}, 9000, seed=seed),
    ):
        with pytest.raises(ValueError, match=r"seed must be an int in \[0, 2\*\*63\), got"):
            fit()


def test_a_seed_of_numpy_is_the_same_seed():
    for fitter in (fit_product, fit_residual):
        one, other = (fitter(rows(), 4, 16, seed=seed) for seed in (7, np.int64(7)))
        assert torch.equal(one.codes, other.codes)


def test_the_largest_seed_is_taken():
    compress(dense_collection(), PQ, seed=2**63 - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": Model(dense_collection())}, "for_budget: tables must be an EmbeddingBagCollection, .* got Model"),
        ({"tables": {"item": rows()[0]}}, r"for_budget: table 'item': rows must be a tensor \(N, D\), got Tensor"),
        ({"tables": {"item": changed(rows(), 5, float("nan"))}}, "table 'item': .*in the row of id 5"),
        ({"counts": counts()}, "for_budget: counts must be a mapping by table name, got Tensor"),
        ({"counts": {"user": counts()}}, r"must name the same tables, got only one of the two for \['item', 'user'\]"),
        ({"counts": {"item": BAD_COUNTS["nan"][0]}}, "for_budget: table 'item': counts must be finite .*for id 3"),
        ({"budget_bytes": 0}, "budget_bytes must be a number of bytes above 0, got 0"),
        ({"budget_bytes": -4.5}, "budget_bytes must be a number of bytes above 0, got -4.5"),
        ({"budget_bytes": float("nan")}, "budget_bytes must be a number of bytes above 0, got nan"),
        ({"budget_bytes": "9000"}, "budget_bytes must be a number of bytes above 0, got '9000'"),
        ({"budget_bytes": True}, "budget_bytes must be a number of bytes above 0, got True"),
        ({"num_codes": ()}, r"num_codes must be code lengths of at least 1, got \(\)"),
        ({"num_codes": (2, 0)}, r"num_codes must be code lengths of at least 1, got \(2, 0\)"),
        ({"codes": HASH}, "codes must be a method of codes such as PQConfig"),
    ],
)
def test_budgets(changes, message):
    given = {"tables": {"item": rows()}, "counts": {"item": counts()}, "budget_bytes": 9000, **changes}
    with pytest.raises(ValueError, match=message):
        for_budget(**given)


def test_a_budget_takes_numbers_of_numpy():
    given = {"tables": {"item": rows()}, "counts": {"item": counts()}}
    found = for_budget(**given, budget_bytes=np.int64(9000), num_codes=np.array([1]), seed=np.int64(0))
    assert found == for_budget(**given, budget_bytes=9000, num_codes=(1,))


def test_a_budget_for_unpooled_tables():
    config = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    chosen = for_budget(EmbeddingCollection([config]), {"item": counts()}, 9000.0, num_codes=(1,))
    assert isinstance(chosen["item"], MethodConfig)


def test_traces_of_compressed_collections_are_told_apart():
    traced = torch.fx.symbolic_trace(fitted(HASH))
    for use, where in ((decompress, "decompress"), (lambda found: compress_into(found, {}), "compress_into")):
        with pytest.raises(ValueError, match=f"{where}: collection must be .*got an fx trace of CompressedEmbeddingB"):
            use(traced)
    with pytest.raises(ValueError, match=r"for_budget: tables must be .*got an fx trace of EmbeddingBagCollection"):
        for_budget(torch.fx.symbolic_trace(dense_collection()), {"item": counts()}, 9000)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_share_one_weight_are_named(tied, caplog):
    dense = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=[name])
            for name in "abc"
        ]
    )
    if tied:
        dense.embedding_bags["c"].weight = dense.embedding_bags["a"].weight
    compress(dense, HASH)
    told = "tables ['a', 'c'] share one weight; compressed, each is stored and trained on its own"
    assert any(told in message for message in caplog.messages) == tied
    caplog.clear()
    given = rows()
    into = CompressedEmbeddingBagCollection(dense.embedding_bag_configs(), compression=HASH)
    compress_into(into, {"a": given, "c": given if tied else given.clone()})
    assert any(told in message for message in caplog.messages) == tied


def test_what_must_be_a_mapping_or_a_compressed_collection():
    with pytest.raises(ValueError, match="compress: counts must be a mapping by table name, got Tensor"):
        compress(dense_collection(), PQ, counts=counts())
    with pytest.raises(ValueError, match="compress_into: collection must be a compressed one, got EmbeddingBagColl"):
        compress_into(dense_collection(), {"item": rows()})


@every
def test_a_collection_without_memory_is_not_filled(config):
    with pytest.raises(ValueError, match=r"compress_into: collection must hold values, got '.*' on the meta device"):
        compress_into(
            CompressedEmbeddingBagCollection([table()], device=torch.device("meta"), compression=config),
            {"item": rows()},
            counts={"item": counts()},
            contexts={"item": contexts()},
        )


@pytest.mark.parametrize("wrong", [None, dense_collection(), nn.Linear(2, 2)], ids=["nothing", "stock", "module"])
def test_only_compressed_collections_are_expanded(wrong):
    with pytest.raises(
        ValueError, match=rf"decompress: collection must be a compressed one, or .*, got {type(wrong).__name__}"
    ):
        decompress(wrong)


LOW_BIT = [Int8Config(), Int4Config(), PQConfig(num_codes=4, codebook_size=16, num_hot_rows=20)]


@pytest.mark.parametrize("config", LOW_BIT, ids=["int8", "int4", "hot rows"])
def test_rows_that_float16_scales_cannot_hold(config, caplog):
    """Finite rows became infinite, or noise, without a word."""
    collection = dense_collection()
    weight = collection.embedding_bags["item"].weight.data
    hottest = int(counts().argmax())
    weight[hottest, 0] = -7e4
    with pytest.raises(
        ValueError, match=rf"rows must have a float16 scale and bias, got .* in the row of id {hottest};"
    ):
        compress(collection, config, counts={"item": counts()})
    weight.copy_(rows() * 1e-7)
    compress(collection, config, counts={"item": counts()})
    assert any("which a float16 scale cannot tell" in message for message in caplog.messages)
    caplog.clear()
    weight.copy_(rows() * 1e-2)
    compress(collection, config, counts={"item": counts()})
    assert not any("float16" in message for message in caplog.messages)


@every
def test_rows_whose_squares_overflow(config):
    collection = dense_collection()
    collection.embedding_bags["item"].weight.data[7, 3] = -1e20
    with pytest.raises(ValueError, match=r"table 'item': pre-trained rows must be at most 1e\+15, .* got 1e\+20"):
        compress(collection, config, counts={"item": counts()}, contexts={"item": contexts()})


def test_start_codes_that_are_expanded_are_said(caplog):
    decompress(fresh(PQ))
    assert any("were never fitted" in message for message in caplog.messages)
    caplog.clear()
    decompress(fitted(PQ))
    assert not caplog.messages


def test_table_rows_checks_ids():
    for config in (HASH, PQ, DenseConfig()):
        for wrong in (-1, NUM_ROWS):
            with pytest.raises(ValueError, match=rf"table 'item': every id must be in \[0, 403\), got {wrong}"):
                fitted(config).table_rows("item", torch.tensor([0, wrong]))


def test_half_precision_tables_hold_what_they_are_given():
    half = table(data_type=DataType.FP16)
    made = CompressedEmbeddingBagCollection([half], compression=DenseConfig())
    compress_into(made, {"item": rows()})
    with pytest.raises(ValueError, match=r"must be in \+-65504 for data_type FP16, got 70000 in the row of id 5"):
        compress_into(made, {"item": changed(rows(), 5, 7e4)})


def test_a_table_without_rows():
    with pytest.raises(ValueError, match="table 'item' must have rows and columns, got 0 x 16; leave it out"):
        fresh(PQ, num_embeddings=0, init_fn=nn.init.zeros_)
    with pytest.raises(
        ValueError, match=r"table 'item' must have fewer than 2\*\*63 numbers, got 9223372036854775808 x"
    ):
        fresh(PQ, num_embeddings=2**63)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_counts_that_change_nothing_are_told(config: MethodConfig, caplog):
    """What a method says of itself is so: its fit is another one where ids were looked up otherwise."""
    seen = torch.arange(1, NUM_ROWS + 1) ** 2
    both = []
    for each in (seen, seen.flip(0)):
        with caplog.at_level(logging.INFO):
            made = compress(dense_collection(), config, counts={"item": each}, contexts={"item": contexts()}, seed=3)
        both.append(made.eval().table_rows("item", torch.arange(NUM_ROWS)))
    assert torch.equal(*both) != config.fits_by_counts(table())
    is_told = "counts change nothing in the fits of tables ['item']" in caplog.text
    assert is_told != config.fits_by_counts(table())
