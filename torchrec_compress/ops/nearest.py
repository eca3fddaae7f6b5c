"""The nearest centroid of each point: what fits spend their time on."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.ops.cpp.nearest import cpp_centroid_sums, cpp_nearest
from torchrec_compress.ops.dispatch import cpp_serves

# Floats of one block of distances (32 MB). Smaller blocks would stay in a nearer cache, a tenth faster; but every block
# is a meeting point of all threads, and on a busy machine those, not the arithmetic, take the time.
BLOCK_FLOATS = 8_388_608
CHUNK_ROWS = 65536


def nearest_with_distance(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each point (squared Euclidean), the first one among equals, and the distance.

    Memory beside the result: on a CPU with the C++ kernels a packed copy of the centroids; else 32 MB of distances.

    Args:
        points: (N, d) float32.
        centroids: (K, d) float32.

    Returns:
        (N,) int64, and squared distances (N,) float32.

    Example:
        >>> nearest_with_distance(torch.tensor([[0.5], [0.0]]), torch.tensor([[0.0], [1.0]]))
        (tensor([0, 0]), tensor([0.2500, 0.0000]))
    """
    # ||x - c||^2 - ||x||^2 = ||c||^2 - 2 x.c orders the centroids of one point. Both are moved by the centroids' mean
    # first: distances do not change, and float32 loses less to cancellation.
    points, centroids = points.detach(), centroids.detach()
    middle = centroids.mean(dim=0)
    if points.device.type == "cpu" and cpp_serves():
        return cpp_nearest(points, centroids, middle)
    index = _nearest(points, centroids, middle)
    return index, (points - centroids[index]).square_().sum(dim=1)


def _nearest(points: Tensor, centroids: Tensor, middle: Tensor) -> Tensor:
    """Return the index alone: one addmm and one argmin per block."""
    centred = centroids - middle
    norms, doubled = centred.square().sum(dim=1), -2 * centred.T
    index = torch.empty(len(points), dtype=torch.int64, device=points.device)
    # a power of two: blocks of rows that are multiples of it are cut where the whole is, so nothing rounds otherwise
    block = max(64, 1 << (max(1, BLOCK_FLOATS // len(centroids)).bit_length() - 1))
    scores = torch.empty(min(block, len(points)), len(centroids), device=points.device)
    for start in range(0, len(points), block):
        part = points[start : start + block] - middle
        out = scores[: len(part)]
        torch.addmm(norms, part, doubled, out=out)
        torch.argmin(out, dim=1, out=index[start : start + block])
    return index


def centroid_sums(index: Tensor, values: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sum the values that share an index, times their weights, and the weights.

    Args:
        index: (N,) int64 in [0, size).
        values: (N, d) float32.
        weights: (N,) float32.
        size: number of sums.

    Returns:
        (size, d) and (size,), float64.

    Example:
        >>> sums, mass = centroid_sums(torch.tensor([1, 1]), torch.ones(2, 1), torch.tensor([1.0, 2.0]), 2)
        >>> sums.tolist(), mass.tolist()
        ([[0.0], [3.0]], [0.0, 3.0])
    """
    if values.device.type == "cpu" and cpp_serves():
        return cpp_centroid_sums(index, values, weights, size)
    sums = torch.zeros(size, values.shape[1], dtype=torch.float64, device=values.device)
    for start in range(0, len(index), CHUNK_ROWS):  # chunks bound the float64 copies
        chunk = slice(start, start + CHUNK_ROWS)
        exact = weights[chunk].to(torch.float64)
        sums.index_add_(0, index[chunk], values[chunk].to(torch.float64) * exact[:, None])
    return sums, torch.bincount(index, weights.to(torch.float64), minlength=size)
