"""The torch operators of the GPU tiers: schema, shapes without data, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_compress.ops.gpu import cuda_kernels
from torchrec_compress.ops.gpu.task import Task
from torchrec_compress.ops.types import GATHERED, MEAN, RESIDUAL

# numbers per look-up of a plan (its codebooks, its hot rows or -1, flags) and of spans (first bag, bags, first id, ids)
PLAN, SPAN = 3, 4
_INPUTS = (
    "Tensor[] codes, Tensor[] codebooks, Tensor[] hot_rows, Tensor? ids, Tensor? offsets, Tensor? weights, "
    "int[] plan, SymInt[] spans, bool is_flat, str tier"
)


@torch.library.custom_op("torchrec_compress::codebook_bags_gpu", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def codebook_bags_gpu(
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor],
    ids: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    plan: Sequence[int],
    spans: Sequence[int],
    is_flat: bool,
    tier: str,
) -> Tensor:
    """Pool all look-ups; called by `codebook_bags`, which describes the arguments.

    Args:
        codes: per look-up, contiguous uint8, int16 or int32.
        codebooks: per table, contiguous float32, bfloat16 or float16, of one dtype.
        hot_rows: those that there are, in the dtype of codebooks.
        ids: (L,) int32 or int64, or None.
        offsets: (bags + 1,) int32 or int64, or None.
        weights: (L,) float32, or None.
        plan: three numbers per look-up: its table, its place in `hot_rows` or -1, and flags.
        spans: four numbers per look-up: first bag, bags, first id, ids.
        is_flat: whether outputs stand one after another instead of side by side.
        tier: "cuda" or "triton".

    Returns:
        (B, sum of D), or flat; dtype of `codebooks`.
    """
    tasks = _tasks(codes, codebooks, hot_rows, ids, offsets, weights, plan, spans)
    for task in tasks:
        task.check()
    out = codebooks[0].new_empty(_shape(codes, [books.shape[1] for books in codebooks], plan, spans, is_flat))
    outputs = _pieces(out, tasks, is_flat)
    if tier == "cuda":
        cuda_kernels.forward(tasks, outputs)
    else:
        from torchrec_compress.ops.gpu import triton_kernels

        for task, rows in zip(tasks, outputs, strict=True):
            triton_kernels.forward(task, rows)
    return out


@torch.library.custom_op(
    "torchrec_compress::codebook_bags_gpu_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, SymInt[] words, SymInt[] hot, bool[] wants) -> (Tensor[], Tensor[], Tensor)",
)
def codebook_bags_gpu_backward(
    grad: Tensor,
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor],
    ids: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    plan: Sequence[int],
    spans: Sequence[int],
    is_flat: bool,
    tier: str,
    words: Sequence[int],
    hot: Sequence[int],
    wants: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the gradients of codebooks, hot rows and weights; what is not named here is as in the forward.

    Args:
        grad: of the output.
        codebooks: empty where the gradient of weights is not wanted; so are `hot_rows`.
        words: two numbers per table: codewords in all, and columns of one.
        hot: rows of each table of hot rows.
        wants: of every table its codebooks, of every table of hot rows, and of the weights.

    Returns:
        One (M * K, width) per table, one (H, D) per table of hot rows, and (L,) float32; empty where not wanted.
    """
    if not codebooks:  # only their shapes are needed
        codebooks = [grad.new_empty(shape, device="meta") for shape in zip(words[::2], words[1::2], strict=True)]
        dims = _hot_dims(codes, words[1::2], len(hot), plan)
        hot_rows = [grad.new_empty(shape, device="meta") for shape in zip(hot, dims, strict=True)]
    tasks = _tasks(codes, codebooks, hot_rows, ids, offsets, weights, plan, spans)
    is_in_place = is_flat or grad.stride(1) == 1
    grads = _pieces(grad.contiguous() if is_flat or not is_in_place else grad, tasks, is_flat)
    of_weights = torch.zeros_like(weights) if weights is not None and wants[-1] else grad.new_empty(0)
    shapes = [tensor.shape for tensor in (*codebooks, *hot_rows)]
    run = _cuda_backward if tier == "cuda" else _triton_backward
    found = run(tasks, grads, plan, shapes[: len(codebooks)], shapes[len(codebooks) :], of_weights, wants)
    made = [
        grad.new_empty(0) if not wanted else grad.new_zeros(shape) if part is None else part
        for part, shape, wanted in zip(found, shapes, wants[:-1], strict=True)
    ]
    return made[: len(codebooks)], made[len(codebooks) :], of_weights


