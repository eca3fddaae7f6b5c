"""Codebook look-ups on FBGEMM's dense table-batched embedding bags: every codebook is a virtual table.

For machines without a C++ compiler. FBGEMM's own operator with a gradient (`dense_embedding_codegen_lookup_function`)
has no kernel for autograd on a CPU and says so on stderr, so its forward and its two gradients are wrapped here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_compress.ops.checks import check_weight_count
from torchrec_compress.ops.pooling import check_offsets, repeat_offsets
from torchrec_compress.ops.reference import pool_each
from torchrec_compress.ops.types import BagLookup, IdBags, Span, Structure

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# FBGEMM's numbers of a pooling mode and of an output type: that of the table
_SUM, _SAME = 0, -1


def fbgemm_codebook_bags(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> Tensor:
    """Pool look-up after look-up; arguments and errors as in `codebook_bags`, for codebooks of `FLOATS` on a CPU.

    Sums are float32, as the C++ kernels' are: lower dtypes are summed from a copy.

    Raises:
        RuntimeError: a code is out of range.
    """
    books = [table.float() for table in codebooks]
    rows = [None if table is None else table.float() for table in hot_rows]
    return pool_each(_sum_codewords, lookups, spans, codes, books, rows, batch).to(codebooks[0].dtype)


def _sum_codewords(
    words: Tensor, table: Tensor, offsets: Tensor | None, weights: Tensor | None, structure: Structure
) -> Tensor:
    if offsets is None:
        offsets = torch.arange(words.shape[1] + 1, dtype=words.dtype, device=words.device)
    factors = None if weights is None else weights.float()
    return virtual_table_bags(words, table, offsets, factors, structure == "residual")


@torch.library.custom_op("torchrec_compress::virtual_table_bags", mutates_args=())
def virtual_table_bags(
    words: Tensor, table: Tensor, offsets: Tensor, weights: Tensor | None, is_residual: bool
) -> Tensor:
    """Sum codewords bag by bag; tensors of any strides. Differentiable in `table` and `weights`.

    Args:
        words: (M, L) int32 or int64, see `codewords`.
        table: (M * R, D / M) float32, M virtual tables; if residual (R, D), one.
        offsets: (B + 1,) int32 or int64, from 0 up to L.
        weights: (L,) float32, or None.
        is_residual: whether all M codewords of an id are of one table.

    Returns:
        (B, D) float32.

    Raises:
        ValueError: offsets or weights do not fit, or the table is empty.
        RuntimeError: a word is out of range.
    """
    num_codes, num_ids = words.shape
    check_offsets(offsets, num_ids)
    if weights is not None:
        check_weight_count(weights, num_ids, "codebook_bag")
    num_tables = 1 if is_residual else num_codes
    if table.shape[0] < num_tables:
        raise ValueError(f"codebook_bag: codebooks must have at least one codeword each, got shape {list(table.shape)}")
    weights_offsets, columns, rows = _layout(num_tables, *table.shape)
    indices, bags, factors = _expand(words, offsets, weights, is_residual)
    return torch.ops.fbgemm.split_embedding_codegen_forward_cpu(
        table.contiguous().view(-1),
        weights_offsets,
        columns,
        num_tables * table.shape[1],
        rows,
        indices,
        bags,
        _SUM,
        factors,
        _SAME,
    )


@torch.library.custom_op("torchrec_compress::virtual_table_bags_backward", mutates_args=())
def virtual_table_bags_backward(
    grad: Tensor, words: Tensor, offsets: Tensor, weights: Tensor | None, num_rows: int, is_residual: bool
) -> Tensor:
    """Return the gradient of the table, (num_rows, D / M) float32; the rest is as in `virtual_table_bags`."""
    num_tables = 1 if is_residual else words.shape[0]
    width = grad.shape[1] // num_tables
    weights_offsets, columns, rows = _layout(num_tables, num_rows, width)
    indices, bags, factors = _expand(words, offsets, weights, is_residual)
    # only the size of the table is read; the number of bits in front of `indices` is not used on a CPU
    table = grad.new_empty(num_rows * width)
    found = torch.ops.fbgemm.split_embedding_backward_codegen_dense_cpu(
        grad.contiguous(), table, weights_offsets, columns, width, rows, 0, indices, bags, _SUM, factors
    )
    return found.view(num_rows, width)


@torch.library.custom_op("torchrec_compress::virtual_table_bags_backward_weights", mutates_args=())
def virtual_table_bags_backward_weights(
    grad: Tensor, words: Tensor, table: Tensor, offsets: Tensor, is_residual: bool
) -> Tensor:
    """Return the gradient of weights, (L,) float32; the rest is as in `virtual_table_bags`."""
    num_codes, num_ids = words.shape
    weights_offsets, columns, _ = _layout(1 if is_residual else num_codes, *table.shape)
    indices, bags, _ = _expand(words, offsets, None, is_residual)
    found = torch.ops.fbgemm.split_embedding_codegen_grad_indice_weights_cpu(
        grad.contiguous(), table.contiguous().view(-1), weights_offsets, columns, indices, bags, None
    )
    return found.view(num_ids, num_codes).sum(1) if is_residual else found.view(num_codes, num_ids).sum(0)


@functools.lru_cache(maxsize=1024)
def _layout(num_tables: int, num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where T virtual tables start, (T,), and their borders in columns and rows, each (T + 1,); only read."""
    size = num_rows // num_tables
    borders = torch.arange(num_tables + 1, device="cpu")  # whatever the default device is
    return borders[:-1] * (size * width), (borders * width).int(), borders * size


