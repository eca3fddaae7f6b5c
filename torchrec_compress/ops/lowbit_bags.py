"""The pooling of low-bit rows, read from their table a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.ops.ids import check_ids, gather_rows
from torchrec_compress.ops.lowbit import dequantize_rows
from torchrec_compress.ops.pooling import check_offsets

# values of a piece: 1 MiB of floats, which stay in a core's cache, or 64 MiB, which keep a GPU busy
_PIECE = {"cpu": 2**18, "cuda": 2**24}
_ROWS = "Tensor rows, Tensor? ids, Tensor offsets"


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

    Rows become floats a piece at a time, so that nothing of size (L, D) is made, forward or backward.

    Args:
        rows: (L, bytes per row) of the ids, or with `ids` the (N, bytes per row) table; uint8, see `quantize_rows`.
        dtype: "int8" or "int4".
        offsets: (B + 1,) int32 or int64, from 0 up to L; bag b is the ids [offsets[b], offsets[b + 1]). None: every id
            is a bag of its own.
        weights: (L,) per-id factors, or None.
        ids: (L,) int32 or int64 rows of the table, or None.
        where: names the look-up in errors.

    Returns:
        (B, D) float32; an empty bag is zeros. Differentiable in weights.

    Raises:
        ValueError: an id is out of range, or offsets decrease or do not run from 0 to L (CPU).

    Example:
        >>> from torchrec_compress.ops import quantize_rows
        >>> table = quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 15.0], [5.0, 5.0, 5.0, 5.0]]), "int4")
        >>> low_bit_bag(table, "int4", torch.tensor([0, 2, 2]), ids=torch.tensor([0, 1])).tolist()
        [[5.0, 6.0, 7.0, 20.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if ids is not None:
        check_ids(ids, rows.shape[0], where)
    if offsets is not None:
        check_offsets(offsets, (rows if ids is None else ids).shape[0])
        return _low_bit_bag(rows, ids, offsets, None if weights is None else weights.float(), dtype)
    found = dequantize_rows(rows if ids is None else gather_rows(rows, ids), dtype)
    return found if weights is None else found * weights.float().unsqueeze(1)


@torch.library.custom_op(
    "torchrec_compress::low_bit_bag", mutates_args=(), schema=f"({_ROWS}, Tensor? weights, str dtype) -> Tensor"
)
def _low_bit_bag(
    rows: Tensor, ids: Tensor | None, offsets: Tensor, weights: Tensor | None, dtype: Literal["int8", "int4"]
) -> Tensor:
    num_ids = (rows if ids is None else ids).shape[0]
    out = torch.zeros(offsets.shape[0] - 1, _dim(rows, dtype), device=rows.device)
    for first, piece in _pieces(rows, ids, dtype):
        factors = None if weights is None else weights[first : first + len(piece)]
        if rows.device.type == "cpu":
            bags, local = _bags_of(offsets, first, first + len(piece))
            sums = F.embedding_bag(
                torch.arange(len(piece)), piece, local, mode="sum", per_sample_weights=factors, include_last_offset=True
            )
            if len(piece) == num_ids:
                return sums
            out[bags] += sums
        else:  # where the bags of a piece lie is not known to the host
            mine = _bag_numbers(offsets, first, len(piece))
            out.index_add_(0, mine, piece if factors is None else piece * factors.unsqueeze(1))
    return out


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


def _dim(rows: Tensor, dtype: str) -> int:
    return (rows.shape[1] - 4) * (1 if dtype == "int8" else 2)


def _pieces(rows: Tensor, ids: Tensor | None, dtype: Literal["int8", "int4"]) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, float rows) of one piece of the ids after another."""
    size = max(1, _PIECE["cpu" if rows.device.type == "cpu" else "cuda"] // _dim(rows, dtype))
    for first in range(0, (rows if ids is None else ids).shape[0], size):
        mine = slice(first, first + size)
        yield first, dequantize_rows(rows[mine] if ids is None else gather_rows(rows, ids[mine]), dtype)


def _bags_of(offsets: Tensor, first: int, last: int) -> tuple[slice, Tensor]:
    """Return the bags that ids [first, last) belong to, and where each of them begins and ends among these."""
    begin = int(torch.searchsorted(offsets, first, right=True)) - 1 if first else 0
    end = int(torch.searchsorted(offsets, last)) if last < offsets[-1] else len(offsets) - 1
    return slice(begin, end), offsets[begin : end + 1].long().clamp(first, last) - first


def _bag_numbers(offsets: Tensor, first: int, num_ids: int) -> Tensor:
    """Return the bags of `num_ids` ids from `first` on, (num_ids,) int64; never waits for the device."""
    positions = torch.arange(first, first + num_ids, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, positions, right=True) - 1


@_low_bit_bag.register_fake
def _(rows: Tensor, ids: Tensor | None, offsets: Tensor, weights: Tensor | None, dtype: str) -> Tensor:
    return rows.new_empty((offsets.shape[0] - 1, _dim(rows, dtype)), dtype=torch.float32)


@_low_bit_bag_backward.register_fake
def _(grad: Tensor, rows: Tensor, ids: Tensor | None, offsets: Tensor, dtype: str) -> Tensor:
    return grad.new_empty((rows if ids is None else ids).shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, ids, offsets, _, ctx.dtype = inputs
    ctx.save_for_backward(rows, ids, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_weights = torch.ops.torchrec_compress.low_bit_bag_backward(grad, *ctx.saved_tensors, ctx.dtype)
    return None, None, None, of_weights, None


_low_bit_bag.register_autograd(_backward, setup_context=_setup_context)
