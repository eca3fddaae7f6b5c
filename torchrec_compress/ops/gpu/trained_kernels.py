"""The launches of the CUDA kernels of trained rows: the look-up, the gradient of weights, and the update."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from torchrec_compress.ops.gpu.driver import Launcher, driver_of
from torchrec_compress.ops.gpu.program import Program
from torchrec_compress.ops.trained import TrainedFormat, TrainedOptimizer, TrainedStep
from torchrec_compress.ops.trained_reference import Groups, wrong_gradient, wrong_state, wrong_values

_THREADS = 128  # of a block
_MOST_PASSES = 8  # columns of a thread of the look-up, as in cuda/trained_look_up.cuh
_INDEX_TYPES = {torch.int32: "int", torch.int64: "long long"}
# the faults of cuda/trained_update.cuh: a kind above so many bits of the id's number
_FAULT_SHIFT, _NO_FAULT = 60, 3
_OPTIMIZERS = get_args(TrainedOptimizer)


@dataclass(frozen=True)
class LookUpTables:
    """What decides which program looks up.

    Args:
        width: numbers of a row.
        bits: of a number.
        index: dtype of ids, int32 or int64.
        offset: dtype of offsets, int32 or int64.

    Example:
        >>> LookUpTables(20, 8, torch.int64, torch.int32).defines()["OFFSET"]
        'int'
    """

    width: int
    bits: int
    index: torch.dtype
    offset: torch.dtype

    def defines(self) -> dict[str, str | int]:
        """Return the constants, by name."""
        return {**_sizes(self.width, self.bits), "ID": _INDEX_TYPES[self.index], "OFFSET": _INDEX_TYPES[self.offset]}


@dataclass(frozen=True)
class UpdateTables:
    """What decides which program updates.

    Args:
        format: of rows and state.

    Example:
        >>> UpdateTables(TrainedFormat(20, 8, "adagrad", 8)).defines()["OPTIMIZER"]
        2
    """

    format: TrainedFormat

    def defines(self) -> dict[str, str | int]:
        """Return the constants, by name."""
        sizes = _sizes(self.format.width, self.format.bits)
        optimizer = _OPTIMIZERS.index(self.format.optimizer)
        return {**sizes, "OPTIMIZER": optimizer, "STATE_BITS": self.format.state_bits}


def _lanes(width: int) -> int:
    """Return the threads that share a row: 16, in which sums of squares are added, or what a narrower row has."""
    return min(16, 2 ** (width - 1).bit_length())


def _sizes(width: int, bits: int) -> dict[str, str | int]:
    lanes = _lanes(width)
    return {"ROW_WIDTH": width, "BITS": bits, "LANES": lanes, "GROUPS": _THREADS // lanes}


class BagsStruct(ctypes.Structure):
    """`Bags` of cuda/trained_look_up.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "ids", "offsets", "weights", "grads", "out")),
        *(
            (name, ctypes.c_longlong)
            for name in ("row_step", "num_rows", "num_ids", "num_bags", "grad_step", "is_mean")
        ),
    ]