def _expand(
    words: Tensor, offsets: Tensor, weights: Tensor | None, is_residual: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows to sum, table after table, (M * L,); their bags, (T * B + 1,); and their factors, (M * L,).

    Each lies in one piece, which FBGEMM's kernels take for granted: a reshaped view may have a stride.
    """
    num_codes, num_ids = words.shape
    offsets = offsets.to(words.dtype)  # the gradients' kernels read both as one type
    if is_residual:
        factors = None if weights is None else weights.repeat_interleave(num_codes)
        return words.t().reshape(-1).contiguous(), (offsets * num_codes).contiguous(), factors
    factors = None if weights is None else weights.repeat(num_codes)
    return words.reshape(-1).contiguous(), repeat_offsets(offsets, num_codes, num_ids), factors


@virtual_table_bags.register_fake
def _fake(words: Tensor, table: Tensor, offsets: Tensor, weights: Tensor | None, is_residual: bool) -> Tensor:
    width = table.shape[1] * (1 if is_residual else words.shape[0])
    return table.new_empty(offsets.shape[0] - 1, width)


@virtual_table_bags_backward.register_fake
def _fake_backward(
    grad: Tensor, words: Tensor, offsets: Tensor, weights: Tensor | None, num_rows: int, is_residual: bool
) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1] // (1 if is_residual else words.shape[0]))


@virtual_table_bags_backward_weights.register_fake
def _fake_backward_weights(grad: Tensor, words: Tensor, table: Tensor, offsets: Tensor, is_residual: bool) -> Tensor:
    return grad.new_empty(words.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    words, table, offsets, weights, ctx.is_residual = inputs
    ctx.num_rows = table.shape[0]
    # without a gradient of weights, codebooks may change between forward and backward
    is_weight_trained = weights is not None and weights.requires_grad
    ctx.save_for_backward(words, offsets, weights, table if is_weight_trained else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    words, offsets, weights, table = ctx.saved_tensors
    of_table = of_weights = None
    if ctx.needs_input_grad[1]:
        of_table = virtual_table_bags_backward(grad, words, offsets, weights, ctx.num_rows, ctx.is_residual)
    if ctx.needs_input_grad[3]:
        of_weights = virtual_table_bags_backward_weights(grad, words, table, offsets, ctx.is_residual)
    return None, of_table, None, of_weights, None


virtual_table_bags.register_autograd(_backward, setup_context=_setup_context)
