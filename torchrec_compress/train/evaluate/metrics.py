"""Exact AUC and logloss over whole splits, on the tail and by kind of negative."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchrec_compress.train.data.memory import Split

# what runs are judged by; those of clicks have some, those of sequences others
QUALITY = {"auc": "AUC", "ndcg10": "nDCG@10", "hr10": "HR@10", "logloss": "logloss"}
LESS_IS_BETTER = ("logloss",)


def auc(labels: NDArray, scores: NDArray) -> float:
    """Return the exact area under the ROC curve, ties counting half; NaN where a class is missing.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) any increasing function of the click probability.

    Example:
        >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
        0.75
    """
    positive = np.asarray(labels) > 0.5
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))  # start of every run of ties
    last = np.append(first[1:], len(ordered))
    ranks = np.repeat((first + last + 1) / 2.0, last - first)  # mean rank of the run, from 1
    total = float(ranks[positive[order]].sum())
    return (total - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def logloss(labels: NDArray, logits: NDArray) -> float:
    """Return the mean binary cross-entropy in nats, exact for extreme logits too.

    Example:
        >>> round(logloss(np.array([1.0, 0.0]), np.array([0.0, -1000.0])), 4)
        0.3466
    """
    values = np.asarray(logits, dtype=np.float64)
    return float(np.mean(np.logaddexp(0.0, values) - values * np.asarray(labels, dtype=np.float64)))


def evaluate(labels: NDArray, logits: NDArray, tail: NDArray | None, kinds: NDArray | None) -> dict[str, float]:
    """Return all metrics of one split as plain numbers.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) float.
        tail: (N,) bool, rows of the tail, or None.
        kinds: (N,) kind of negative, 0 the positive, or None.

    Returns:
        auc, logloss; tail_auc, tail_logloss, tail_share; kind<k>_auc of the positives against one kind of negative. One
        that is not defined, since all of its rows have the same label, is left out; see `undefined`.

    Raises:
        ValueError: logits that are not finite, or all labels are the same.
    """
    if not np.isfinite(logits).all():
        raise ValueError("evaluate: logits must be finite, got NaN or infinity; the training diverged, lower the rates")
    result = {"auc": auc(labels, logits), "logloss": logloss(labels, logits)}
    if np.isnan(result["auc"]):
        raise ValueError(f"evaluate: must have clicks and others for an AUC, got {len(labels)} rows of one label")
    for name, rows in _parts(tail, kinds).items():
        result[f"{name}_auc"] = auc(labels[rows], logits[rows])
        if name == "tail":
            result["tail_logloss"] = logloss(labels[rows], logits[rows])
            result["tail_share"] = float(rows.mean())
    return {name: value for name, value in result.items() if not np.isnan(value)}


def undefined(labels: NDArray, tail: NDArray | None, kinds: NDArray | None) -> dict[str, str]:
    """Return why metrics are left out, by their names; arguments as for `evaluate`.

    Example:
        >>> undefined(np.array([1, 1, 0]), np.array([True, True, False]), None)
        {'tail_auc': 'all 2 rows have the label 1'}
    """
    parts = {name: labels[rows] for name, rows in _parts(tail, kinds).items()}
    same = {name: part for name, part in parts.items() if part.min() == part.max()}
    return {f"{name}_auc": f"all {len(part)} rows have the label {int(part[0])}" for name, part in same.items()}


def _parts(tail: NDArray | None, kinds: NDArray | None) -> dict[str, NDArray]:
    """Return which rows count for the metrics of a part: (N,) bool, with a row each."""
    parts = {} if tail is None else {"tail": tail}
    if kinds is not None:
        for kind in sorted(set(np.unique(kinds).tolist()) - {0}):
            parts[f"kind{kind}"] = (kinds == 0) | (kinds == kind)
    return {name: rows for name, rows in parts.items() if rows.any()}


def bayes_metrics(split: Split) -> dict[str, float]:
    """Return the AUC and logloss of the true probabilities, where the split knows them."""
    if split.probabilities is None:
        return {}
    p = split.probabilities.double().clamp(1e-12, 1 - 1e-12).numpy()
    logits = np.log(p) - np.log1p(-p)
    labels = split.labels.numpy()
    return {"bayes_auc": auc(labels, logits), "bayes_logloss": logloss(labels, logits)}
