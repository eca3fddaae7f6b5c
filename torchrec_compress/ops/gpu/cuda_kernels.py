"""The launches of the CUDA kernels: forward, and the gradients of codebooks, hot rows and weights."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchrec_compress.ops.gpu.driver import Launcher, driver_of
from torchrec_compress.ops.gpu.plan import GradientPlan, gradient_plan, pool_plan
from torchrec_compress.ops.gpu.program import Program, Signature
from torchrec_compress.ops.gpu.segments import hot_segments
from torchrec_compress.ops.gpu.task import (
    MAX_LOOKUPS,
    LookupStruct,
    LookupStructs,
    Task,
    describe,
    launches,
    word_alignment,
)


def _launcher(tensor: Tensor) -> Launcher:
    return driver_of(tensor.device.index or 0)


def _packed(structs: Sequence[LookupStruct]) -> Any:
    return LookupStructs(*structs)


def _pool(
    purpose: str, launcher: Launcher, tasks: Sequence[Task], rows: Sequence[Tensor], results: Sequence[int]
) -> None:
    """Launch a kernel of cuda/pool.cuh for every group of like look-ups."""
    for signature, numbers in launches(tasks):
        mine = [tasks[number] for number in numbers]
        plan = pool_plan(
            signature,
            purpose,
            launcher.device,
            alignment=math.gcd(*(word_alignment(tasks[number], rows[number]) for number in numbers)),
            code_alignment=math.gcd(*(task.codes.data_ptr() for task in mine)) or 16,
            num_lookups=len(mine),
            most_bags=max(task.num_bags for task in mine),
            ids_per_bag=sum(task.num_ids for task in mine) / sum(task.num_bags for task in mine),
        )
        structs = _packed([describe(tasks[number], rows[number], results[number]) for number in numbers])
        kernel = "codebook_bag_" + purpose.lower()
        grid = (plan.grid[0], len(mine), plan.grid[1])
        arguments = [structs, ctypes.c_int(plan.tile_bags)]
        launcher.launch(plan.program, kernel, grid, plan.threads, plan.shared_bytes, arguments)


def forward(tasks: Sequence[Task], outputs: Sequence[Tensor]) -> None:
    """Pool the bags of every task into its (B, D) of `outputs`, whose columns are side by side."""
    if tasks:
        _pool("FORWARD", _launcher(outputs[0]), tasks, outputs, [0] * len(tasks))


def backward_weights(tasks: Sequence[Task], grads: Sequence[Tensor], weights: Tensor) -> None:
    """Add the gradient of the weights, (L of the batch,) float32, from (B, D) upstream gradients.

    Tasks that share ids are told apart, so that every sum is taken in the order of the tasks.
    """
    parts = [weights.new_empty(task.num_ids) for task in tasks]
    # the kernel reads no weights
    bare = [replace(task, weights=None) for task in tasks]
    if tasks:
        _pool("BACKWARD_WEIGHTS", _launcher(weights), bare, grads, [part.data_ptr() for part in parts])
    for task, part in zip(tasks, parts, strict=True):
        weights[task.first_id : task.first_id + task.num_ids] += part


def backward_codebooks(tasks: Sequence[Task], grads: Sequence[Tensor], table_of: Sequence[int]) -> dict[int, Tensor]:
    """Return the gradients of codebooks by table, as codebooks are stored; tables without a bag are left out.

    Args:
        tasks: the look-ups.
        grads: (B, D) upstream gradient of each.
        table_of: number of each one's codebooks; look-ups of one table are added up in their order.
    """
    partial: dict[int, list[Tensor]] = {}
    owner: dict[int, tuple[Program, Task]] = {}
    for signature, numbers in launches(tasks):
        launcher = _launcher(grads[numbers[0]])
        most_bags = max(tasks[number].num_bags for number in numbers)
        plan = gradient_plan(signature, launcher.device, len(numbers), most_bags)
        found = _partials(launcher, plan, signature, tasks, grads, numbers)
        for number, part in zip(numbers, found, strict=True):
            partial.setdefault(table_of[number], []).append(part)
            owner[table_of[number]] = plan.program, tasks[number]
    return _reduce(partial, owner)


def _partials(
    launcher: Launcher,
    plan: GradientPlan,
    signature: Signature,
    tasks: Sequence[Task],
    grads: Sequence[Tensor],
    numbers: Sequence[int],
) -> Tensor:
    """Return the gradients of one group: (look-ups, chunks, K, M * width) float32."""
    shape = (len(numbers), plan.num_chunks, signature.codebook_size, signature.num_codes * signature.width)
    parts = grads[0].new_empty(shape, dtype=torch.float32)
    structs = _packed(
        [describe(tasks[number], grads[number], part.data_ptr()) for number, part in zip(numbers, parts, strict=True)]
    )
    grid = (plan.num_chunks, len(numbers), plan.num_pieces)
    arguments = [structs, ctypes.c_longlong(plan.chunk_bags)]
    launcher.launch(plan.program, "codebook_bag_backward", grid, plan.threads, plan.shared_bytes, arguments)
    return parts


def _reduce(partial: dict[int, list[Tensor]], owner: dict[int, tuple[Program, Task]]) -> dict[int, Tensor]:
    """Add up partial gradients, table by table."""
    whole = {table: parts[0] if len(parts) == 1 else torch.cat(parts) for table, parts in partial.items()}
    sums = {}
    for table, parts in whole.items():
        books = owner[table][1].codebooks  # maybe a shape alone, without data
        sums[table] = parts.new_empty(books.shape, dtype=books.dtype)
    for program in dict.fromkeys(program for program, _ in owner.values()):
        tables = [table for table, (own, _) in owner.items() if own == program]
        for first in range(0, len(tables), MAX_LOOKUPS):
            mine = tables[first : first + MAX_LOOKUPS]
            structs = _packed(
                [describe(owner[t][1], None, whole[t].data_ptr(), sums[t].data_ptr(), whole[t].shape[0]) for t in mine]
            )
            launcher = _launcher(sums[mine[0]])
            grid = (-(-sums[mine[0]].numel() // 256), len(mine), 1)
            launcher.launch(program, "codebook_bag_reduce", grid, 256, 0, [structs])
    return sums


def backward_hot_rows(task: Task, grad: Tensor) -> Tensor:
    """Return the gradient of a task's hot rows, (H, D) in their dtype, from its (B, D) upstream gradient.

    Ids are sorted by hot row, and rows are added up in segments of limited length, so that one very hot row does not
    keep everyone waiting; no atomics, so the bits do not change from run to run.
    """
    assert task.hot_rows is not None
    out = grad.new_empty(task.hot_rows.shape, dtype=task.hot_rows.dtype)
    if task.num_hot == 0:
        return out
    launcher, program = _launcher(grad), Program("HOT_ROWS", task.signature, ())
    hot = torch.empty(task.num_ids, dtype=torch.int32, device=grad.device)
    bags = torch.empty_like(hot)
    structs = _packed([describe(task, grad, hot.data_ptr(), bags.data_ptr())])
    if task.num_bags:
        grid = (-(-task.num_bags // 8), 1, 1)
        launcher.launch(program, "codebook_bag_hot_index", grid, 256, 0, [structs])
    order, bounds, firsts = hot_segments(hot, task.num_hot)
    num_segments = len(bounds) - 1
    sums = torch.empty(num_segments, task.dim, dtype=torch.float32, device=grad.device)
    threads = min(1024, -(-task.dim // 32) * 32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (order, bounds, sums)]
    launcher.launch(program, "codebook_bag_sum_segments", (num_segments, 1, 1), threads, 0, [structs, *pointers])
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (sums, firsts, out)]
    launcher.launch(program, "codebook_bag_sum_hot_rows", (task.num_hot, 1, 1), threads, 0, pointers)
    return out
