"""Pooling of unpooled rows into bags."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.ops.checks import check_index, check_one_device, check_weight_count


def check_weights(weights: Tensor, where: str) -> Tensor:
    """Return per-id weights unchanged, or raise when one is NaN or infinite.

    Args:
        weights: (L,) floating point.
        where: names the collection in the error.

    Raises:
        ValueError: they are not floating point, or one is not finite (checked on the CPU; on a GPU the check is
            asynchronous).

    Example:
        >>> check_weights(torch.ones(2), "collection")
        tensor([1., 1.])
    """
    as_factors(weights, weights.dtype, where)
    if torch.compiler.is_compiling() or weights.device.type == "meta":
        return weights
    finite = torch.isfinite(weights).all()
    if weights.device.type != "cpu":
        torch._assert_async(finite, f"{where}: a weight is not finite")
    elif not bool(finite):
        raise ValueError(f"{where}: weights must be finite, got NaN or infinity; clean the batch's weights")
    return weights


def as_factors(weights: Tensor, dtype: torch.dtype, where: str = "codebook_bag") -> Tensor:
    """Return per-id weights of any floating point type in the one that rows are summed in.

    Args:
        weights: (L,) floating point.
        dtype: of the rows; float16 and bfloat16 ones are summed in float32.
        where: names the look-up in the error.

    Returns:
        (L,) float32, or float64 for rows of float64. Differentiable.

    Raises:
        ValueError: weights are not floating point, as `torch.nn.EmbeddingBag` wants them.

    Example:
        >>> as_factors(torch.ones(1, dtype=torch.float64), torch.float16).dtype
        torch.float32
    """
    if not weights.is_floating_point():
        raise ValueError(f"{where}: weights must be floating point, got {weights.dtype}; call weights.float()")
    return weights.to(dtype if dtype == torch.float64 else torch.float32)


def check_offsets(offsets: Tensor, num_ids: int, where: str = "codebook_bag") -> None:
    """Raise where bags do not cover the ids; inside `torch.compile` and on a GPU only the type is checked.

    `F.embedding_bag` takes decreasing offsets and returns uninitialised memory (torch 2.13).

    Args:
        offsets: (B + 1,) integer.
        num_ids: L.
        where: names the look-up in the error.

    Raises:
        ValueError: offsets are not int32 or int64 of one dimension, decrease, or do not run from 0 to L.

    Example:
        >>> check_offsets(torch.tensor([0, 2, 2, 3]), 3)
    """
    check_index("offsets", offsets, where)
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    if offsets.numel() == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != num_ids:
        ends = [] if offsets.numel() == 0 else [int(offsets[0]), int(offsets[-1])]
        raise ValueError(
            f"{where}: offsets must start with 0 and must end with the number of ids, {num_ids}, got {ends}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{where}: offsets must not decrease, got {offsets.tolist()[:20]}")


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


def pool_rows(rows: Tensor, offsets: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Sum rows into bags.

    Args:
        rows: (L, D) floating point.
        offsets: (B + 1,) integer; bag b is rows[offsets[b]:offsets[b+1]]. None: every row is a bag.
        weights: (L,) floating point factors, or None.

    Returns:
        (B, D), dtype of `rows`; an empty bag is zeros. Differentiable in `rows` and `weights`.

    Raises:
        ValueError: weights are not one per row, or offsets decrease or do not run from 0 to L (CPU).

    Example:
        >>> pool_rows(torch.ones(3, 2), torch.tensor([0, 2, 2, 3])).tolist()
        [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    """
    check_one_device("pool_rows", {"rows": rows, "offsets": offsets, "weights": weights})
    if offsets is not None:
        check_offsets(offsets, rows.shape[0])
    if weights is not None:
        rows = scale_rows(rows, weights)
    if offsets is None:
        return rows
    num_bags = offsets.shape[0] - 1
    bags = torch.repeat_interleave(
        torch.arange(num_bags, device=rows.device), (offsets[1:] - offsets[:-1]).long(), output_size=rows.shape[0]
    )
    return rows.new_zeros(num_bags, rows.shape[1]).index_add(0, bags, rows)


def scale_rows(rows: Tensor, weights: Tensor, where: str = "pool_rows") -> Tensor:
    """Multiply every row by its weight.

    Args:
        rows: (L, D) floating point.
        weights: (L,) floating point factors.
        where: names the look-up in the error.

    Returns:
        (L, D), dtype of `rows`. Differentiable in both.

    Raises:
        ValueError: weights are not floating point, or not one per row.

    Example:
        >>> scale_rows(torch.ones(2, 2), torch.tensor([2.0, 3.0])).tolist()
        [[2.0, 2.0], [3.0, 3.0]]
    """
    check_weight_count(weights, rows.shape[0], where)
    return rows * as_factors(weights, rows.dtype, where).to(rows.dtype).unsqueeze(1)
