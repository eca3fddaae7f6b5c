"""Logits of whole splits, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import Batch, Share
from torchrec_compress.train.data.sequences import SequenceData
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.evaluate.calibration import calibrate
from torchrec_compress.train.evaluate.metrics import evaluate, logloss, undefined
from torchrec_compress.train.evaluate.ranking import next_item_metrics
from torchrec_compress.train.ranks import Ranks, on_first

_BATCH = 16384  # rows of a rank


@dataclass(frozen=True)
class Scored:
    """All rows of a split, in their order.

    Args:
        logits: (N,) float32, or (N, 3) of sequences, see `NextItemNet`.
        labels: (N,) float32, 0 or 1.
        kinds: (N,) int8 kind of negative, or None.
        tail: (N,) bool, rows with a rare id, or None.
    """

    logits: NDArray
    labels: NDArray
    kinds: NDArray | None
    tail: NDArray | None


def predict(
    logits: Callable[[Batch], Tensor],
    data: ClickSource,
    split: str,
    ranks: Ranks,
    rare: Mapping[str, Tensor] | None = None,
) -> Scored | None:
    """Score a split, each rank its share.

    Args:
        logits: of a batch, float32 on any device, a row each.
        data: the rows.
        split: "train", "valid" or "test".
        ranks: all of which call this.
        rare: (rows,) bool by feature, ids that make a row one of the tail.

    Returns:
        All rows on rank 0, None elsewhere.
    """
    found: dict[str, list[Tensor]] = {"rows": [], "weights": [], "logits": [], "labels": [], "kinds": [], "tail": []}
    with torch.no_grad():
        for batch in data.batches(split, _BATCH * ranks.world, None, Share(ranks.rank, ranks.world)).epoch(0):
            found["logits"].append(logits(batch).float().cpu())
            found["rows"].append(batch.rows)
            found["weights"].append(batch.weights)
            found["labels"].append(batch.labels)
            if batch.kinds is not None:
                found["kinds"].append(batch.kinds)
            if rare is not None:
                found["tail"].append(_is_tail(batch, rare))
    parts = {name: _gathered(torch.cat(values), ranks) for name, values in found.items() if values}
    if not ranks.is_first:
        return None
    kept = parts["weights"] > 0  # the rest is padding
    order = np.argsort(parts["rows"][kept], kind="stable")
    whole = {name: values[kept][order] for name, values in parts.items()}
    return Scored(whole["logits"], whole["labels"], whole.get("kinds"), whole.get("tail"))


def _gathered(values: Tensor, ranks: Ranks) -> NDArray:
    """Return all ranks' values on rank 0, this rank's elsewhere; equally many on every rank."""
    if ranks.world == 1:
        return values.numpy()
    is_bool = values.dtype == torch.bool
    sent = values.to(torch.uint8) if is_bool else values.contiguous()  # gloo gathers no bools
    parts = [torch.empty_like(sent) for _ in range(ranks.world)] if ranks.is_first else None
    dist.gather(sent, parts, dst=0, group=ranks.waiting)
    whole = sent if parts is None else torch.cat(parts)
    return whole.numpy().astype(bool) if is_bool else whole.numpy()


def _is_tail(batch: Batch, rare: Mapping[str, Tensor]) -> Tensor:
    """Return which rows have a rare id: (B,) bool."""
    size = len(batch.labels)
    num_rare = torch.zeros(size)
    for name, is_rare in rare.items():
        bags = batch.features[name]
        rows = torch.repeat_interleave(torch.arange(size), bags.lengths().long())
        num_rare.index_add_(0, rows, is_rare[bags.values().long()].float())
    return num_rare > 0


def rare_ids(data: ClickSource, config: DataConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Return which ids make a row one of the tail: (rows,) bool by table.

    Args:
        data: where counts and table sizes come from.
        config: `tail_tables`, where empty means all tables with more than 1,000 rows (the largest where none has), and
            `tail_count`; an id that train saw fewer times is rare. Nothing is counted where that is 0.
        ranks: all of which call this.

    Raises:
        ValueError: an unknown table.
    """
    unknown = sorted(set(config.tail_tables) - set(data.features))
    if unknown:
        raise ValueError(f"data.tail_tables: must name features of {data.features}, got {unknown}")
    large = [name for name, size in zip(data.features, data.vocab, strict=True) if size > 1000]
    chosen = config.tail_tables or large or [data.features[int(np.argmax(data.vocab))]]
    if config.tail_count == 0:
        return {}
    counts = total_counts(data, ranks)
    return {name: counts[name] < config.tail_count for name in chosen}


