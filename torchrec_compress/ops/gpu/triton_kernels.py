"""The Triton kernels: one look-up a launch, portable, without shared memory. Imported only where they serve.

A program owns a few bags and walks over their ids with a tile of one codeword per row, [M, width]: the compiler then
sees that neighbouring columns lie side by side and reads a codeword with one vector load per lane. The gradients of
codebooks and hot rows are added with atomics, in an order that changes from run to run.

Letters: M codes per id, K codewords per codebook, W columns per codeword, D columns of the output.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore
import triton.language as tl  # pyright: ignore
from torch import Tensor

from torchrec_compress.ops.gpu.task import Task

# assertions on the device stay, as in torch's own kernels; checks of every sum for overflow do not
OPTIONS = {"debug": True, "sanitize_overflow": False}
# numbers that change from batch to batch: without this, a kernel is compiled anew whenever one of them becomes 1 or is
# a multiple of 16 or not
_CHANGING = ["num_bags", "first_id", "num_ids", "num_rows", "num_hot", "first_size"]


@triton.jit
def _codewords(
    codes: tl.tensor, ids: tl.tensor, i: tl.tensor, first_id: tl.tensor, num_rows: tl.tensor, num_hot: tl.tensor,
    first_size: tl.tensor, m: tl.tensor, w: tl.tensor, M: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    RESIDUAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_HOT: tl.constexpr,
) -> Any:  # fmt: skip
    """Return the places of an id's codewords, [M, W], which of them count, and whether they are those of a hot row."""
    if HAS_IDS:
        row = tl.load(ids + i).to(tl.int64)
        tl.device_assert((row >= 0) & (row < num_rows), "codebook_bag: every id must be a row of the code table")
    else:
        row = i - first_id
    mask = (m < M)[:, None] & (w < W)[None, :]
    code = tl.load(codes + row * M + m, mask=m < M, other=0).to(tl.int32)
    tl.device_assert((code >= 0) & (code < K), "codebook_bag: every code must be in [0, K)")
    words = m * K + code
    if M * K * W >= 2**31:
        words = words.to(tl.int64)
    places = words[:, None] * W + w[None, :]
    is_hot = False
    if HAS_HOT:
        number = tl.load(codes + row * M).to(tl.int64) - first_size
        is_hot = number >= 0
        if is_hot:
            for digit in range(1, M):
                next_number = number * K + tl.load(codes + row * M + digit).to(tl.int64)
                number = tl.where(number < num_hot, next_number, number)
            tl.device_assert(number < num_hot, "codebook_bag: every escape code must be a hot row")
        # a hot row is one codeword of residual codes
        chunk = 0 if RESIDUAL else m[:, None] * W
        hot_places = number * (W if RESIDUAL else M * W) + chunk + w[None, :]
        places = tl.where(is_hot, hot_places, places.to(tl.int64))
        if RESIDUAL:
            mask = mask & ((m[:, None] == 0) | (is_hot == 0))
    return places, mask, is_hot


@triton.jit
def _bounds(
    offsets: tl.tensor, bag: tl.tensor, first_id: tl.tensor, HAS_OFFSETS: tl.constexpr,
) -> Any:  # fmt: skip
    """Return where a bag's ids begin and end."""
    if HAS_OFFSETS:
        begin = tl.load(offsets + bag).to(tl.int64)
        end = tl.load(offsets + bag + 1).to(tl.int64)
    else:
        begin = (first_id + bag).to(tl.int64)
        end = begin + 1
    return begin, end


@triton.jit(do_not_specialize=_CHANGING)
def forward_kernel(
    codes: tl.tensor, ids: tl.tensor, offsets: tl.tensor, weights: tl.tensor, codebooks: tl.tensor,
    hot_rows: tl.tensor, out: tl.tensor, row_stride: tl.tensor, num_bags: tl.tensor, first_id: tl.tensor,
    num_ids: tl.tensor, num_rows: tl.tensor, num_hot: tl.tensor, first_size: tl.tensor, M: tl.constexpr,
    K: tl.constexpr, W: tl.constexpr, RESIDUAL: tl.constexpr, MEAN: tl.constexpr, HAS_HOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BAGS: tl.constexpr,
) -> None:  # fmt: skip
    """Pool BAGS bags: sums in float32, stored in the dtype of `out`."""
    m = tl.arange(0, BLOCK_M)
    w = tl.arange(0, BLOCK_W)
    for step in range(BAGS):
        bag = tl.program_id(0).to(tl.int64) * BAGS + step
        if bag < num_bags:
            begin, end = _bounds(offsets, bag, first_id, offsets is not None)  # pyright: ignore
            tl.device_assert(
                (begin >= first_id) & (begin <= end) & (end - first_id <= num_ids),
                "codebook_bag: offsets must not decrease and must lie among the ids of their feature",
            )
            sums = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
            for i in tl.range(begin, end, loop_unroll_factor=4):
                places, mask, is_hot = _codewords(  # pyright: ignore
                    codes, ids, i, first_id, num_rows, num_hot, first_size, m, w,
                    M, K, W, RESIDUAL, ids is not None, HAS_HOT,
                )  # fmt: skip
                words = codebooks + places
                if HAS_HOT:
                    words = tl.where(is_hot, hot_rows + places, words)
                values = tl.load(words, mask=mask, other=0.0).to(tl.float32)
                if weights is not None:
                    values *= tl.load(weights + i)
                sums += values
            if MEAN:
                sums /= tl.maximum(end - begin, 1).to(tl.float32)
            row = out + bag * row_stride
            if RESIDUAL:
                tl.store(row + w, tl.sum(sums, 0).to(out.dtype.element_ty), mask=w < W)
            else:
                columns = m[:, None] * W + w[None, :]
                kept = (m < M)[:, None] & (w < W)[None, :]
                tl.store(row + columns, sums.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=[name for name in _CHANGING if name != "num_ids"])