def _cuda_backward(
    tasks: list[Task],
    grads: list[Tensor],
    plan: Sequence[int],
    books: Sequence[Sequence[int]],
    hot: Sequence[Sequence[int]],
    of_weights: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of codebooks and of hot rows by the CUDA kernels; None for those that nothing looked up.

    Args:
        tasks: the look-ups.
        grads: (B, D) upstream gradient of each.
        plan: as in the operator.
        books: shapes of the codebooks.
        hot: shapes of the hot rows.
        of_weights: (L,) float32 zeros, filled where wanted.
        wants: as in the operator.
    """
    sums: list[Tensor | None] = [None] * (len(books) + len(hot))
    chosen = [number for number in range(len(tasks)) if wants[plan[PLAN * number]]]
    tables = [plan[PLAN * number] for number in chosen]
    found = cuda_kernels.backward_codebooks(
        [tasks[number] for number in chosen], [grads[number] for number in chosen], tables
    )
    for table, part in found.items():
        sums[table] = part
    for number, (task, grad) in enumerate(zip(tasks, grads, strict=True)):
        place = len(books) + plan[PLAN * number + 1]
        if task.hot_rows is not None and wants[place]:
            part, total = cuda_kernels.backward_hot_rows(task, grad), sums[place]
            sums[place] = part if total is None else total + part
    if wants[-1]:
        cuda_kernels.backward_weights(tasks, grads, of_weights)
    return sums


def _triton_backward(
    tasks: list[Task],
    grads: list[Tensor],
    plan: Sequence[int],
    books: Sequence[Sequence[int]],
    hot: Sequence[Sequence[int]],
    of_weights: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Return the same by the Triton kernels, which add in float32."""
    from torchrec_compress.ops.gpu import triton_kernels

    sums = [
        grads[0].new_zeros(shape, dtype=torch.float32) if wanted else None
        for shape, wanted in zip((*books, *hot), wants[:-1], strict=True)
    ]
    for number, (task, grad) in enumerate(zip(tasks, grads, strict=True)):
        table, place, _ = plan[PLAN * number : PLAN * (number + 1)]
        part = torch.empty_like(of_weights) if wants[-1] else None
        triton_kernels.backward(task, grad, sums[table], sums[len(books) + place] if place >= 0 else None, part)
        if part is not None:  # look-ups of one feature in two tables share their weights
            span = slice(task.first_id, task.first_id + task.num_ids)
            of_weights[span] += part[span]
    return [None if total is None else total.to(grads[0].dtype) for total in sums]


def _tasks(
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor],
    ids: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    plan: Sequence[int],
    spans: Sequence[int],
) -> list[Task]:
    found = []
    for number, table in enumerate(codes):
        book, hot, flags = plan[PLAN * number : PLAN * (number + 1)]
        first_bag, num_bags, first_id, num_ids = spans[SPAN * number : SPAN * (number + 1)]
        task = Task(
            codes=table,
            codebooks=codebooks[book],
            hot_rows=hot_rows[hot] if hot >= 0 else None,
            ids=None if flags & GATHERED else ids,
            offsets=None if offsets is None else offsets[first_bag : first_bag + num_bags + 1],
            weights=weights,
            num_bags=num_bags,
            first_id=first_id,
            num_ids=num_ids,
            residual=bool(flags & RESIDUAL),
            mean=bool(flags & MEAN),
        )
        found.append(task)
    return found


def _widths(codes: Sequence[Tensor], widths: Sequence[int], plan: Sequence[int]) -> list[int]:
    """Return the columns of every look-up's output; `widths` are those of the tables' codewords."""
    return [
        widths[plan[PLAN * number]] * (1 if plan[PLAN * number + 2] & RESIDUAL else table.shape[1])
        for number, table in enumerate(codes)
    ]


