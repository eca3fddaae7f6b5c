"""Rows that ids share: the mean of a bucket, from block after block."""

from __future__ import annotations

import torch
from torch import Tensor


class BucketSums:
    """Count-weighted sums of the rows of each bucket.

    Args:
        num_buckets: number of buckets.
        embedding_dim: width of a row.

    Example:
        >>> sums = BucketSums(2, 1)
        >>> sums.add(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), None)
        >>> sums.means().tolist()
        [[2.0], [0.0]]
    """

    def __init__(self, num_buckets: int, embedding_dim: int) -> None:
        self._sums = torch.zeros(num_buckets, embedding_dim)
        self._totals = torch.zeros(num_buckets)

    def add(self, rows: Tensor, buckets: Tensor, counts: Tensor | None) -> None:
        """Add a block of rows.

        Args:
            rows: (L, D) float32.
            buckets: (L,) int64 in [0, num_buckets).
            counts: (L,) or None for equal weights; an id never seen counts a thousandth of a look-up.
        """
        weights = torch.ones(rows.shape[0]) if counts is None else counts.float().clamp(min=1e-3)
        self._sums.index_add_(0, buckets, rows * weights.unsqueeze(1))
        self._totals.index_add_(0, buckets, weights)

    def sums(self) -> list[Tensor]:
        """Return all that was summed up, live: over several of these, of different rows, it adds up."""
        return [self._sums, self._totals]

    def means(self) -> Tensor:
        """Return the mean row of each bucket, (num_buckets, D) float32; an empty bucket is zeros."""
        return self._sums / self._totals.clamp(min=1e-12).unsqueeze(1)
