"""Rows made of the nearest codewords, slice by slice, and the gradient that trains both (DPQ, arXiv 1908.09756)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_compress.ops.dispatch import cpp_serves
from torchrec_compress.ops.nearest import BLOCK_FLOATS, nearest_with_distance


def slice_codes(rows: Tensor, codebooks: Tensor) -> Tensor:
    """Return the nearest codeword of each slice of a row, the first one among equals.

    A code hangs on its own row alone, not on those beside it, so that rows get the same ones in whatever batch. Kernels
    of a CPU and plain PyTorch add distances up otherwise: a slice half-way between two codewords may get the other one.

    Args:
        rows: (L, D) floating point, compared as float32.
        codebooks: (M * K, D / M) floating point, M codebooks one below the other.

    Returns:
        (L, M) int64 in [0, K).

    Example:
        >>> slice_codes(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]])).tolist()
        [[1, 0]]
    """
    # copies: kernels want them aligned
    rows, codebooks = (each.detach().to(torch.float32, copy=True) for each in (rows, codebooks))
    width = codebooks.shape[1]
    books = codebooks.view(rows.shape[1] // width, -1, width)
    find = _by_kernel if rows.device.type == "cpu" and cpp_serves() else _by_columns
    return torch.stack([find(part, book) for part, book in zip(rows.split(width, dim=1), books, strict=True)], dim=1)


def _by_kernel(points: Tensor, book: Tensor) -> Tensor:
    return nearest_with_distance(points, book)[0]


def _by_columns(points: Tensor, book: Tensor) -> Tensor:
    """Return the nearest codewords: distances added up column by column, as a matmul's hang on its number of rows."""
    found = []
    for block in points.split(max(1, BLOCK_FLOATS // len(book))):
        distances = block.new_zeros(len(block), len(book))
        for column, numbers in zip(block.unbind(1), book.unbind(1), strict=True):
            distances += (column.unsqueeze(1) - numbers).square_()
        found.append(distances.argmin(1))
    return torch.cat(found)


def quantize_slices(rows: Tensor, codebooks: Tensor) -> Tensor:
    """Return rows with the nearest codeword in place of each slice, to the bit.

    The gradient of a slice goes to its codeword, and straight through to the row as well.

    Args:
        rows: (L, D) floating point.
        codebooks: (M * K, D / M) floating point, M codebooks one below the other.

    Returns:
        (L, D), dtype of `codebooks`. Differentiable, once, in rows and codebooks.

    Example:
        >>> quantize_slices(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]])).tolist()
        [[1.0, 0.0]]
    """
    return _Quantized.apply(rows, codebooks)  # type: ignore[return-value]


class _Quantized(torch.autograd.Function):
    """`quantize_slices`: `rows + (codewords - rows).detach()` would not be the codewords to the bit."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codebooks: Tensor) -> Tensor:
        codes = slice_codes(rows, codebooks)
        size = len(codebooks) // codes.shape[1]
        numbers = codes + torch.arange(codes.shape[1], device=codes.device) * size
        ctx.save_for_backward(numbers)
        ctx.shape, ctx.dtype = codebooks.shape, rows.dtype
        return codebooks[numbers].flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (numbers,) = ctx.saved_tensors
        of_rows = gradient.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_books = None
        if ctx.needs_input_grad[1]:
            pieces = gradient.reshape(-1, ctx.shape[1])
            of_books = gradient.new_zeros(ctx.shape).index_add_(0, numbers.flatten(), pieces)
        return of_rows, of_books
