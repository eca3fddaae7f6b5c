"""The directions that hold most of a table's rows."""

import torch
from torch import Tensor

from torchrec_compress.fit.codes import CHUNK_ROWS
from torchrec_compress.fit.metric import Metric


def leading_subspace(
    rows: Tensor, weights: Tensor, width: int, curvature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the directions that lose least of weighted rows: their leading right singular vectors.

    Of all projections to r numbers, that to these loses least (Eckart and Young 1936); with a curvature, least of what
    the loss feels, by the vectors of whitened rows. Sums are of float64, in chunks.

    Args:
        rows: [N, D] float32.
        weights: [N] >= 0.
        width: r, at most D.
        curvature: [D, D] float64, see `Metric.of`, or None for squared error.

    Returns:
        What narrows rows, [D, r] float32, and what widens them again, [r, D] float32 with orthonormal rows, the leading
        one first, the largest entry of each positive. Without a curvature one is the other transposed.

    Example:
        >>> leading_subspace(torch.tensor([[0.0, 1.0], [0.0, -2.0], [1.0, 0.0]]), torch.ones(3), 1)[1]
        tensor([[0., 1.]])
    """
    moments = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for first in range(0, len(rows), CHUNK_ROWS):  # chunks bound the float64 copies
        chunk = slice(first, first + CHUNK_ROWS)
        exact = rows[chunk].to(torch.float64)
        moments += (exact * weights[chunk, None]).T @ exact
    root = None if curvature is None else Metric.of(curvature).roots[0].double()
    if root is not None:
        moments = root.T @ moments @ root
    _, vectors = torch.linalg.eigh(moments)  # ascending
    leading = vectors[:, -width:].flip(1).T
    narrow = leading.T
    if root is not None:
        # x C = z V for whitened rows, so x = z (V C^-1); orthonormal rows of the same span are Q of its QR factors
        basis, upper = torch.linalg.qr(torch.linalg.solve(root.T, leading.T))
        narrow, leading = root @ leading.T @ upper.T, basis.T
    # a singular vector is known up to its sign: the largest entry is positive, whatever the solver returned
    sign = leading.gather(1, leading.abs().argmax(dim=1, keepdim=True)).sign()
    return (narrow * sign.T).float().contiguous(), (leading * sign).float().contiguous()
