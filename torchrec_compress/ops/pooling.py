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


def check_offsets(offsets: Tensor, num_ids: int) -> None:
    """Raise where bags do not cover the ids; inside `torch.compile` and on a GPU nothing is checked.

    `F.embedding_bag` takes decreasing offsets and returns uninitialised memory (torch 2.13).

    Args:
        offsets: (B + 1,) integer.
        num_ids: L.

    Raises:
        ValueError: offsets decrease, or do not run from 0 to L.

    Example:
        >>> check_offsets(torch.tensor([0, 2, 2, 3]), 3)
    """
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    if offsets.numel() == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != num_ids:
        ends = [] if offsets.numel() == 0 else [int(offsets[0]), int(offsets[-1])]
        raise ValueError(
            f"codebook_bag: offsets must start with 0 and must end with the number of ids, {num_ids}, got {ends}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"codebook_bag: offsets must not decrease, got {offsets.tolist()[:20]}")


def repeat_offsets(offsets: Tensor, times: int, num_ids: int) -> Tensor:
    """Return the offsets of the same bags over ids that are repeated, all of them, several times.

    Args:
        offsets: (B + 1,) integer, from 0 up to L.
        times: of the repetition, n.
        num_ids: L.

    Returns:
        (n * B + 1,), dtype of `offsets`.

    Example:
        >>> repeat_offsets(torch.tensor([0, 2, 3]), 2, 3).tolist()
        [0, 2, 3, 5, 6]
    """
    starts = torch.arange(times, dtype=offsets.dtype, device=offsets.device).unsqueeze(1) * num_ids
    return torch.cat([(offsets[:-1] + starts).reshape(-1), offsets.new_full((1,), times * num_ids)])


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
