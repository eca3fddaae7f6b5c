"""Sorting of ids by hot row, for the gradient of hot rows."""

from __future__ import annotations

import torch
from torch import Tensor

SEGMENT_IDS = 256


def hot_segments(hot: Tensor, num_hot: int, segment_ids: int = SEGMENT_IDS) -> tuple[Tensor, Tensor, Tensor]:
    """Sort ids by hot row and cut each row's run into segments; no host waits for a GPU.

    Args:
        hot: (L,) int32 hot row of every id, or num_hot for an id without one.
        num_hot: hot rows, H.
        segment_ids: the most ids of one segment.

    Returns:
        order: (L,) int64 ids by row, equal rows in their order.
        bounds: (S + 1,) int64; segment s is order[bounds[s]:bounds[s + 1]], of one hot row; none holds a cold id.
        firsts: (H + 1,) int64; row h is the segments [firsts[h], firsts[h + 1]).

    Example:
        >>> order, bounds, firsts = hot_segments(torch.tensor([2, 1, 0, 1], dtype=torch.int32), num_hot=2)
        >>> order.tolist(), bounds.tolist(), firsts.tolist()
        ([2, 1, 3, 0], [0, 0, 1, 3], [0, 2, 3])
    """
    rows, order = torch.sort(hot, stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_hot + 1, dtype=rows.dtype, device=rows.device))
    cuts = torch.arange(0, len(hot), segment_ids, device=rows.device)
    bounds = torch.sort(torch.cat([starts, torch.minimum(cuts, starts[-1])])).values
    return order, bounds, torch.searchsorted(bounds, starts)
