"""Native parts in half precision."""

import pytest
import torch
from torchrec import EmbeddingConfig

from tests.cases import NUM_ROWS, batch, fit, fresh, table
from tests.methods.throwaway import HalfHashConfig, HalfMEmComConfig, registered
from torchrec_compress import CompressedEmbeddingCollection, decompress
from torchrec_compress.methods import HashConfig, MEmComConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HALF = [HalfHashConfig(num_buckets=40), HalfMEmComConfig(num_buckets=40)]
FULL = [HashConfig(num_buckets=40), MEmComConfig(num_buckets=40)]
BAGS = [[1, 2, 2], [], [402, 0], [7]]
PAIRS = pytest.mark.parametrize(("half", "full"), [*zip(HALF, FULL, strict=True)], ids=["bag", "rows"])


def test_bytes_and_dtypes():
    saved = 40 * 16 * 2
    with registered(HalfHashConfig, HalfMEmComConfig):
        for half, full in zip(HALF, FULL, strict=True):
            collection = fresh(half)
            footprint = collection.footprint()
            assert half.stored_bytes(table()) == full.stored_bytes(table()) - saved == footprint.total_bytes
            assert footprint.compressed_ratio == footprint.ratio == NUM_ROWS * 16 * 4 / footprint.total_bytes
            real = sum(tensor.nbytes for tensor in collection.parameters())
            assert real == footprint.total_bytes
            dtypes = {name.split("__")[-1]: weight.dtype for name, weight in collection.named_parameters()}
            assert dtypes.pop("buckets.weight") == torch.float16
            assert set(dtypes.values()) <= {torch.float32}


@PAIRS
def test_look_ups_are_float32_of_the_rounded_rows(half, full):
    ours, wide = fit(half), fit(full)
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), wide.parameters(), strict=True):
            theirs.copy_(mine.float())
    got, expected = ours(batch(BAGS)).values(), wide(batch(BAGS)).values()
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got, expected, rtol=2e-3, atol=2e-3
    )  # torch pools a half-precision bag in half precision
    rows = ours.table_rows("item", torch.arange(NUM_ROWS))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, wide.table_rows("item", torch.arange(NUM_ROWS)))
    assert decompress(ours).embedding_bags["item"].weight.dtype == torch.float32
    (got * torch.arange(16.0)).sum().backward()
    (expected * torch.arange(16.0)).sum().backward()
    for mine, theirs in zip(ours.parameters(), wide.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.float(), theirs.grad, rtol=2e-3, atol=2e-3)


@PAIRS
def test_unpooled_rows_are_float32_of_the_rounded_rows(half, full):
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    ours, wide = (CompressedEmbeddingCollection([item], compression=config) for config in (half, full))
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), wide.parameters(), strict=True):
            theirs.copy_(mine.float())
    got, expected = (collection(batch(BAGS))["item"].values() for collection in (ours, wide))
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@PAIRS
def test_meta_construction_and_reset(half, full):
    collection = type(fresh(half))([table()], device=torch.device("meta"), compression=half)
    assert all(tensor.is_meta for tensor in [*collection.parameters(), *collection.buffers()])
    assert collection.footprint().total_bytes == half.stored_bytes(table())
    collection.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(collection(batch(BAGS)).values()).all()