def backward_kernel(
    codes: tl.tensor, ids: tl.tensor, offsets: tl.tensor, weights: tl.tensor, codebooks: tl.tensor,
    hot_rows: tl.tensor, grad: tl.tensor, grad_codebooks: tl.tensor, grad_hot_rows: tl.tensor,
    grad_weights: tl.tensor, row_stride: tl.tensor, num_bags: tl.tensor, first_id: tl.tensor, num_rows: tl.tensor,
    num_hot: tl.tensor, first_size: tl.tensor, M: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    RESIDUAL: tl.constexpr, MEAN: tl.constexpr, HAS_HOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    BAGS: tl.constexpr,
) -> None:  # fmt: skip
    """Add the gradients of BAGS bags to float32 buffers; one that is None is not wanted."""
    m = tl.arange(0, BLOCK_M)
    w = tl.arange(0, BLOCK_W)
    chunk = 0 if RESIDUAL else m[:, None] * W
    kept = (m < M)[:, None] & (w < W)[None, :]
    for step in range(BAGS):
        bag = tl.program_id(0).to(tl.int64) * BAGS + step
        if bag < num_bags:
            begin, end = _bounds(offsets, bag, first_id, offsets is not None)  # pyright: ignore
            upstream = tl.load(grad + bag * row_stride + chunk + w[None, :], mask=kept, other=0.0).to(tl.float32)
            if MEAN:
                upstream /= tl.maximum(end - begin, 1).to(tl.float32)
            for i in range(begin, end):
                places, mask, is_hot = _codewords(  # pyright: ignore
                    codes, ids, i, first_id, num_rows, num_hot, first_size, m, w,
                    M, K, W, RESIDUAL, ids is not None, HAS_HOT,
                )  # fmt: skip
                if grad_weights is not None:
                    words = codebooks + places
                    if HAS_HOT:
                        words = tl.where(is_hot, hot_rows + places, words)
                    values = tl.load(words, mask=mask, other=0.0).to(tl.float32)
                    tl.store(grad_weights + i, tl.sum(tl.sum(values * upstream, 1), 0))
                part = upstream
                if weights is not None:
                    part = upstream * tl.load(weights + i)
                if grad_codebooks is not None:
                    tl.atomic_add(grad_codebooks + places, part, mask=mask & (is_hot == 0), sem="relaxed")
                if grad_hot_rows is not None:
                    tl.atomic_add(grad_hot_rows + places, part, mask=mask & is_hot, sem="relaxed")


def constants(task: Task) -> dict[str, Any]:
    """Return a task's compile-time constants and options: the tile's sides are powers of two.

    Args:
        task: the look-up.

    Returns:
        M, K, W, RESIDUAL, MEAN, HAS_HOT, BLOCK_M, BLOCK_W, BAGS, num_warps.
    """
    signature = task.signature
    sides = [2 ** (side - 1).bit_length() for side in (signature.num_codes, signature.width)]
    return {
        "M": signature.num_codes,
        "K": signature.codebook_size,
        "W": signature.width,
        "RESIDUAL": signature.residual,
        "MEAN": signature.mean,
        "HAS_HOT": signature.has_hot,
        "BLOCK_M": sides[0],
        "BLOCK_W": sides[1],
        # short bags share a program
        "BAGS": 1 if task.num_ids > 8 * task.num_bags else 8,
        "num_warps": min(8, max(1, sides[0] * sides[1] // 256)),
    }


def forward(task: Task, out: Tensor) -> None:
    """Pool the bags of a task into its (B, D) output, whose columns are side by side."""
    if task.num_bags == 0:
        return
    chosen, kernel = constants(task), _launchable(forward_kernel)
    kernel[(triton.cdiv(task.num_bags, chosen["BAGS"]),)](
        *_inputs(task), out, out.stride(0), task.num_bags, task.first_id, task.num_ids, *_sizes(task),
        **chosen, **OPTIONS,
    )  # fmt: skip


def backward(
    task: Task, grad: Tensor, codebooks: Tensor | None, hot_rows: Tensor | None, weights: Tensor | None
) -> None:
    """Add a task's gradients to those given.

    Args:
        task: the look-up.
        grad: (B, D) upstream gradient, columns side by side.
        codebooks: (M * K, width) float32 gradient, or None.
        hot_rows: (H, D) float32 gradient, or None.
        weights: (L of the batch,) float32; the entries of the task's ids are overwritten. Or None.
    """
    if task.num_bags == 0:
        return
    chosen, inputs, kernel = constants(task), _inputs(task), _launchable(backward_kernel)
    if weights is None:  # codewords and hot rows are not read
        inputs = (*inputs[:4], None, None)
    kernel[(triton.cdiv(task.num_bags, chosen["BAGS"]),)](
        *inputs, grad, codebooks, hot_rows, weights, grad.stride(0), task.num_bags, task.first_id,
        *_sizes(task), **chosen, **OPTIONS,
    )  # fmt: skip


def _launchable(kernel: Any) -> Any:
    """Return a kernel as what the decorator made of it; a type checker sees the function."""
    return kernel


def _inputs(task: Task) -> tuple[Tensor | None, ...]:
    return task.codes, task.ids, task.offsets, task.weights, task.codebooks, task.hot_rows


def _sizes(task: Task) -> tuple[int, int, int]:
    return task.codes.shape[0], task.num_hot, task.first_size
