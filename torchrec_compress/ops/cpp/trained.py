"""Trained rows on the C++ kernels of a CPU; arguments as in `trained_bag`, checked but for their values."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from torchrec_compress.ops import trained_shapes
from torchrec_compress.ops.trained import TrainedFormat, TrainedOptimizer, TrainedStep

# how an optimizer is told to a kernel; see csrc/trained.h
_NUMBERS = {name: number for number, name in enumerate(get_args(TrainedOptimizer))}


def cpp_look_up(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    format: TrainedFormat,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return the pooled rows, (B, r) float32."""
    return torch.ops.torchrec_compress.trained_bag.default(
        rows, ids, offsets, weights, format.width, format.bits, is_mean, where
    )


def cpp_weight_gradients(
    rows: Tensor, ids: Tensor, offsets: Tensor | None, grads: Tensor, format: TrainedFormat, is_mean: bool, where: str
) -> Tensor:
    """Return the gradient of every id's weight, (L,) float32."""
    return torch.ops.torchrec_compress.trained_bag_weight_gradients.default(
        grads, rows, ids, offsets, format.width, format.bits, is_mean, where
    )


def cpp_update(
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
    """Update rows and state in place."""
    rate, correction = step.corrected() if format.has_moments else (step.learning_rate, 1.0)
    torch.ops.torchrec_compress.trained_bag_update.default(
        rows,
        state,
        ids,
        offsets,
        weights,
        grads,
        format.width,
        format.bits,
        _NUMBERS[format.optimizer],
        format.state_bits,
        is_mean,
        rate,
        step.eps,
        [step.beta1, step.beta2, correction],
        step.seed,
        step.step,
        step.first_id,
        where,
    )


def register() -> None:
    """Register the shapes of the operators, once the library is loaded."""
    space = "torchrec_compress::"
    torch.library.register_fake(space + "trained_bag", trained_shapes.bags)
    torch.library.register_fake(space + "trained_bag_weight_gradients", trained_shapes.weight_gradients)
    torch.library.register_fake(space + "trained_bag_update", _fake_update)


def _fake_update(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grads: Tensor,
    width: int,
    bits: int,
    optimizer: int,
    state_bits: int,
    is_mean: bool,
    learning_rate: float,
    eps: float,
    adam: list[float],
    seed: int,
    step: int,
    first_id: int,
    where: str,
) -> None:
    return None
