"""The directions that hold most of a table's rows."""

import torch
from torch import Tensor

from torchrec_compress.fit.codes import CHUNK_ROWS


def leading_subspace(rows: Tensor, weights: Tensor, width: int) -> Tensor:
    """Return the directions that lose least of weighted rows: their leading right singular vectors.

    Of all projections to r numbers, that to these loses least (Eckart and Young 1936). Sums are of float64, in chunks.

    Args:
        rows: [N, D] float32.
        weights: [N] >= 0.
        width: r, at most D.

    Returns:
        [r, D] float32, orthonormal rows, the leading one first, the largest entry of each positive.

    Example:
        >>> leading_subspace(torch.tensor([[0.0, 1.0], [0.0, -2.0], [1.0, 0.0]]), torch.ones(3), 1)
        tensor([[0., 1.]])
    """
    moments = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for first in range(0, len(rows), CHUNK_ROWS):  # chunks bound the float64 copies
        chunk = slice(first, first + CHUNK_ROWS)
        exact = rows[chunk].to(torch.float64)
        moments += (exact * weights[chunk, None]).T @ exact
    _, vectors = torch.linalg.eigh(moments)  # ascending
    leading = vectors[:, -width:].flip(1).T
    # a singular vector is known up to its sign: the largest entry is positive, whatever the solver returned
    top = leading.gather(1, leading.abs().argmax(dim=1, keepdim=True))
    return (leading * top.sign()).float().contiguous()