def _hot_dims(codes: Sequence[Tensor], widths: Sequence[int], num_hot: int, plan: Sequence[int]) -> list[int]:
    """Return the columns of every table of hot rows."""
    dims = [0] * num_hot
    for number, width in enumerate(_widths(codes, widths, plan)):
        if plan[PLAN * number + 1] >= 0:
            dims[plan[PLAN * number + 1]] = width
    return dims


def _shape(
    codes: Sequence[Tensor], widths: Sequence[int], plan: Sequence[int], spans: Sequence[int], is_flat: bool
) -> list[int]:
    columns, bags = _widths(codes, widths, plan), spans[1::SPAN]
    if is_flat:
        return [sum(width * num_bags for width, num_bags in zip(columns, bags, strict=True))]
    return [bags[0], sum(columns)]


def _pieces(whole: Tensor, tasks: list[Task], is_flat: bool) -> list[Tensor]:
    """Return every task's (B, D) part of an output or of its gradient."""
    dims = [task.dim for task in tasks]
    if not is_flat:
        return list(whole.split(dims, dim=1))
    parts = whole.split([task.num_bags * dim for task, dim in zip(tasks, dims, strict=True)])
    return [part.view(task.num_bags, dim) for part, task, dim in zip(parts, tasks, dims, strict=True)]


@codebook_bags_gpu.register_fake
def _(
    codes: Any,
    codebooks: Any,
    hot_rows: Any,
    ids: Any,
    offsets: Any,
    weights: Any,
    plan: Any,
    spans: Any,
    is_flat: bool,
    tier: str,
) -> Tensor:
    return codebooks[0].new_empty(_shape(codes, [books.shape[1] for books in codebooks], plan, spans, is_flat))


@codebook_bags_gpu_backward.register_fake
def _(
    grad: Tensor,
    codes: Any,
    codebooks: Any,
    hot_rows: Any,
    ids: Any,
    offsets: Any,
    weights: Any,
    plan: Any,
    spans: Any,
    is_flat: bool,
    tier: str,
    words: Any,
    hot: Any,
    wants: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    num_tables = len(words) // 2
    books = [
        grad.new_empty(shape if wanted else (0,))
        for *shape, wanted in zip(words[::2], words[1::2], wants[:num_tables], strict=True)
    ]
    dims = _hot_dims(codes, words[1::2], len(hot), plan)
    rows = [
        grad.new_empty(shape if wanted else (0,))
        for *shape, wanted in zip(hot, dims, wants[num_tables:-1], strict=True)
    ]
    return books, rows, grad.new_empty(0) if not wants[-1] else torch.empty_like(weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebooks, hot_rows, ids, offsets, weights, *ctx.plain = inputs
    ctx.num_codes, ctx.num_tables = len(codes), len(codebooks)
    ctx.words = [size for books in codebooks for size in books.shape]
    ctx.hot = [rows.shape[0] for rows in hot_rows]
    # values are needed for the gradient of weights only: without it, codebooks may change between forward and backward
    is_weight_trained = weights is not None and weights.requires_grad
    ctx.save_for_backward(ids, offsets, weights, *codes, *([*codebooks, *hot_rows] if is_weight_trained else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, offsets, weights, *rest = ctx.saved_tensors
    codes, tables = rest[: ctx.num_codes], rest[ctx.num_codes :]
    _, wants_books, wants_hot, _, _, wants_weights, *_ = ctx.needs_input_grad
    wants = [*wants_books, *wants_hot, bool(wants_weights)]
    of_books, of_hot, of_weights = torch.ops.torchrec_compress.codebook_bags_gpu_backward(
        grad, codes, tables[: ctx.num_tables], tables[ctx.num_tables :], ids, offsets, weights, *ctx.plain,
        ctx.words, ctx.hot, wants,
    )  # fmt: skip
    return (
        [None] * ctx.num_codes,
        [tensor if wanted else None for tensor, wanted in zip(of_books, wants_books, strict=True)],
        [tensor if wanted else None for tensor, wanted in zip(of_hot, wants_hot, strict=True)],
        None,
        None,
        of_weights if wants_weights else None,
        *[None] * len(ctx.plain),
    )


codebook_bags_gpu.register_autograd(_backward, setup_context=_setup_context)
