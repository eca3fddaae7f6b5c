"""Trained rows of few bits, looked up and pooled in one pass, and updated in one pass where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_compress.ops import trained_reference
from torchrec_compress.ops.checks import check_index, check_one_device, check_weight_count
from torchrec_compress.ops.cpp.trained import cpp_look_up, cpp_update, cpp_weight_gradients
from torchrec_compress.ops.dispatch import cpp_serves, cuda_serves
from torchrec_compress.ops.gpu.trained import cuda_look_up, cuda_update, cuda_weight_gradients
from torchrec_compress.ops.ids import check_ids
from torchrec_compress.ops.pooling import as_factors, check_offsets, check_weights
from torchrec_compress.ops.trained import TrainedFormat, TrainedStep, check_rows

# a step, or what is asked for it when the gradients are there, around the update; None: there is none
Step = TrainedStep | Callable[[], AbstractContextManager[TrainedStep | None]]


def trained_bag(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    format: TrainedFormat,
    *,
    weights: Tensor | None = None,
    is_mean: bool = False,
    step: Step | None,
    where: str,
    backend: str | None = None,
) -> Tensor:
    """Sum, bag by bag, trained rows of one table; the backward updates them.

    As with FBGEMM's fused tables the gradient of the rows is not returned, it is applied: the backward updates rows and
    state in place, see `update_trained`, and returns a gradient for weights alone. A backward that is run again through
    a kept graph updates again. Without a step, or gradients, rows are only looked up. Inputs may be views.

    Args:
        rows: (N, bytes per row) uint8, see `encode_trained`; contiguous where there is a step.
        state: (N, bytes per state) uint8, zeros before the first step; contiguous where there is a step.
        ids: (L,) int32 or int64 rows of the table.
        offsets: (B + 1,) int32 or int64, from 0 up to L; bag b is the ids [offsets[b], offsets[b + 1]). None: every id
            is a bag of its own.
        format: of rows and state.
        weights: (L,) floating point factors of the ids, or None.
        is_mean: whether sums are divided by the ids of a bag.
        step: what the update needs to know, or a function that returns a context manager of it, entered in the
            backward around the update; None, or one of None: no update.
        where: names the table in errors.
        backend: see `requested_backend`; "fbgemm", "triton" and "torch" are the PyTorch reference.

    Returns:
        (B, r) float32; an empty bag is zeros.

    Raises:
        ValueError: types, devices, shapes or layout do not fit; an id is out of range, a weight not finite, or offsets
            decrease or do not run from 0 to L (on a GPU assertions there). In the backward: as `update_trained`.
        RuntimeError: `backend` cannot be had.

    Example:
        >>> from torchrec_compress.ops import encode_trained
        >>> form = TrainedFormat(2, 8, "sgd")
        >>> rows, state = encode_trained(torch.tensor([[127.0, 0.0]]), form), torch.zeros(1, 0, dtype=torch.uint8)
        >>> step = TrainedStep(learning_rate=1.0, eps=0.0, seed=0, step=0)
        >>> bags = trained_bag(rows, state, torch.tensor([0]), None, form, step=step, where="table 'user'")
        >>> bags.backward(torch.tensor([[7.0, -3.0]]))
        >>> rows.tolist()  # numbers and the code of the scale
        [[120, 3, 200]]
    """
    _check(rows, state, ids, offsets, weights, format, where)
    factors = None if weights is None else as_factors(weights, torch.float32, where)
    if step is not None:
        _check_written(rows, state, where)
        _check_step(step, where)
    given = _Given(rows, state, ids, offsets, format, is_mean, step, where, _serving(rows, backend))
    if torch.is_grad_enabled() and (step is not None or (factors is not None and factors.requires_grad)):
        return _TrainedBag.apply(rows.new_empty(0, dtype=torch.float32).requires_grad_(), factors, given)
    return _look_up(given, factors)


def update_trained(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    grads: Tensor,
    format: TrainedFormat,
    *,
    weights: Tensor | None = None,
    is_mean: bool = False,
    step: TrainedStep,
    where: str,
    backend: str | None = None,
) -> None:
    """Update the rows of a batch in place, and round them by a dither whose mean is no change.

    The gradients of an id are summed in the order of the batch, then, unless they sum to zero, it is updated once: by
    x -= lr g ("sgd"); by s += mean(g^2), x -= lr g / (sqrt(s) + eps) ("rowwise_adagrad"), or so with a sum for every
    number ("adagrad"); by m += (1 - beta1) (g - m), v += (1 - beta2) (g^2 - v), x -= lr m' / (sqrt(v') + eps), where
    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t) and t is the step's number plus one ("adam"), or so with one v of
    mean(g^2) ("partial_rowwise_adam"). These are FBGEMM's EXACT_SGD, EXACT_ROWWISE_ADAGRAD, EXACT_ADAGRAD, ADAM and
    PARTIAL_ROWWISE_ADAM: of ids that a batch lacks, moments stay as they are. The bits written are the same on every
    device, for any number of threads, and for a shard those of the whole table.

    Args:
        grads: (B, r) float32 of the bags; everything else is as in `trained_bag`.

    Raises:
        ValueError: as `trained_bag`; or a gradient is not finite, or a row or a state is larger than the format holds,
            named with its id and the step. Then no byte has been written.
        RuntimeError: `backend` cannot be had.

    Example:
        >>> form = TrainedFormat(2, 8)
        >>> rows, state = torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8)
        >>> step = TrainedStep(learning_rate=0.1, eps=1e-8, seed=0, step=0)
        >>> update_trained(rows, state, torch.tensor([0]), None, torch.ones(1, 2), form, step=step, where="table 't'")
        >>> state.view(torch.float32).item()
        1.0
    """
    _check(rows, state, ids, offsets, weights, format, where)
    _check_written(rows, state, where)
    _check_step(step, where)
    factors = None if weights is None else as_factors(weights, torch.float32, where)
    given = _Given(rows, state, ids, offsets, format, is_mean, step, where, _serving(rows, backend))
    with torch.no_grad():
        _update(given, factors, grads, step)


class _Given(NamedTuple):
    """A look-up's arguments, but for the weights."""

    rows: Tensor
    state: Tensor
    ids: Tensor
    offsets: Tensor | None
    format: TrainedFormat
    is_mean: bool
    step: Step | None
    where: str
    serving: str  # "cpp", "cuda" or "torch"