def total_counts(data: ClickSource, ranks: Ranks) -> dict[str, Tensor]:
    """Return how often train looks every id up: (rows,) int64 by feature, the same on every rank."""
    counts = data.counts(Share(ranks.rank, ranks.world))
    if ranks.world > 1:
        for count in counts.values():
            dist.all_reduce(count, group=ranks.waiting)
    return counts


def check_labels(data: ClickSource) -> None:
    """Refuse data on which no AUC is defined, before anything is trained; reads no further than it must.

    Sequences have no labels.

    Raises:
        ValueError: valid or test has no click, or nothing but clicks.
    """
    for split in () if isinstance(data, SequenceData) else ("valid", "test"):
        seen: set[bool] = set()
        for batch in data.batches(split, _BATCH, None).epoch(0):
            seen |= set((batch.labels > 0.5)[batch.weights > 0].tolist())
            if len(seen) == 2:
                break
        else:
            raise ValueError(
                f"data: the {split} split must have clicks and others, since its AUC is not defined else, got "
                f"{data.num_rows(split)} rows with the label {int(seen.pop())}; see data.split and data.split_by"
            )


Metrics = dict[str, dict[str, float]]


def score(
    logits: Callable[[Batch], Tensor], data: ClickSource, config: DataConfig, ranks: Ranks
) -> tuple[Metrics, dict[str, str]]:
    """Return all metrics of valid and test, and why some are left out, on every rank; rank 0 says the latter.

    Those of sequences are what `next_item_metrics` tells.
    `calibrated_logloss` is that of logits with the scale and the bias that are best on validation.

    Raises:
        ValueError: logits that are not finite.
    """
    is_sequence = isinstance(data, SequenceData)
    rare = None if is_sequence else rare_ids(data, config, ranks)
    scored = [predict(logits, data, split, ranks, rare) for split in ("valid", "test")]
    result, left_out = on_first(lambda: _ranking(*scored) if is_sequence else _metrics(*scored), ranks)
    for name, reason in left_out.items() if ranks.is_first else ():
        tqdm.write(f"{name} is not defined and left out: {reason}")
    return result, left_out


def _metrics(valid: Scored | None, test: Scored | None) -> tuple[Metrics, dict[str, str]]:
    assert valid is not None and test is not None
    result: Metrics = {}
    left_out: dict[str, str] = {}
    for split, each in (("valid", valid), ("test", test)):
        result[split] = evaluate(each.labels, each.logits, each.tail, each.kinds)
        reasons = undefined(each.labels, each.tail, each.kinds)
        left_out |= {f"{split} {name}": reason for name, reason in reasons.items()}
    calibration = calibrate(valid.labels, valid.logits)
    if calibration is None:
        return result, left_out | {"calibrated_logloss": "logits of validation part clicks from all others"}
    for split, each in (("valid", valid), ("test", test)):
        result[split]["calibrated_logloss"] = logloss(each.labels, calibration(each.logits))
    return result, left_out


def _ranking(valid: Scored | None, test: Scored | None) -> tuple[Metrics, dict[str, str]]:
    assert valid is not None and test is not None
    return {"valid": next_item_metrics(valid.logits), "test": next_item_metrics(test.logits)}, {}


def validate(logits: Callable[[Batch], Tensor], data: ClickSource, ranks: Ranks) -> dict[str, float]:
    """Return AUC and logloss, or what `next_item_metrics` tells, of the validation split, on every rank.

    Raises:
        ValueError: logits that are not finite.
    """
    scored = predict(logits, data, "valid", ranks)

    def measure() -> dict[str, float]:
        assert scored is not None
        if not np.isfinite(scored.logits).all():
            raise ValueError("validation logits must be finite, got NaN or infinity; lower the learning rates")
        if isinstance(data, SequenceData):
            return next_item_metrics(scored.logits)
        return evaluate(scored.labels, scored.logits, None, None)

    return on_first(measure, ranks)
