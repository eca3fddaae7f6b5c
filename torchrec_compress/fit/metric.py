"""The metric of the loss: errors of a row as the model feels them, not as their squares (docs/curvature.md).

An error that the model does not read costs nothing, and codes should not be spent on it. Rows are multiplied by a root
of the curvature, codes are fitted to those, and codebooks are multiplied by the inverse: what is stored is as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The share of plain squared error: directions that few examples read are known badly, and none may cost nothing.
PLAIN_SHARE = 0.05


@dataclass(frozen=True)
class Metric:
    """Squared error of whitened rows is the error that the loss feels.

    Attributes:
        roots: [S, w, w] float32, of slice s the root C_s: a row's slice x becomes x C_s.
        inverses: [S, w, w] float32.
    """

    roots: Tensor
    inverses: Tensor

    @staticmethod
    def of(curvature: Tensor, num_slices: int = 1) -> Metric:
        """Return the metric of a curvature.

        C C^T = D F / tr F + 0.05 I, of its diagonal blocks where rows are cut into slices.

        Args:
            curvature: [D, D] float64 symmetric, positive semi-definite, of trace above 0.
            num_slices: S, a divisor of D: slices that errors are counted in apart, as those of product codes.

        Example:
            >>> metric = Metric.of(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
            >>> metric.whiten(torch.ones(1, 2)).square()
            tensor([[1.5500, 0.5500]])
        """
        width = len(curvature)
        part = width // num_slices
        exact = curvature.to(torch.float64)
        whole = exact * (width / exact.trace()) + PLAIN_SHARE * torch.eye(width, dtype=torch.float64)
        blocks = whole.view(num_slices, part, num_slices, part).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        roots = torch.linalg.cholesky(blocks)
        return Metric(roots.float(), torch.linalg.inv(roots).float())

    def whiten(self, rows: Tensor) -> Tensor:
        """Return rows, [N, D] float32, in which errors are squares."""
        return self._times(rows, self.roots)

    def restore(self, rows: Tensor) -> Tensor:
        """Return what `whiten` was given, [N, D] float32."""
        return self._times(rows, self.inverses)

    def restore_codebooks(self, codebooks: Tensor) -> Tensor:
        """Return codebooks of whitened rows as those of rows.

        Args:
            codebooks: [M*K, w] float32; with S > 1 slices M = S, and codebook m is of slice m.
        """
        num_slices, width, _ = self.roots.shape
        return (codebooks.view(num_slices, -1, width) @ self.inverses).view_as(codebooks)

    @staticmethod
    def _times(rows: Tensor, matrices: Tensor) -> Tensor:
        num_slices, width, _ = matrices.shape
        sliced = rows.view(len(rows), num_slices, width).transpose(0, 1)
        return (sliced @ matrices).transpose(0, 1).reshape(rows.shape)
