"""Codebooks and hot rows in few bits that train in float32 and are rounded again."""

import logging
from dataclasses import replace

import pytest
import torch
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)

from tests.cases import CONFIGS, IDS, NUM_ROWS, at_rest, batch, contexts, counts, table
from tests.tolerances import assert_near
from torchrec_compress import CompressedEmbeddingBagCollection, compress, dequantize_codebooks, quantize_codebooks
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.methods import DenseConfig, Int8Config, MECConfig, PQConfig
from torchrec_compress.ops import quantize_rows

BAGS = batch([[3, 99, 7, 7], [], [402], [*range(NUM_ROWS)]])  # hot ones among them
CASES = {
    "int8-codebooks": PQConfig(num_codes=2, codebook_size=16, codebook_dtype="int8"),
    "residual": PQConfig(num_codes=2, codebook_size=16, structure="residual", codebook_dtype="int8", width=8),
    "int8-hot": PQConfig(num_codes=2, codebook_size=16, num_hot_rows=9),
    "int4-hot": PQConfig(num_codes=3, codebook_size=16, structure="residual", num_hot_rows=9, hot_dtype="int4"),
    "both": PQConfig(num_codes=2, codebook_size=16, num_hot_rows=9, codebook_dtype="int8", num_coded=60),
    "mec": MECConfig(num_codes=2, codebook_size=16, num_hot_rows=9, fit_options=MECFit(num_steps=2)),
}
in_each = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


def made(method, **options):
    """Return tables "a", stored by the method, and "b", in int8."""
    tables = [table(name="a", feature_names=["x", "y"], **options), table(name="b", feature_names=["y"], **options)]
    given = {"counts": dict.fromkeys("ab", counts()), "contexts": dict.fromkeys("ab", contexts())}
    return at_rest(compress(EmbeddingBagCollection(tables), {"a": method, "b": Int8Config()}, **given))


def bags():
    x, y = BAGS, batch([[1], [2, 3], [], [5, 5, 5]])
    values = torch.cat([x.values(), y.values()])
    return KeyedJaggedTensor(["x", "y"], values, lengths=torch.cat([x.lengths(), y.lengths()]))


def low_bit_names(collection):
    return [n for n in ("codebooks", "hot_rows") if f"banks.a.{n}" in dict(collection.decoder.named_buffers())]


@in_each
def test_rows_of_few_bits_become_parameters_that_serve_the_same(method):
    served = made(method)
    before = {name: value.clone() for name, value in served.state_dict().items()}
    trained = dequantize_codebooks(served)
    assert low_bit_names(served) and not low_bit_names(trained)
    names = {name for name, _ in trained.decoder.named_parameters()}
    assert {f"banks.a.{name}" for name in low_bit_names(served)} <= names
    assert_near(trained(bags()).values(), served(bags()).values())
    state = trained.table_state("a")
    assert torch.equal(state.codes, served.table_state("a").codes)
    assert trained.methods()["b"] == served.methods()["b"] and trained.methods()["a"] == method.dequantized()
    assert torch.equal(trained.table_state("b").codes, served.table_state("b").codes)
    assert all(torch.equal(value, before[name]) for name, value in served.state_dict().items())
    with torch.no_grad():  # nothing is shared
        for value in trained.parameters():
            value.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in served.state_dict().items())


@in_each
def test_what_was_trained_is_rounded_to_the_nearest(method):
    served = made(method)
    trained = dequantize_codebooks(served)
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.05)
    trained(bags()).values().square().sum().backward()
    optimizer.step()
    found = quantize_codebooks(trained, served.methods())
    assert found.methods() == served.methods()
    moved = False
    for name, dtype in (("codebooks", method.codebook_dtype), ("hot_rows", method.hot_dtype)):
        floats = trained.table_state("a").decoder.get(name)
        if floats is None:
            continue
        mine = found.table_state("a").decoder[name]
        assert torch.equal(mine, floats if dtype == "fp32" else quantize_rows(floats.detach(), dtype))
        moved |= dtype != "fp32" and not torch.equal(mine, served.table_state("a").decoder[name])
    assert moved  # what had few bits was trained
    assert torch.equal(found.table_state("a").codes, served.table_state("a").codes)
    assert not torch.equal(found(bags()).values(), served(bags()).values())


@in_each
def test_untrained_it_comes_back_bit_for_bit(method):
    served = made(method)
    found = quantize_codebooks(dequantize_codebooks(served), served.methods())
    state, mine = served.state_dict(), found.state_dict()
    assert mine.keys() == state.keys() and all(torch.equal(mine[name], value) for name, value in state.items())


