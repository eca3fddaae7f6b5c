"""Popularity weights: how much a row counts in a fit.

A lookup sees row i with probability n_i / sum(n), so the error a model really meets is weighted by the raw counts.
MEC (arXiv 2502.15355) damps them to floor(log2 n); on tables of steep popularity that is too weak.
"""

from typing import Literal

import torch
from torch import Tensor

from torchrec_compress.fit.checks import first_wrong

PopularityKind = Literal["count", "log2", "none"]

# An id that training never saw may still be asked for: it counts as a thousandth of a lookup, enough to be placed.
UNSEEN_WEIGHT = 1e-3
_BLOCK = 2**18  # rows that are weighed together: blocks bound the float64 copies


def popularity_weights(counts: Tensor | None, kind: PopularityKind, num_rows: int) -> Tensor:
    """Turn lookup counts into the weights of a fit.

    Args:
        counts: [N] lookups per row, integer or float, >= 0; None only with kind "none".
        kind: "count": the count itself; "log2": max(1, floor(log2 n)), MEC's weight (MEC repeats a row that often; here
            it is a weight); "none": 1 for every row. With the first two a row never seen weighs 0.001.
        num_rows: N.

    Returns:
        [N] float32, all above zero.

    Raises:
        ValueError: unknown kind, or counts missing, of the wrong shape, negative, infinite or NaN.

    Example:
        >>> popularity_weights(torch.tensor([0, 1, 5, 1024]), "log2", 4)
        tensor([1.0000e-03, 1.0000e+00, 2.0000e+00, 1.0000e+01])
    """
    if kind not in ("count", "log2", "none"):
        raise ValueError(f"popularity_weights: kind must be 'count', 'log2' or 'none', got {kind!r}")
    if kind == "none":
        return torch.ones(num_rows)
    if counts is None:
        raise ValueError(f"popularity_weights: kind {kind!r} needs counts, got None; pass counts or use kind 'none'")
    if tuple(counts.shape) != (num_rows,):
        raise ValueError(
            f"popularity_weights: counts must have shape [{num_rows}], one per row, got {list(counts.shape)}"
        )
    first = first_wrong(counts)
    if first is not None:
        raise ValueError(
            f"popularity_weights: counts must be finite and >= 0, got {float(counts[first])} for row {first}"
        )
    weights = torch.empty(num_rows, dtype=torch.float32, device=counts.device)
    for first in range(0, num_rows, _BLOCK):
        # float64 holds every integer count up to 2^53, so log2 of an exact power of two stays exact.
        exact = counts[first : first + _BLOCK].detach().to(torch.float64)
        mine = exact if kind == "count" else exact.clamp(min=2).log2().floor()
        weights[first : first + _BLOCK] = torch.where(exact > 0, mine, UNSEEN_WEIGHT)
    return weights
