"""AUC and logloss, exact and over whole splits."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve: ranks with ties averaged, no binning.

    Args:
        scores: (N,) any increasing function of the probability.
        labels: (N,) in {0, 1}.

    Returns:
        AUC in [0, 1]; NaN where only one class is present.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]))
        0.875
    """
    positive = labels > 0.5
    num_positive = int(positive.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = last - (counts.double() - 1) / 2
    rank_sum = float(ranks[inverse][positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def logloss(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean cross entropy of probabilities, (N,) in [0, 1], and labels, (N,) in {0, 1}, in nats.

    Example:
        >>> round(logloss(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])), 4)
        0.6931
    """
    p = probabilities.double().clamp(1e-12, 1 - 1e-12)
    y = labels.double()
    return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())


def scores(
    probabilities: Tensor, labels: Tensor, *, tail: Tensor | None = None, kinds: Tensor | None = None
) -> dict[str, float]:
    """Return AUC and logloss over all examples, over the tail, and the AUC of positives against each kind of negative.

    Args:
        probabilities: (N,) in [0, 1].
        labels: (N,) in {0, 1}.
        tail: (N,) bool, examples with a rare id; or None.
        kinds: (N,) integer, 0 for positives, another number per kind of negative; or None.

    Example:
        >>> sorted(scores(torch.rand(9), torch.arange(9) % 2, tail=torch.arange(9) < 5))
        ['auc', 'logloss', 'tail_auc', 'tail_logloss', 'tail_share']
    """
    found = {"auc": auc(probabilities, labels), "logloss": logloss(probabilities, labels)}
    if tail is not None and bool(tail.any()):
        found["tail_auc"] = auc(probabilities[tail], labels[tail])
        found["tail_logloss"] = logloss(probabilities[tail], labels[tail])
        found["tail_share"] = float(tail.double().mean())
    if kinds is not None:
        for kind in sorted(set(kinds.unique().tolist()) - {0}):
            chosen = (labels > 0.5) | (kinds == kind)
            found[f"auc_kind_{kind}"] = auc(probabilities[chosen], labels[chosen])
    return found
