"""Pooling of unpooled rows into bags."""

from __future__ import annotations

import torch
from torch import Tensor


def check_weights(weights: Tensor, where: str) -> Tensor:
    """Return per-id weights unchanged, or raise when one is NaN or infinite.

    Args:
        weights: (L,) floating point.
        where: names the collection in the error.

    Raises:
        ValueError: a weight is not finite (checked on the CPU; on a GPU the check is asynchronous).

    Example:
        >>> check_weights(torch.ones(2), "collection")
        tensor([1., 1.])
    """
    if torch.compiler.is_compiling() or weights.device.type == "meta":
        return weights
    finite = torch.isfinite(weights).all()
    if weights.device.type != "cpu":
        torch._assert_async(finite, f"{where}: a weight is not finite")
    elif not bool(finite):
        raise ValueError(f"{where}: weights must be finite, got NaN or infinity; clean the batch's weights")
    return weights


def pool_rows(rows: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum rows into bags.

    Args:
        rows: (L, D) floating point.
        offsets: (B + 1,) integer; bag b is rows[offsets[b]:offsets[b+1]].
        weights: (L,) factors, or None.

    Returns:
        (B, D), dtype of `rows`; an empty bag is zeros. Differentiable in `rows` and `weights`.

    Example:
        >>> pool_rows(torch.ones(3, 2), torch.tensor([0, 2, 2, 3])).tolist()
        [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if weights is not None:
        rows = rows * weights.to(rows.dtype).unsqueeze(1)
    num_bags = offsets.shape[0] - 1
    bags = torch.repeat_interleave(
        torch.arange(num_bags, device=rows.device), (offsets[1:] - offsets[:-1]).long(), output_size=rows.shape[0]
    )
    return rows.new_zeros(num_bags, rows.shape[1]).index_add(0, bags, rows)
