"""The C++ operators' Python side: shapes without data, for torch.compile and torch.export, and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_compress.ops.types import ODD, PACKED, RESIDUAL

_PLAN = 4


def register() -> None:
    """Register shapes and gradients, once the library is loaded."""
    space = "torchrec_compress::"
    torch.library.register_fake(space + "codebook_bags", _fake)
    torch.library.register_fake(space + "codebook_bags_forward", _fake)
    torch.library.register_fake(space + "codebook_bags_backward", _fake_backward)
    torch.library.register_fake(space + "codebook_bags_backward_weights", _fake_backward_weights)
    torch.library.register_fake(space + "code_gather", _fake_gather)
    torch.library.register_autograd(space + "codebook_bags", _backward, setup_context=_setup_context)


def _widths(codes: list[Tensor], widths: list[int], plan: list[int]) -> list[int]:
    """Return the columns of every look-up's output; `widths` are those of the tables' codewords."""
    found = []
    for number, rows in enumerate(codes):
        table, _, flags, _ = plan[_PLAN * number : _PLAN * (number + 1)]
        num_codes = 2 * rows.shape[1] - bool(flags & ODD) if flags & PACKED else rows.shape[1]
        found.append(widths[table] * (1 if flags & RESIDUAL else num_codes))
    return found


def _fake(
    codes: list[Tensor],
    codebooks: list[Tensor],
    hot_rows: list[Tensor],
    ids: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    plan: list[int],
    bags: list[int],
    saved_bytes: int,
    is_flat: bool,
    names: str,
) -> tuple[Tensor, Tensor]:
    widths = _widths(codes, [books.shape[1] for books in codebooks], plan)
    if is_flat:
        shape = [sum(width * num_bags for width, num_bags in zip(widths, bags[1::2], strict=True))]
    else:
        shape = [bags[1], sum(widths)]
    num_ids = ids.shape[0] if saved_bytes and ids is not None else 0
    return codebooks[0].new_empty(shape), codebooks[0].new_empty((num_ids, saved_bytes), dtype=torch.uint8)


def _fake_backward(
    grad: Tensor,
    codes: list[Tensor],
    saved: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    plan: list[int],
    bags: list[int],
    is_flat: bool,
    words: list[int],
    hot: list[int],
    wants: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    dims = [0] * len(hot)
    for number, width in enumerate(_widths(codes, words[1::2], plan)):
        if plan[_PLAN * number + 1] >= 0:
            dims[plan[_PLAN * number + 1]] = width
    num_tables = len(words) // 2
    of_books = [
        grad.new_empty(num_words if wanted else 0, width)
        for num_words, width, wanted in zip(words[::2], words[1::2], wants[:num_tables], strict=True)
    ]
    of_rows = [
        grad.new_empty(num_hot if wanted else 0, dim)
        for num_hot, dim, wanted in zip(hot, dims, wants[num_tables:], strict=True)
    ]
    return of_books, of_rows


def _fake_backward_weights(
    grad: Tensor,
    codes: list[Tensor],
    saved: Tensor,
    codebooks: list[Tensor],
    hot_rows: list[Tensor],
    offsets: Tensor | None,
    weights: Tensor,
    plan: list[int],
    bags: list[int],
    is_flat: bool,
) -> Tensor:
    return torch.empty_like(weights)


def _fake_gather(codes: Tensor, ids: Tensor, row_bytes: int, where: str) -> Tensor:
    return codes.new_empty((ids.shape[0], row_bytes), dtype=torch.uint8)


def _save(ctx: Any, inputs: tuple[Any, ...], saved: Tensor) -> None:
    codes, codebooks, hot_rows, _, offsets, weights, plan, bags, _, is_flat, _ = inputs
    ctx.plan, ctx.bags, ctx.is_flat, ctx.num_codes = plan, bags, is_flat, len(codes)
    ctx.words = [size for books in codebooks for size in books.shape]
    ctx.hot = [rows.shape[0] for rows in hot_rows]
    # values are needed for the gradient of weights only: without it, codebooks may change between forward and backward
    is_weight_trained = weights is not None and weights.requires_grad
    tables = [*codebooks, *hot_rows] if is_weight_trained else []
    ctx.save_for_backward(saved, offsets, weights, *codes, *tables)


def _gradients(
    ctx: Any, grad: Tensor, wants: list[int], wants_weights: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of codebooks and, behind them, of hot rows; and that of weights."""
    saved, offsets, weights = ctx.saved_tensors[:3]
    codes, tables = ctx.saved_tensors[3 : 3 + ctx.num_codes], ctx.saved_tensors[3 + ctx.num_codes :]
    of_tables: list[Tensor | None] = [None] * len(wants)
    of_weights: Tensor | None = None
    ops, where = torch.ops.torchrec_compress, (ctx.plan, ctx.bags, ctx.is_flat)
    if any(wants):
        found = ops.codebook_bags_backward.default(
            grad, codes, saved, offsets, weights, *where, ctx.words, ctx.hot, wants
        )
        of_tables = [tensor if want else None for tensor, want in zip((*found[0], *found[1]), wants, strict=True)]
    if wants_weights:
        books, hot_rows = tables[: len(ctx.words) // 2], tables[len(ctx.words) // 2 :]
        of_weights = ops.codebook_bags_backward_weights.default(
            grad, codes, saved, books, hot_rows, offsets, weights, *where
        )
    return of_tables, of_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, _grad_saved: Tensor | None) -> tuple[Any, ...]:
    _, wants_books, wants_hot, _, _, wants_weights, *_ = ctx.needs_input_grad
    of_tables: list[Tensor | None] = [None] * (len(wants_books) + len(wants_hot))
    of_weights = None
    if grad is not None:
        of_tables, of_weights = _gradients(ctx, grad, [*map(int, wants_books), *map(int, wants_hot)], wants_weights)
    of_books, of_hot = of_tables[: len(wants_books)], of_tables[len(wants_books) :]
    return [None] * ctx.num_codes, of_books, of_hot, None, None, of_weights, None, None, None, None, None


class EagerCodebookBags(torch.autograd.Function):
    """The operator and its gradients outside of torch.compile.

    The gradients that torch.library adds to an operator walk over all arguments in Python, again and again, and pass
    every call through Python: with lists of tensors this takes as long as the kernels of a small batch.
    """

    @staticmethod
    def forward(ctx: Any, inputs: tuple[Any, ...], weights: Tensor | None, *tables: Tensor) -> Tensor:
        """Return the pooled rows.

        Args:
            ctx: what the backward is given.
            inputs: the operator's.
            weights: as in `inputs`.
            tables: codebooks and hot rows, as in `inputs`.
        """
        out, saved = torch.ops.torchrec_compress.codebook_bags_forward.default(*inputs)
        _save(ctx, inputs, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of weights and tables."""
        _, wants_weights, *wants = ctx.needs_input_grad
        of_tables, of_weights = _gradients(ctx, grad, [*map(int, wants)], wants_weights)
        return None, of_weights, *of_tables
