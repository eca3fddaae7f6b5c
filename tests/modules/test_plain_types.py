"""Output types of `CompressedEmbedding` and `CompressedEmbeddingBag`: what `dtype` says, as of PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchrec import DataType

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, counts
from tests.modules.test_plain import HASH, IDS_2D, KINDS, NARROW, PADDING, PQ, made
from torchrec_compress import CompressedEmbedding, CompressedEmbeddingBag, compress, decompress
from torchrec_compress.methods import CafeConfig, DenseConfig

HALVES = [torch.float16, torch.bfloat16]
CAFE = CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4)


def halves(config, kind):
    """Return the modules of a method in half precision: those that it has."""
    found = []
    for dtype in HALVES:
        try:
            found.append(made(kind, config, padding_idx=PADDING, dtype=dtype))
        except ValueError as error:
            if "data_type must be FP32" not in str(error):
                raise
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rows_are_of_the_type_that_was_asked_for(config):
    for module in halves(config, CompressedEmbedding):
        rows = module.collection.table_rows(module.name, torch.arange(NUM_ROWS)).to(module.dtype)
        rows[PADDING] = module.padding_row
        for got, expected in ((module(IDS_2D), rows[IDS_2D]), (module.weight, rows)):
            assert got.dtype == expected.dtype == module.padding_row.dtype == module.dtype
            assert torch.equal(got, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_pooled_in_float32_and_cast(config, mode):
    for module in halves(config, CompressedEmbeddingBag):
        module = made(CompressedEmbeddingBag, config, mode=mode, padding_idx=PADDING, dtype=module.dtype)
        rows = module.collection.table_rows(module.name, torch.arange(NUM_ROWS)).float()
        got = module(IDS_2D)
        assert got.dtype == module.dtype
        expected = F.embedding_bag(IDS_2D, rows, mode=mode, padding_idx=PADDING)
        torch.testing.assert_close(got.float(), expected, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-5)


def test_what_has_half_precision():
    """All but what TorchRec has no tables for: rows in its tables are float16 at most, managed ones float32."""
    found = {type(config).__name__: [each.dtype for each in halves(config, KINDS[0])] for config in (PQ, HASH, CAFE)}
    assert found == {"PQConfig": HALVES, "HashConfig": HALVES[:1], "CafeConfig": []}
    assert made(KINDS[0], HASH, dtype=torch.float16).collection.blueprint.tables[0].data_type == DataType.FP16
    half, whole = (made(KINDS[0], HASH, dtype=each).footprint().total_bytes for each in (torch.float16, None))
    assert half == whole // 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [PQ, NARROW, HASH])
def test_gradients_are_those_of_float32(kind, config, dtype):
    if dtype == torch.bfloat16 and config in (NARROW, HASH):
        return
    half, whole = made(kind, config, dtype=dtype), made(kind, config)
    with torch.no_grad():  # values that a half has, too
        for mine, theirs in zip(half.parameters(), whole.parameters(), strict=True):
            theirs.copy_(mine)
    weight = torch.linspace(-1, 1, DIM)
    for module in (half, whole):
        (module(IDS_2D).float() * weight).sum().backward()
    compared = 0
    for mine, theirs in zip(half.parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad.float(), theirs.grad, rtol=1e-2, atol=1e-2)
            compared += bool(theirs.grad.any())
    assert compared


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("padding", [None, PADDING])
def test_a_trained_module_in_half_precision_is_compressed_as_one(padding, dtype):
    torch.manual_seed(0)
    for kind in (nn.Embedding, nn.EmbeddingBag):
        model = nn.ModuleDict({"item": kind(NUM_ROWS, DIM, padding_idx=padding, dtype=dtype)})
        small = compress(model, PQ, counts={"item": counts()})
        back = decompress(small)
        assert type(back["item"]) is kind and back["item"].get_parameter("weight").dtype == dtype
        assert small["item"](IDS_2D).dtype == model["item"](IDS_2D).dtype == back["item"](IDS_2D).dtype == dtype
        weights = [each["item"].get_parameter("weight") for each in (model, back)]
        assert torch.equal(weights[1], small["item"].weight)  # type: ignore[arg-type]
        if padding is not None:
            assert torch.equal(weights[0][padding], weights[1][padding])


def test_the_type_is_said_and_checked():
    assert "padding_idx=5, dtype=torch.float16, name=" in repr(made(KINDS[0], PQ, padding_idx=5, dtype=torch.float16))
    assert "dtype=torch" not in repr(made(KINDS[0], PQ))
    for wrong in (torch.float64, torch.int8, "half"):
        with pytest.raises(ValueError, match="Embedding: dtype must be float32, float16 or bfloat16, got"):
            KINDS[0](NUM_ROWS, DIM, compression=PQ, dtype=wrong)
    with pytest.raises(ValueError, match="data_type must be FP32 or FP16 where rows lie in a table of TorchRec's"):
        KINDS[1](NUM_ROWS, DIM, compression=HASH, dtype=torch.bfloat16)


def test_rows_are_float32_whatever_the_parameters_are_cast_to():
    for config in (PQ, DenseConfig(), NARROW):
        for kind in KINDS:
            ours = made(kind, config, padding_idx=PADDING)
            before = ours(IDS_2D), ours.weight
            for got, expected in zip((ours.half()(IDS_2D), ours.weight), before, strict=True):
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)