def _serving(rows: Tensor, backend: str | None) -> str:
    if rows.is_cpu and cpp_serves(backend):
        return "cpp"
    return "cuda" if rows.is_cuda and cuda_serves(backend) else "torch"


def _look_up(given: _Given, factors: Tensor | None) -> Tensor:
    rows, _, ids, offsets, format, is_mean, _, where, serving = given
    if serving != "torch":
        look_up = cpp_look_up if serving == "cpp" else cuda_look_up
        return look_up(rows, ids, offsets, factors, format, is_mean, where)
    _check_values(given, factors)
    return trained_reference.look_up(rows, ids, offsets, factors, format, is_mean)


def _weight_gradients(given: _Given, grads: Tensor) -> Tensor:
    rows, _, ids, offsets, format, is_mean, _, where, serving = given
    if serving != "torch":
        gradients = cpp_weight_gradients if serving == "cpp" else cuda_weight_gradients
        return gradients(rows, ids, offsets, grads, format, is_mean, where)
    return trained_reference.weight_gradients(rows, ids, offsets, grads, format, is_mean)


def _update(given: _Given, factors: Tensor | None, grads: Tensor, step: TrainedStep) -> None:
    rows, state, ids, offsets, format, is_mean, _, where, serving = given
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    if grads.dtype != torch.float32 or tuple(grads.shape) != (num_bags, format.width):
        raise ValueError(
            f"{where}: grads must be float32 of shape [{num_bags}, {format.width}], got {grads.dtype} of shape "
            f"{list(grads.shape)}"
        )
    check_one_device(where, {"rows": rows, "grads": grads})
    if serving == "torch":
        _check_values(given, factors)
    update = {"cpp": cpp_update, "cuda": cuda_update, "torch": trained_reference.update}[serving]
    update(rows, state, ids, offsets, factors, grads, format, is_mean, step, where)


class _TrainedBag(torch.autograd.Function):
    """The look-up, and the update as its backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, factors: Tensor | None, given: _Given) -> Tensor:
        # rows and state may change before the backward: two look-ups of one table update it one after another
        ctx.given = given._replace(ids=None, offsets=None)
        ctx.save_for_backward(given.ids, given.offsets, factors)
        return _look_up(given, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, offsets, factors = ctx.saved_tensors
        given: _Given = ctx.given._replace(ids=ids, offsets=offsets)
        of_weights = _weight_gradients(given, grad) if ctx.needs_input_grad[1] else None
        step = given.step
        if step is not None:
            with nullcontext(step) if isinstance(step, TrainedStep) else step() as told:
                if told is not None:
                    _check_step(told, given.where)
                    _update(given, factors, grad, told)
        return None, of_weights, None


def _check(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    format: TrainedFormat,
    where: str,
) -> None:
    """Raise ValueError where types, devices or shapes do not fit."""
    check_rows("rows", rows, format.row_bytes, where)
    check_rows("state", state, format.state_bytes, where)
    if state.shape[0] != rows.shape[0]:
        raise ValueError(f"{where}: state must be one per row, {rows.shape[0]}, got {state.shape[0]}")
    check_one_device(where, {"rows": rows, "state": state, "ids": ids, "offsets": offsets, "weights": weights})
    check_index("ids", ids, where)
    if offsets is not None:
        check_index("offsets", offsets, where)
    if weights is not None:
        check_weight_count(weights, ids.shape[0], where)


def _check_values(given: _Given, factors: Tensor | None) -> None:
    """Raise ValueError for an id, an offset or a weight that cannot be."""
    check_ids(given.ids, given.rows.shape[0], given.where)
    if given.offsets is not None:
        check_offsets(given.offsets, given.ids.shape[0], given.where)
    if factors is not None:
        check_weights(factors, given.where)


def _check_written(rows: Tensor, state: Tensor, where: str) -> None:
    for name, tensor in (("rows", rows), ("state", state)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{where}: {name} must be contiguous where they are updated, got strides {list(tensor.stride())}; "
                "train a whole table, not a view of one"
            )


def _check_step(step: Step, where: str) -> None:
    if not isinstance(step, TrainedStep):
        return  # it is asked in the backward
    for name in ("learning_rate", "eps"):
        value = getattr(step, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name} must be finite and at least 0, got {value}")
    for name in ("beta1", "beta2"):
        value = getattr(step, name)
        if not 0 <= value < 1:
            raise ValueError(f"{where}: {name} must be in [0, 1), got {value}")
    for name in ("seed", "step", "first_id"):
        value = getattr(step, name)
        if not 0 <= value < 2**63:
            raise ValueError(f"{where}: {name} must be in [0, 2**63), got {value}")
