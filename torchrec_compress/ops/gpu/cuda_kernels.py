"""The launches of the CUDA kernels: forward, and the gradients of codebooks, hot rows and weights."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchrec_compress.ops.gpu.plan import Device, GradientPlan, gradient_plan, pool_plan
from torchrec_compress.ops.gpu.program import Program, Signature, compile_program
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

Grid = tuple[int, int, int]


class Launcher(Protocol):
    """What starts kernels: a GPU's driver, or in tests an emulation."""

    device: Device

    def launch(
        self, program: Program, kernel: str, grid: Grid, threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        """Start `kernel` of a program with ctypes values as arguments."""
        ...


class Driver:
    """Starts kernels on a GPU, in torch's current stream.

    Args:
        index: of the GPU.
    """

    def __init__(self, index: int) -> None:
        found = torch.cuda.get_device_properties(index)
        self.device = Device(
            capability=(found.major, found.minor),
            num_sms=found.multi_processor_count,
            block_bytes=found.shared_memory_per_block_optin,
            sm_bytes=found.shared_memory_per_multiprocessor,
        )
        self._index = index
        self._modules: dict[Program, Any] = {}
        self._functions: dict[tuple[Program, str], Any] = {}

    def launch(
        self, program: Program, kernel: str, grid: Grid, threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        """Start `kernel` of a program; the first time compiles and loads it."""
        from cuda.bindings import driver  # pyright: ignore

        with torch.cuda.device(self._index):
            function = self._function(program, kernel)
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
            stream = torch.cuda.current_stream().cuda_stream
            _checked(
                driver.cuLaunchKernel(
                    function, *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
                )
            )

    def _function(self, program: Program, kernel: str) -> Any:
        from cuda.bindings import driver  # pyright: ignore

        if (program, kernel) not in self._functions:
            if program not in self._modules:
                code = compile_program(program, self.device.capability)
                torch.cuda.current_stream()  # makes torch's context the current one
                self._modules[program] = _checked(driver.cuModuleLoadData(code))
            self._functions[program, kernel] = _checked(
                driver.cuModuleGetFunction(self._modules[program], kernel.encode())
            )
        return self._functions[program, kernel]


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a call of the driver returns, or raise RuntimeError with its status."""
    status, *rest = answer
    if int(status) != 0:
        raise RuntimeError(f"codebook_bag: the CUDA driver must answer CUDA_SUCCESS, got {status}")
    return rest[0] if rest else None


@functools.cache
def driver_of(index: int) -> Launcher:
    """Return the driver of a GPU.

    Example:
        >>> driver_of(0).device  # doctest: +SKIP
        Device(capability=(9, 0), num_sms=132, block_bytes=232448, sm_bytes=233472)
    """
    return Driver(index)


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
    parts: list[Tensor] = [torch.empty_like(weights) for _ in tasks]
    # the kernel reads no weights
    bare = [Task(**{**vars(task), "weights": None}) for task in tasks]
    if tasks:
        _pool("BACKWARD_WEIGHTS", _launcher(weights), bare, grads, [part.data_ptr() for part in parts])
    for task, part in zip(tasks, parts, strict=True):
        span = slice(task.first_id, task.first_id + task.num_ids)
        weights[span] += part[span]


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
    sums = {table: torch.empty_like(owner[table][1].codebooks, device=parts.device) for table, parts in whole.items()}
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
    out = torch.empty_like(task.hot_rows, device=grad.device)
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
