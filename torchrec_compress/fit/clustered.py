"""Rows of two codewords in each slice, one that a learned pointer picks and one that a hash does (CCE, 2210.05974)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.ops import centroid_sums


class ResidualSums:
    """What the codewords that a hash picks are: the mean of what pointers leave of the rows of each bucket.

    Blocks of rows are added one after another; sums are float64, so that blocks of any size leave the same.

    Args:
        num_codes: slices of a row, M.
        codebook_size: buckets of a slice, K.
        width: of a slice, D / M.
        device: of the sums.

    Attributes:
        sums: [M*K, D/M] float64; those of several ranks may be added up.
        masses: [M*K] float64, the weights that were added; likewise.

    Example:
        >>> sums = ResidualSums(num_codes=1, codebook_size=2, width=1)
        >>> sums.add(torch.tensor([[1.0], [3.0]]), torch.tensor([[0], [0]]))
        >>> sums.means().tolist()
        [[2.0], [0.0]]
    """

    def __init__(self, num_codes: int, codebook_size: int, width: int, device: torch.device | None = None) -> None:
        self._offsets = torch.arange(num_codes, device=device) * codebook_size
        self.sums = torch.zeros(num_codes * codebook_size, width, dtype=torch.float64, device=device)
        self.masses = torch.zeros(num_codes * codebook_size, dtype=torch.float64, device=device)

    def add(self, residuals: Tensor, buckets: Tensor, weights: Tensor | None = None) -> None:
        """Add a block of rows.

        Args:
            residuals: [L, D] float32.
            buckets: [L, M] int64, each in [0, K).
            weights: [L] float32 >= 0, or None for equal ones.
        """
        index, slices = (buckets + self._offsets).flatten(), residuals.reshape(-1, self.sums.shape[1])
        each = torch.ones(len(index), device=index.device)
        if weights is not None:
            each = weights.float().repeat_interleave(len(self._offsets))
        sums, masses = centroid_sums(index, slices, each, len(self.sums))
        self.sums += sums
        self.masses += masses

    def means(self) -> Tensor:
        """Return the mean of each bucket, [M*K, D/M] float32; zeros where nothing, or nothing with a weight, is."""
        means = self.sums / self.masses.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        return torch.where(self.masses[:, None] > 0, means, 0.0).float()
