"""LMA: pairs, or a sketch of a stream of them, become codes; wrong ones are named errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import NUM_ROWS, contexts, counts, dense_collection, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into
from torchrec_compress.conversion.memory import needed
from torchrec_compress.fit import MinHashSketch
from torchrec_compress.methods import LMAConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.ops import unpack_codes

CONFIG = LMAConfig(num_codes=4, codebook_size=16)


def test_errors_of_a_sketch_name_its_table():
    sketch = CONFIG.sketch(table(), 0)
    for use in (
        lambda: sketch.add(torch.tensor([NUM_ROWS]), torch.tensor([0])),
        lambda: sketch.add(torch.tensor([1.5]), torch.tensor([0])),
        lambda: sketch.add([1], torch.tensor([0])),  # type: ignore[arg-type]
        lambda: sketch.join(sketch.minima[1:]),
        lambda: sketch.join(sketch),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"^table 'item': sketch: "):
            use()


def streamed(config: LMAConfig, seed: int = 0, size: int = 100) -> MinHashSketch:
    sketch = config.sketch(table(), seed)
    for ids, others in zip(*(part.split(size) for part in contexts()), strict=True):
        sketch.add(ids, others)
    return sketch


def codes(state) -> Tensor:
    return unpack_codes(state.codes, CONFIG.num_codes).long()


@pytest.mark.parametrize("given", [None, rows()], ids=["alone", "rows"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LMAConfig(num_codes=2, codebook_size=300, structure="residual", hashes_per_code=3),
        LMAConfig(num_codes=2, codebook_size=32, width=4),
    ],
)
def test_a_stream_is_fitted_as_all_pairs_at_once(config, given):
    whole = config.fit(table(), TableData(given, contexts=contexts(), seed=3))
    parts = config.fit(table(), TableData(given, contexts=streamed(config, seed=3), seed=3))
    assert torch.equal(whole.codes, parts.codes) and whole.decoder.keys() == parts.decoder.keys()
    for name, value in whole.decoder.items():
        assert torch.equal(value, parts.decoder[name]), name


def test_a_collection_takes_a_sketch_and_trains_from_it():
    made = fresh(CONFIG, seed=5)
    compress_into(made, {}, contexts={"item": streamed(CONFIG, seed=5)})
    alone = CONFIG.fit(table(), TableData(None, contexts=contexts(), seed=5))
    assert torch.equal(made.table_state("item").codes, alone.codes)
    out = made.table_rows("item", torch.arange(9))
    out.sum().backward()
    assert made.decoder.banks["item"].codebooks.grad.abs().sum() > 0
    fitted = compress(dense_collection(), CONFIG, contexts={"item": streamed(CONFIG)})
    assert isinstance(fitted, CompressedEmbeddingBagCollection)
    error = (fitted.table_rows("item", torch.arange(NUM_ROWS)) - rows()).square().mean()
    assert error < rows().square().mean()


def test_ids_that_occurred_with_the_same_share_all_codes_and_others_keep_those_of_the_start():
    ids, others = torch.tensor([1, 1, 2, 2, 3]), torch.tensor([70, 80, 80, 70, 90])
    state = CONFIG.fit(table(), TableData(None, contexts=(ids, others), seed=0))
    found, start = codes(state), codes(RandomCodesConfig(num_codes=4, codebook_size=16).fit(table(), TableData(rows())))
    assert torch.equal(found[1], found[2]) and not torch.equal(found[1], found[3])
    unseen = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2, 3]), False)
    assert torch.equal(found[unseen], start[unseen])


def test_tables_of_other_names_and_seeds_have_other_codes():
    data = TableData(None, contexts=contexts(), seed=0)
    first = CONFIG.fit(table(), data)
    assert torch.equal(first.codes, CONFIG.fit(table(), data).codes)
    for other in (
        CONFIG.fit(table(name="other"), data),
        CONFIG.fit(table(), TableData(None, contexts=contexts(), seed=1)),
    ):
        assert (codes(first) == codes(other)).float().mean() < 0.15


WRONG = {
    "no pair": (CONFIG.sketch(table(), 0), "contexts' sketch must have seen a pair, got none; add pairs before"),
    "other seed": (streamed(CONFIG, seed=1), "contexts' sketch must have salt = .*; make it by sketch.* and seed 0"),
    "other hashes": (
        streamed(LMAConfig(num_codes=8, codebook_size=16)),
        "contexts' sketch must have num_hashes = 4, got 8",
    ),
    "other rows": (MinHashSketch(9, 4, 0), "contexts' sketch must have num_rows = 403, got 9"),
    "nothing": (None, "lma codes must come with contexts, got none; pass contexts="),
    "empty": ((torch.empty(0).long(), torch.empty(0).long()), "contexts must be vectors of one length above 0"),
    "ids outside": ((torch.tensor([403]), torch.tensor([0])), r"contexts' ids must be in \[0, 403\), got 403"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_contexts_are_named_before_the_first_fit(kind):
    given, told = WRONG[kind]
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        CONFIG.fit(table(), TableData(None, contexts=given))
    made = fresh(CONFIG)
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        compress_into(made, {}, contexts={} if given is None else {"item": given})


def test_a_sketch_is_of_methods_that_take_one():
    quantile = QuantileCodesConfig(num_codes=4, codebook_size=16)
    with pytest.raises(ValueError, match=r"contexts must be two vectors, \(ids, context ids\), got MinHashSketch"):
        compress(dense_collection(), quantile, contexts={"item": streamed(CONFIG)})
    assert quantile.sketch(table(), 0) is None and quantile.sketch_bytes(table()) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hashes_per_code": 0}, "hashes_per_code must be at least 1, got 0"),
        ({"codebook_size": 1}, r"codebook_size must be in \[2, 403\]"),
        ({"num_codes": 3}, "embedding_dim must be a multiple of num_codes = 3"),
        ({"num_coded": 50}, "lma"),
        ({"codebook_dtype": "int8"}, "codebook_dtype must be 'fp32' with 'lma'"),
    ],
)
def test_sizes_that_cannot_work(changes, told):
    config = LMAConfig(**{"num_codes": 4, "codebook_size": 16, **changes})
    for use in (lambda: fresh(config), lambda: config.sketch(table(), 0)):
        with pytest.raises(ValueError, match=f"table 'item': .*{told}"):
            use()
    with pytest.raises(ValueError, match=r"table 'item': codebook_size must be in \[2, 403\] \(its rows\), got 404"):
        LMAConfig(num_codes=4, codebook_size=404).sketch(table(), 0)


def test_a_conversion_counts_what_the_sketch_takes():
    big, small = LMAConfig(num_codes=4, hashes_per_code=3), QuantileCodesConfig(num_codes=4)
    item = table(num_embeddings=10**6)
    made = CompressedEmbeddingBagCollection([item], torch.device("meta"), compression=big, will_fit=True)
    assert big.sketch_bytes(item) == 4 * 12 * 10**6
    assert needed(item, big, made, has_contexts=5) - needed(item, small, made, has_contexts=5) == 48 * 10**6
    assert CONFIG.sketch(table(), 0).minima.nbytes == CONFIG.sketch_bytes(table())


def test_hot_rows_are_set_apart():
    config = LMAConfig(num_codes=4, codebook_size=16, num_hot_rows=20, hot_dtype="fp32")
    made = compress(dense_collection(), config, counts={"item": counts()}, contexts={"item": streamed(config)})
    hot = counts().argsort(descending=True, stable=True)[:20]
    torch.testing.assert_close(made.table_rows("item", hot), rows()[hot])
