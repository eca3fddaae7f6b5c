"""The pooling of low-bit rows: on a CPU by FBGEMM's inference kernels, elsewhere a piece of the ids at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_compress.ops.checks import check_one_device, check_weight_count
from torchrec_compress.ops.ids import check_ids, gather_rows
from torchrec_compress.ops.lowbit import dequantize_rows, low_bit_width
from torchrec_compress.ops.pooling import as_factors, check_offsets, scale_rows

# values of a piece: 1 MiB of floats, which stay in a core's cache, or 64 MiB, which keep a GPU busy
_PIECE = {"cpu": 2**18, "cuda": 2**24}
_ROWS = "Tensor rows, Tensor? ids, Tensor offsets"
# FBGEMM's numbers of row formats, of the memory of a CPU, of a pooling mode and of an output type
_FORMATS = {"int8": 2, "int4": 3}
_HOST, _SUM, _FLOAT32 = 3, 0, 0


def low_bit_bag(
    rows: Tensor,
    dtype: Literal["int8", "int4"],
    offsets: Tensor | None,
    *,
    weights: Tensor | None = None,
    ids: Tensor | None = None,
    where: str = "low_bit_bag",
) -> Tensor:
    """Sum, bag by bag, low-bit rows of one table.

    Tensors may be views of any strides: a copy is made of what does not lie in one piece. Nothing of size (L, D) is
    made, forward or backward: FBGEMM's kernels read the rows where they lie. On a GPU, whose kernels want rows aligned
    to 16 bytes, and for the gradient of weights, rows become floats a piece at a time.

    Args:
        rows: (L, bytes per row) of the ids, or with `ids` the (N, bytes per row) table; uint8, see `quantize_rows`.
        dtype: "int8" or "int4".
        offsets: (B + 1,) int32 or int64, from 0 up to L; bag b is the ids [offsets[b], offsets[b + 1]). None: every id
            is a bag of its own.
        weights: (L,) floating point factors of the ids, or None.
        ids: (L,) int32 or int64 rows of the table, or None.
        where: names the look-up in errors.

    Returns:
        (B, D) float32; an empty bag is zeros. Differentiable in weights.

    Raises:
        ValueError: types, devices or shapes do not fit; an id is out of range, or offsets decrease or do not run from 0
            to L (CPU).

    Example:
        >>> from torchrec_compress.ops import quantize_rows
        >>> table = quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 15.0], [5.0, 5.0, 5.0, 5.0]]), "int4")
        >>> low_bit_bag(table, "int4", torch.tensor([0, 2, 2]), ids=torch.tensor([0, 1])).tolist()
        [[5.0, 6.0, 7.0, 20.0], [0.0, 0.0, 0.0, 0.0]]
    """
    low_bit_width(rows, dtype)
    check_one_device(where, {"rows": rows, "ids": ids, "offsets": offsets, "weights": weights})
    if offsets is not None:
        factors = None if weights is None else as_factors(weights, torch.float32, where)
        return _low_bit_bag(rows, ids, offsets, factors, dtype, where)
    if ids is not None:
        check_ids(ids, rows.shape[0], where)
    found = dequantize_rows(rows if ids is None else gather_rows(rows, ids), dtype)
    return found if weights is None else scale_rows(found, weights, where)


@torch.library.custom_op(
    "torchrec_compress::low_bit_bag",
    mutates_args=(),
    schema=f"({_ROWS}, Tensor? weights, str dtype, str where='low_bit_bag') -> Tensor",
)
def _low_bit_bag(
    rows: Tensor,
    ids: Tensor | None,
    offsets: Tensor,
    weights: Tensor | None,
    dtype: Literal["int8", "int4"],
    where: str = "low_bit_bag",
) -> Tensor:
    # here, so that a compiled graph looks at its batches too
    num_ids = (rows if ids is None else ids).shape[0]
    if ids is not None:
        check_ids(ids, rows.shape[0], where)
    check_offsets(offsets, num_ids)
    if weights is not None:
        check_weight_count(weights, num_ids, where)
    pool = _pool_by_fbgemm if rows.device.type == "cpu" else _pool_in_pieces
    return pool(rows, ids, offsets, weights, dtype)


def _pool_in_pieces(
    rows: Tensor, ids: Tensor | None, offsets: Tensor, weights: Tensor | None, dtype: Literal["int8", "int4"]
) -> Tensor:
    out = torch.zeros(offsets.shape[0] - 1, low_bit_width(rows, dtype), device=rows.device)
    for first, piece in _pieces(rows, ids, dtype):
        factors = None if weights is None else weights[first : first + len(piece)]
        mine = _bag_numbers(offsets, first, len(piece))
        out.index_add_(0, mine, piece if factors is None else piece * factors.unsqueeze(1))
    return out


def _pool_by_fbgemm(
    rows: Tensor, ids: Tensor | None, offsets: Tensor, weights: Tensor | None, dtype: Literal["int8", "int4"]
) -> Tensor:
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    found = torch.arange(rows.shape[0], dtype=offsets.dtype) if ids is None else ids
    dim = low_bit_width(rows, dtype)
    return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default(
        rows.contiguous().view(-1),
        rows.new_empty(0),
        weights_placements=torch.tensor([_HOST], dtype=torch.int32),
        weights_offsets=torch.zeros(1, dtype=torch.int64),
        weights_tys=torch.tensor([_FORMATS[dtype]], dtype=torch.uint8),
        D_offsets=torch.tensor([0, dim], dtype=torch.int32),
        total_D=dim,
        max_int2_D=0,
        max_int4_D=dim if dtype == "int4" else 0,
        max_int8_D=dim if dtype == "int8" else 0,
        max_float16_D=0,
        max_float32_D=0,
        indices=found.contiguous(),
        offsets=offsets.to(found.dtype).contiguous(),
        pooling_mode=_SUM,
        indice_weights=None if weights is None else weights.contiguous(),
        output_dtype=_FLOAT32,
        row_alignment=1,
    )


@torch.library.custom_op(
    "torchrec_compress::low_bit_bag_backward", mutates_args=(), schema=f"(Tensor grad, {_ROWS}, str dtype) -> Tensor"
)
def _low_bit_bag_backward(
    grad: Tensor, rows: Tensor, ids: Tensor | None, offsets: Tensor, dtype: Literal["int8", "int4"]
) -> Tensor:
    """Return the gradient of the weights, (L,)."""
    of_weights = grad.new_empty((rows if ids is None else ids).shape[0])
    for first, piece in _pieces(rows, ids, dtype):
        upstream = grad.index_select(0, _bag_numbers(offsets, first, len(piece)))
        of_weights[first : first + len(piece)] = (piece * upstream).sum(1)
    return of_weights


def _pieces(rows: Tensor, ids: Tensor | None, dtype: Literal["int8", "int4"]) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, float rows) of one piece of the ids after another."""
    size = max(1, _PIECE["cpu" if rows.device.type == "cpu" else "cuda"] // low_bit_width(rows, dtype))
    for first in range(0, (rows if ids is None else ids).shape[0], size):
        mine = slice(first, first + size)
        yield first, dequantize_rows(rows[mine] if ids is None else gather_rows(rows, ids[mine]), dtype)


def _bag_numbers(offsets: Tensor, first: int, num_ids: int) -> Tensor:
    """Return the bags of `num_ids` ids from `first` on, (num_ids,) int64; never waits for the device."""
    positions = torch.arange(first, first + num_ids, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets.contiguous(), positions, right=True) - 1


@_low_bit_bag.register_fake
def _(
    rows: Tensor,
    ids: Tensor | None,
    offsets: Tensor,
    weights: Tensor | None,
    dtype: Literal["int8", "int4"],
    where: str = "low_bit_bag",
) -> Tensor:
    return rows.new_empty((offsets.shape[0] - 1, low_bit_width(rows, dtype)), dtype=torch.float32)


@_low_bit_bag_backward.register_fake
def _(grad: Tensor, rows: Tensor, ids: Tensor | None, offsets: Tensor, dtype: str) -> Tensor:
    return grad.new_empty((rows if ids is None else ids).shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, ids, offsets, _, ctx.dtype, _ = inputs
    ctx.save_for_backward(rows, ids, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_weights = torch.ops.torchrec_compress.low_bit_bag_backward(grad, *ctx.saved_tensors, ctx.dtype)
    return None, None, None, of_weights, None, None


_low_bit_bag.register_autograd(_backward, setup_context=_setup_context)