class UpdateStruct(ctypes.Structure):
    """`Update` of cuda/trained_update.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "state", "ids", "starts", "bags", "factors", "grads")),
        *((name, ctypes.c_void_p) for name in ("new_rows", "new_state", "fault")),
        *((name, ctypes.c_longlong) for name in ("grad_step", "num_rows", "num_distinct", "first_id")),
        *((name, ctypes.c_ulonglong) for name in ("seed", "step")),
        *((name, ctypes.c_float) for name in ("rate", "eps", "beta1", "rest1", "beta2", "rest2", "correction")),
        ("unused", ctypes.c_float),
    ]


def _launcher(tensor: Tensor) -> Launcher:
    return driver_of(tensor.device.index or 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _laid_out(tensor: Tensor) -> Tensor:
    """Return a table or gradients with the columns of a row side by side; rows may lie apart."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _launch_bags(
    kernel: str,
    pieces: int,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grads: Tensor | None,
    out: Tensor,
    width: int,
    bits: int,
    is_mean: bool,
) -> None:
    """Launch a kernel of cuda/trained_look_up.cuh over the bags; the first, of which there are some."""
    rows, ids = _laid_out(rows), ids.contiguous()
    offsets, weights = (None if each is None else each.contiguous() for each in (offsets, weights))
    grads = None if grads is None else _laid_out(grads)
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    tables = LookUpTables(width, bits, ids.dtype, torch.int64 if offsets is None else offsets.dtype)
    struct = BagsStruct(
        rows=_address(rows),
        ids=_address(ids),
        offsets=_address(offsets),
        weights=_address(weights),
        grads=_address(grads),
        out=_address(out),
        row_step=rows.stride(0),
        num_rows=rows.shape[0],
        num_ids=ids.shape[0],
        num_bags=num_bags,
        grad_step=0 if grads is None else grads.stride(0),
        is_mean=is_mean and offsets is not None,
    )
    grid = (-(-num_bags * _lanes(width) // _THREADS), pieces, 1)
    _launcher(out).launch(Program("TRAINED_LOOK_UP", tables, ()), kernel, grid, _THREADS, 0, [struct])


def look_up(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    out: Tensor,
    width: int,
    bits: int,
    is_mean: bool,
) -> None:
    """Write the pooled rows into `out`, (B, r) float32; B is not 0."""
    pieces = -(-width // (_MOST_PASSES * _lanes(width)))
    _launch_bags("trained_bag_look_up", pieces, rows, ids, offsets, weights, None, out, width, bits, is_mean)


def weight_gradients(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    grads: Tensor,
    out: Tensor,
    width: int,
    bits: int,
    is_mean: bool,
) -> None:
    """Write the gradient of every id's weight into `out`, (L,) float32; L is not 0."""
    _launch_bags("trained_bag_weight_gradients", 1, rows, ids, offsets, None, grads, out, width, bits, is_mean)


def update(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grads: Tensor,
    format: TrainedFormat,
    is_mean: bool,
    step: TrainedStep,
    where: str,
) -> None:
    """Update rows and state in place; L is not 0, and states of 32 bits begin between floats.

    Raises:
        ValueError: a gradient is not finite, or a row or a state larger than the format holds; nothing is written.
    """
    groups = Groups.of(ids, offsets, weights, is_mean)
    num_distinct, grads = groups.ids.shape[0], _laid_out(grads)
    starts = torch.cat([groups.counts.new_zeros(1), groups.counts.cumsum(0)])
    new_rows, new_state = (table.new_empty(num_distinct, table.shape[1]) for table in (rows, state))
    fault = torch.full((1,), _NO_FAULT << _FAULT_SHIFT, dtype=torch.int64, device=rows.device)
    rate, correction = step.corrected() if format.has_moments else (step.learning_rate, 1.0)
    struct = UpdateStruct(
        rows=_address(rows),
        state=_address(state),
        ids=_address(groups.ids),
        starts=_address(starts),
        bags=_address(groups.bags),
        factors=_address(groups.factors),
        grads=_address(grads),
        new_rows=_address(new_rows),
        new_state=_address(new_state),
        fault=_address(fault),
        grad_step=grads.stride(0),
        num_rows=rows.shape[0],
        num_distinct=num_distinct,
        first_id=step.first_id,
        seed=step.seed,
        step=step.step,
        rate=rate,
        eps=step.eps,
        beta1=step.beta1,
        rest1=1 - step.beta1,
        beta2=step.beta2,
        rest2=1 - step.beta2,
        correction=correction,
    )
    launcher, program = _launcher(rows), Program("TRAINED_UPDATE", UpdateTables(format), ())
    grid = (-(-num_distinct * _lanes(format.width) // _THREADS), 1, 1)
    launcher.launch(program, "trained_bag_step", grid, _THREADS, 0, [struct])
    _refuse(int(fault), groups.ids, format, step, where)
    launcher.launch(program, "trained_bag_write", grid, _THREADS, 0, [struct])
    torch.autograd.graph.increment_version([table for table in (rows, state) if not table.is_inference()])


def _refuse(fault: int, ids: Tensor, format: TrainedFormat, step: TrainedStep, where: str) -> None:
    """Raise what an id is at fault for."""
    kind, number = fault >> _FAULT_SHIFT, fault & (1 << _FAULT_SHIFT) - 1
    if kind == _NO_FAULT:
        return
    row = int(ids[number]) + step.first_id
    raise ValueError(
        (
            wrong_gradient(where, row, step),
            wrong_state(where, row, format, step),
            wrong_values(where, row, format, step),
        )[kind]
    )