@pytest.mark.parametrize("method", CONFIGS, ids=IDS)
def test_methods_without_such_rows_stay_as_they_are(method):
    if method.dequantized() != method:
        assert method.dequantized().dequantized() == method.dequantized()
        return
    configs = [table(name="a", feature_names=["x"])]
    given = {"counts": {"a": counts()}, "contexts": {"a": contexts()}}
    served = at_rest(compress(EmbeddingBagCollection(configs), {"a": method}, **given))
    found = dequantize_codebooks(served)
    state, mine = served.state_dict(), found.state_dict()
    assert found.methods() == served.methods() and mine.keys() == state.keys()
    assert all(torch.equal(mine[name], value) for name, value in state.items())


def test_unpooled_collections_too():
    configs = [EmbeddingConfig(name="a", num_embeddings=500, embedding_dim=16, feature_names=["item"])]
    served = compress(EmbeddingCollection(configs), CASES["both"], counts={"a": torch.arange(500)})
    found = dequantize_codebooks(served)
    assert type(found) is type(served)
    assert_near(found(batch([[1, 2]]))["item"].values(), served(batch([[1, 2]]))["item"].values())


def test_what_would_take_more_than_dense_stays_in_few_bits(caplog):
    method = PQConfig(num_codes=1, codebook_size=18, structure="residual", codebook_dtype="int8")
    configs = [EmbeddingBagConfig(name="a", num_embeddings=18, embedding_dim=32, feature_names=["x"])]
    served = compress(EmbeddingBagCollection(configs), method)
    assert served.methods()["a"] == method
    with caplog.at_level(logging.WARNING, logger="torchrec_compress"):
        found = dequantize_codebooks(served)
    assert found.methods() == served.methods() and "['a'] stay in few bits" in caplog.text


def test_other_methods_are_refused():
    served = made(CASES["both"])
    trained = dequantize_codebooks(served)
    with pytest.raises(ValueError, match=r"tables .*got \['c'\]"):
        quantize_codebooks(trained, {"c": CASES["both"]})
    for wrong in (replace(CASES["both"], num_codes=4), DenseConfig(), "int8"):
        with pytest.raises(ValueError, match="table 'a': its method must differ"):
            quantize_codebooks(trained, {"a": wrong})
    with pytest.raises(ValueError, match="must be a compressed one"):
        dequantize_codebooks(EmbeddingBagCollection([table()]))
    for wrong in (None, 5, CASES["both"], ["a"]):
        with pytest.raises(ValueError, match="methods must be a mapping by table name"):
            quantize_codebooks(trained, wrong)
    with pytest.raises(ValueError, match="hot_dtype must be 'fp32', 'int8' or 'int4', got 'int3'"):
        quantize_codebooks(trained, {"a": replace(CASES["both"], hot_dtype="int3")})


@pytest.mark.parametrize(("part", "what"), [("codebooks", "codeword 3"), ("hot_rows", "hot row 3")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_without_a_scale_are_refused_by_name(part, what, value):
    served = made(CASES["both"])
    trained = dequantize_codebooks(served)
    with torch.no_grad():
        dict(trained.decoder.banks["a"].named_parameters())[part][3, 1] = value
    with pytest.raises(ValueError, match=f"table 'a': int8 rows must .* row of {what}"):
        quantize_codebooks(trained, served.methods())


def test_collections_that_cannot_be_stored_otherwise_are_refused():
    served = made(CASES["both"])
    meta = CompressedEmbeddingBagCollection([table()], torch.device("meta"), compression=CASES["int8-codebooks"])
    dense = made(DenseConfig())
    dense.dense.to(torch.bfloat16)
    for change in (dequantize_codebooks, lambda given: quantize_codebooks(given, {})):
        with pytest.raises(ValueError, match=r"collection must hold values, got .* on the meta device"):
            change(meta)
        with pytest.raises(ValueError, match=r"collection must be in float32, got 'dense\..*' in torch\.bfloat16"):
            change(dense)
    assert served.methods()["a"] == CASES["both"]


def test_it_leaves_the_callers_world_alone():
    """Nothing is drawn from the global generator, no config is shared, and what was frozen stays so."""
    served = made(replace(CASES["both"], width=8))
    served.requires_grad_(False)
    before = torch.get_rng_state()
    with torch.device("meta"):
        trained = dequantize_codebooks(served)
        again = quantize_codebooks(trained, served.methods())
    assert torch.equal(before, torch.get_rng_state())
    for made_anew in (trained, again):
        for mine, theirs in zip(made_anew.embedding_bag_configs(), served.embedding_bag_configs(), strict=True):
            assert mine == theirs and mine is not theirs and mine.feature_names is not theirs.feature_names
    assert {name for name, each in trained.named_parameters() if each.requires_grad} == {
        "decoder.banks.a.codebooks",
        "decoder.banks.a.hot_rows",
    }
    assert not any(each.requires_grad for each in again.parameters())
