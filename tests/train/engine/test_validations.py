"""What validations decide: the best state, the end, and when rates fall."""

from __future__ import annotations

import dataclasses
import json

import pytest

from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig
from torchrec_compress.train.engine import loop
from torchrec_compress.train.engine.loop import Task, Trained, train
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.ranks import start
from torchrec_compress.train.stages import full_model

STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0)


def _watched(config, data, folder, monkeypatch, found: list[tuple[float, float]], **change) -> tuple[Trained, list]:
    """Train with a validation after every step that finds these (logloss, auc) one after the other."""
    values = iter(found)
    monkeypatch.setattr(loop, "validate", lambda *_: dict(zip(("logloss", "auc"), next(values), strict=True)))
    optim = OptimConfig(decay=change.pop("decay", "none"), decay_patience=change.pop("decay_patience", 0))
    stage = dataclasses.replace(STAGE, epochs=len(found) / 13, evals_per_epoch=13, optim=optim, **change)
    trained = train(full_model(config, data), Task(data, stage, 0, folder, position=None), start(ParallelConfig()))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trained, [line for line in lines if line["kind"] == "valid"]


FOUND = [(0.5, 0.6), (0.3, 0.61), (0.3, 0.8), (0.4, 0.8), (0.5, 0.7), (0.2, 0.7), (0.2, 0.9)]


@pytest.mark.parametrize(
    ("monitor", "patience", "best", "steps"),
    [("logloss", 0, 6, 7), ("auc", 0, 7, 7), ("logloss", 3, 2, 5), ("auc", 3, 3, 6), ("logloss", 1, 2, 3)],
)
def test_the_best_is_the_first_of_the_least_logloss_or_largest_auc(
    config, data, tmp_path, monkeypatch, monitor, patience, best, steps
):
    trained, lines = _watched(config, data, tmp_path, monkeypatch, FOUND, monitor=monitor, patience=patience)
    assert (trained.best_step, trained.steps, len(lines)) == (best, steps, steps)
    assert trained.checkpoint.name == f"step{best:09d}"


def test_patience_starts_anew_with_every_better_validation(config, data, tmp_path, monkeypatch):
    found = [(value, 0.5) for value in (0.5, 0.6, 0.4, 0.6, 0.3, 0.6, 0.6, 0.1)]
    trained, _ = _watched(config, data, tmp_path, monkeypatch, found, patience=2)
    assert (trained.best_step, trained.steps) == (5, 7)


def test_rates_fall_tenfold_after_every_validation_that_is_no_better(config, data, tmp_path, monkeypatch):
    factors, before = [], Trainable.set_rate
    monkeypatch.setattr(Trainable, "set_rate", lambda self, factor: (factors.append(factor), before(self, factor))[1])
    _, lines = _watched(config, data, tmp_path, monkeypatch, FOUND, decay="plateau")
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001, 0.001])
    assert [line["scale"] for line in lines] == factors


@pytest.mark.parametrize(
    ("decay", "patience", "expected"),
    [
        ("plateau", 1, [1] * 4 + [0.1] * 3),
        ("plateau", 2, [1] * 5 + [0.1] * 2),
        ("plateau", 9, [1] * 7),
        ("none", 0, [1] * 7),
    ],
)
def test_rates_fall_when_patience_is_spent(config, data, tmp_path, monkeypatch, decay, patience, expected):
    found = [(value, 0.5) for value in (0.5, 0.4, 0.6, 0.6, 0.6, 0.3, 0.6)]
    _, lines = _watched(config, data, tmp_path, monkeypatch, found, decay=decay, decay_patience=patience)
    assert [line["scale"] for line in lines] == pytest.approx(expected)


def test_rates_fall_linearly_to_a_fiftieth(config, data, tmp_path, monkeypatch):
    factors = []
    monkeypatch.setattr(Trainable, "set_rate", lambda self, factor: factors.append(factor))
    _watched(config, data, tmp_path, monkeypatch, [(0.5, 0.5)] * 100, decay="linear")
    assert factors == pytest.approx([max(0.02, 1 - step / 100) for step in range(100)])
