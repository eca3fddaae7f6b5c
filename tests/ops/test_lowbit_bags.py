"""`low_bit_bag`: values, the gradient of weights, pieces, errors, registration."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from torchrec_compress.ops import dequantize_rows, low_bit_bag, lowbit_bags, quantize_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS, DIM = 60, 12


def inputs(lengths: list[int], index: torch.dtype = torch.int64):
    """Return ids, offsets and weights."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, ROWS, (int(offsets[-1]),))
    return ids.to(index), offsets.to(index), torch.randn(len(ids), requires_grad=True)


def pooled(rows, offsets, weights):
    """Return the sums in float64, bag by bag."""
    factors = torch.ones(len(rows)).double() if weights is None else weights.double()
    parts = (rows.double() * factors.unsqueeze(1)).tensor_split(offsets[1:-1].long())
    return torch.stack([part.sum(0) for part in parts])


@pytest.fixture(params=[2**18, 7 * DIM, 1])
def piece(request, monkeypatch) -> int:
    """Values of a piece: all ids, seven of them, one."""
    monkeypatch.setitem(lowbit_bags._PIECE, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("lengths", [[3, 0, 1, 20, 0], [0, 0, 5], [0, 0], [1] * 9, [40]])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_values_and_the_gradient_of_weights(dtype, weighted, lengths, piece):
    table = quantize_rows(torch.randn(ROWS, DIM), dtype)
    for index in (torch.int32, torch.int64):
        ids, offsets, weights = inputs(lengths, index)
        factors = weights if weighted else None
        expected = pooled(dequantize_rows(table[ids.long()], dtype), offsets, factors)
        got = low_bit_bag(table, dtype, offsets, weights=factors, ids=ids)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(low_bit_bag(table[ids.long()], dtype, offsets, weights=factors), got)
        in_pieces = lowbit_bags._pool_in_pieces(table, ids, offsets, factors, dtype)  # as on a GPU
        torch.testing.assert_close(in_pieces.double(), expected, rtol=1e-5, atol=1e-5)
        if weighted and len(ids):
            upstream = torch.randn_like(got)
            (mine,) = torch.autograd.grad(got, weights, upstream)
            (theirs,) = torch.autograd.grad(expected, weights, upstream.double())
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_id_is_a_bag_without_offsets(dtype):
    table = quantize_rows(torch.randn(ROWS, DIM), dtype)
    ids, _, weights = inputs([9])
    rows = dequantize_rows(table[ids], dtype)
    assert torch.equal(low_bit_bag(table, dtype, None, ids=ids), rows)
    assert torch.equal(low_bit_bag(table[ids], dtype, None, weights=weights), rows * weights.unsqueeze(1))


def test_rows_become_floats_a_piece_at_a_time(monkeypatch):
    monkeypatch.setitem(lowbit_bags._PIECE, "cpu", 7 * DIM)
    sizes = []

    def noted(rows, dtype):
        sizes.append(len(rows))
        return dequantize_rows(rows, dtype)

    monkeypatch.setattr(lowbit_bags, "dequantize_rows", noted)
    ids, offsets, weights = inputs([30, 11])
    table = quantize_rows(torch.randn(ROWS, DIM), "int8")
    lowbit_bags._pool_in_pieces(table, ids, offsets, weights, "int8")
    assert sizes == [7, 7, 7, 7, 7, 6]
    low_bit_bag(table, "int8", offsets, weights=weights, ids=ids).sum().backward()  # the backward alone
    assert sizes == [7, 7, 7, 7, 7, 6] * 2


@pytest.mark.parametrize(("dtype", "width"), [("int8", 2), ("int8", 62), ("int4", 4), ("int8", 64), ("int4", 64)])
def test_rows_are_those_of_fbgemms_inference_tables(dtype, width):
    rows = quantize_rows(torch.randn(ROWS, width), dtype)
    served = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("", ROWS, width, SparseType[dtype.upper()], EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        row_alignment=1,
    )
    served.initialize_weights()
    ((weight, _),) = served.split_embedding_weights(split_scale_shifts=False)
    assert weight.shape == rows.shape
    weight.copy_(rows)
    ids, offsets, weights = inputs([4, 0, 7])
    with torch.no_grad():
        expected = served(ids.int(), offsets.int(), weights)
        assert torch.equal(low_bit_bag(rows, dtype, offsets, weights=weights, ids=ids), expected)


def test_wrong_ids_and_offsets_are_errors():
    table = quantize_rows(torch.randn(ROWS, DIM), "int4")
    ids, offsets, _ = inputs([2, 3])
    with pytest.raises(ValueError, match=r"table 't': every id must be in \[0, 60\), got 60"):
        low_bit_bag(table, "int4", offsets, ids=ids.clamp(min=60), where="table 't'")
    with pytest.raises(ValueError, match="must not decrease"):
        low_bit_bag(table, "int4", torch.tensor([0, 4, 3, 5]), ids=ids)
    with pytest.raises(ValueError, match="must start with 0 and must end with the number of ids, 5"):
        low_bit_bag(table, "int4", torch.tensor([0, 4]), ids=ids)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_operators_are_registered_as_torch_expects(dtype):
    table = quantize_rows(torch.randn(ROWS, DIM), dtype)
    ids, offsets, weights = inputs([2, 0, 3])
    ops = torch.ops.torchrec_compress
    for rows, found in ((table, ids), (table[ids], None)):
        torch.library.opcheck(ops.low_bit_bag.default, (rows, found, offsets, weights, dtype))
        torch.library.opcheck(ops.low_bit_bag.default, (rows, found, offsets, None, dtype))
        grad = torch.randn(3, DIM)
        torch.library.opcheck(ops.low_bit_bag_backward.default, (grad, rows, found, offsets, dtype))
