"""How far up what came next stands among all items: nDCG@10 and HR@10, and what popularity alone would have."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_compress.train.data.sequences import SequenceData

CUTOFF = 10


def next_item_metrics(found: NDArray) -> dict[str, float]:
    """Return the metrics of one split as plain numbers.

    Items that score the same stand in any order: the mean over all of those orders is returned, so that tables whose
    ids share rows gain and lose nothing by ties.

    Args:
        found: (N, 3) float: by row the cross-entropy in nats, how many items score more than what came next, and how
            many others the same.

    Returns:
        logloss, the mean cross-entropy; ndcg10, the mean of 1 / log2(place + 1), 0 after place 10; hr10, the share of
        rows of which it is among the first 10.

    Raises:
        ValueError: no rows, or values that are not finite.

    Example:
        >>> {name: round(value, 3) for name, value in next_item_metrics(np.array([[1.0, 2, 0], [3.0, 40, 0]])).items()}
        {'logloss': 2.0, 'ndcg10': 0.25, 'hr10': 0.5}
    """
    if not len(found) or not np.isfinite(found).all():
        got = "NaN or infinity; the training diverged, lower the rates" if len(found) else "no rows"
        raise ValueError(f"next_item_metrics: must have rows of finite scores, got {got}")
    return {"logloss": float(found[:, 0].astype(np.float64).mean()), **_by_place(found[:, 1], found[:, 2])}


def _by_place(above: NDArray, level: NDArray) -> dict[str, float]:
    """Return nDCG@10 and HR@10, means over all orders of what is level."""
    first, last = (np.minimum(end, CUTOFF).astype(np.int64) for end in (above, above + level + 1))
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(CUTOFF) + 2.0))])
    num_level = level.astype(np.float64) + 1
    return {
        f"ndcg{CUTOFF}": float(((gains[last] - gains[first]) / num_level).mean()),
        f"hr{CUTOFF}": float(((last - first) / num_level).mean()),
    }


def popularity_metrics(data: SequenceData) -> dict[str, dict[str, float]]:
    """Return nDCG@10 and HR@10 of valid and test by popularity alone: how often an item stands in train.

    As for a model, items that the sequence held before are not ranked.
    """
    counts = data.counts()[data.config.item]
    return {split: _by_place(*_places(data, split, counts)) for split in ("valid", "test")}


def _places(data: SequenceData, split: str, counts: Tensor) -> tuple[NDArray, NDArray]:
    """Return how many items are more popular than what came next, and how many others are as popular: (N,) each."""
    ordered = torch.sort(counts).values
    above, level = [], []
    for first, end in torch.stack(data.held(split), dim=1).tolist():
        target = data.items[end]
        held = torch.unique(data.items[first:end])
        seen, popular = counts[held[held != target].long()], counts[target.long()]
        least, most = (int(torch.searchsorted(ordered, popular, right=right)) for right in (False, True))
        above.append(len(ordered) - most - int((seen > popular).sum()))
        level.append(most - least - 1 - int((seen == popular).sum()))
    return np.array(above), np.array(level)
