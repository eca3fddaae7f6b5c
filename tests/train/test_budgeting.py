"""What a budget gives to tables, and what their errors really cost."""

from __future__ import annotations

import json

import pytest
import torch

from torchrec_compress.methods import PQConfig
from torchrec_compress.train import asked, budgeting, stages
from torchrec_compress.train.config import override
from torchrec_compress.train.fitting import FullTables
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.click import make_tables

CODES = {"method": "pq", "num_codes": 1, "codebook_size": 16}
BUDGET = {"budget_ratio": 3.0, "num_codes": [1, 2], "codes": CODES}
ONE = PQConfig(num_codes=1, codebook_size=16, popularity="count")


def _asked(config, tmp_path, ranks, data):
    source = stages.pretrain(config, tmp_path / "full", ranks, None)
    return source, asked.curvature_of(config, data, source, ranks)


def test_a_measured_rise_is_that_of_a_run_in_which_one_table_alone_is_compressed(config, data, ranks, tmp_path):
    config = override(config, {"compression": {"user": ONE.to_dict(), "*": {"method": "dense"}}})
    summary = stages.run(config, tmp_path / "run", tmp_path / "full", ranks, None)
    source, curvature = _asked(config, tmp_path, ranks, data)
    full = json.loads((source / "summary.json").read_text())["metrics"]["valid"]["logloss"]
    known = budgeting.Known(config, data, source, data.counts(), curvature)
    found = budgeting.measured_rises({"user": ONE, "item": ONE}, known)
    assert found["user"] == pytest.approx(summary["fitted"]["valid"]["logloss"] - full, abs=1e-6)
    assert found["user"] != found["item"]
    alone = budgeting.measured_rises({"item": ONE}, known)
    assert alone["item"] == pytest.approx(found["item"], abs=1e-12)  # the other table was put back
    before = trained_model(config, data, source).state_dict()
    after = trained_model(config, data, source).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_budget_weighs_predictions_by_what_was_measured(config, data, ranks, tmp_path, monkeypatch):
    """A table whose errors are found to cost next to nothing gets fewer bytes than where they cost much."""
    sizes = {}
    for name, rise in (("dear", {"user": 1.0, "item": 1e-9}), ("cheap", {"user": 1e-9, "item": 1.0})):
        monkeypatch.setattr(
            budgeting,
            "measured_rises",
            lambda chosen, _, rise=rise: {key: rise.get(key, 0.1) for key in chosen},
        )
        mine = override(config, {"compression": BUDGET})
        stages.run(mine, tmp_path / name / "run", tmp_path / name / "full", ranks, None)
        summary = json.loads((tmp_path / name / "run" / "summary.json").read_text())
        sizes[name] = {key: table["total_bytes"] for key, table in summary["footprint"]["tables"].items()}
    assert sizes["cheap"]["user"] < sizes["dear"]["user"]
    assert sizes["cheap"]["item"] > sizes["dear"]["item"]


def test_the_least_of_a_prediction_is_believed_and_all_of_it_is_told(
    config, data, ranks, tmp_path, monkeypatch, caplog
):
    source, curvature = _asked(config, tmp_path, ranks, data)
    measured = budgeting.measure_frontier(
        dict(FullTables(best_checkpoint(source), make_tables(config.model, data))),
        data.counts(),
        curvature=curvature,
        num_codes=(1, 2),
        codes=ONE,
    )
    monkeypatch.setattr(budgeting, "measured_rises", lambda chosen, _: dict.fromkeys(chosen, -0.1))
    monkeypatch.setattr(budgeting, "_TRIED_AT", 0.2)
    known = budgeting.Known(config, data, source, data.counts(), curvature)
    tried = measured.choose(0.2 * known.dense_bytes)
    seen = {name for name, share in tried.shares.items() if share.error > 0.001 * tried.error}
    assert {name for name, share in tried.shares.items() if share.error > 0} > seen  # some are too small to measure
    with caplog.at_level("INFO"):
        found = budgeting._factors(measured, known)
    assert set(found) == seen and set(found.values()) == {0.05}
    assert "the loss on validation rises by -0.10000, predicted " in caplog.text
