"""Nearest centroids and their sums on the C++ kernels of a CPU; arguments as in ops/nearest.py."""

from __future__ import annotations

import torch
from torch import Tensor


def cpp_nearest(points: Tensor, centroids: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Return index (N,) int64 and squared distance (N,) float32; `middle`: (d,) float32 that both are moved by."""
    return torch.ops.torchrec_compress.nearest.default(points, centroids, middle)


def cpp_centroid_sums(index: Tensor, values: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return sums (size, d) and mass (size,), float64."""
    return torch.ops.torchrec_compress.centroid_sums.default(index, values, weights, size)


def register() -> None:
    """Register the shapes of the operators, once the library is loaded."""
    torch.library.register_fake("torchrec_compress::nearest", _fake)
    torch.library.register_fake("torchrec_compress::centroid_sums", _fake_sums)


def _fake(points: Tensor, centroids: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    return points.new_empty(points.shape[0], dtype=torch.int64), points.new_empty(points.shape[0])


def _fake_sums(index: Tensor, values: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    sums = values.new_empty((size, values.shape[1]), dtype=torch.float64)
    return sums, sums.new_empty(size)
