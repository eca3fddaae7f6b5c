"""What the operators of trained rows return, without values: the same on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def bags(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    width: int,
    bits: int,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return an empty tensor in place of the pooled rows, (B, width) float32."""
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    return rows.new_empty((num_bags, width), dtype=torch.float32)


def weight_gradients(
    grads: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    width: int,
    bits: int,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return an empty tensor in place of the gradient of every id's weight, (L,) float32."""
    return grads.new_empty(ids.shape[0])
