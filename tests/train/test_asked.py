"""What the model of stage 1 is asked: the curvature of its loss, for the fit and for what it should cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from torchrec_compress.convert import measure_curvature, predicted_rise
from torchrec_compress.train import asked, stages
from torchrec_compress.train.compare.runs import compare
from torchrec_compress.train.config import ParallelConfig, RunConfig, override
from torchrec_compress.train.full import trained_model
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.sealed import load_tensors, save_tensors

CODES = {"*": {"method": "pq", "num_codes": 1, "codebook_size": 16, "structure": "residual", "popularity": "count"}}
SMALL = {"*": {"method": "narrow", "width": 4, "bits": 8, "optimizer": "rowwise_adagrad"}}


@functools.cache
def _ranks() -> Ranks:
    """Return this process among those of its pool, which it joins once."""
    return start(ParallelConfig(device="cpu"))


def _run(plain: dict, folder: str) -> dict:
    """Run on this rank of a pool, or alone."""
    return stages.run(override(RunConfig(), plain), Path(folder), Path(folder).parent / "full", _ranks(), None)


def _of(config, folder, **changes):
    return _run(dataclasses.asdict(override(config, {"compression": CODES, **changes})), str(folder))


def test_the_curvature_is_that_of_the_trained_model_on_validation(config, data, tmp_path):
    config = override(config, {"compression": CODES})
    source = stages.pretrain(config, tmp_path / "full", _ranks(), None)
    found = asked.curvature_of(config, data, source, _ranks())
    batches = data.batches("valid", 100, None).epoch(0)
    model = trained_model(config, data, source)
    wanted = measure_curvature(
        model, batches, lambda model, batch: model(batch.features, batch.dense).logits, group=_ranks().waiting
    )
    assert found.keys() == wanted.keys() == set(data.features)
    for name, mine in found.items():
        assert mine.examples == wanted[name].examples == data.num_rows("valid")
        torch.testing.assert_close(mine.matrix, wanted[name].matrix, rtol=1e-4, atol=1e-9)


def test_it_is_measured_once_for_all_runs_and_as_many_rows_as_asked(config, data, tmp_path, monkeypatch):
    calls, measure = [], asked.measure_curvature
    monkeypatch.setattr(
        asked, "measure_curvature", lambda *given, **named: (calls.append(1), measure(*given, **named))[1]
    )
    monkeypatch.setattr(asked, "_CURVATURE_BATCH", 64)
    for name, compression in {"a": CODES, "b": {"*": {"method": "int8"}}}.items():
        _of(config, tmp_path / name, compression=compression, curvature_rows=100)
    assert calls == [1]
    source = next((tmp_path / "full").iterdir())
    [kept] = source.glob("curvature*")
    assert kept.name == "curvature100"
    found = asked.curvature_of(override(config, {"curvature_rows": 100}), data, source, _ranks())
    assert {mine.examples for mine in found.values()} == {128}  # two whole batches
    _of(config, tmp_path / "c", curvature_rows=40)
    assert len(calls) == 2


def test_codes_are_fitted_in_the_metric_and_told_what_they_should_cost(config, data, tmp_path):
    squared = _of(config, tmp_path / "squared", curvature_rows=0)
    metric = _of(config, tmp_path / "metric")
    assert "predicted" not in squared and not (tmp_path / "squared" / "predicted.json").exists()
    assert squared["footprint"] == metric["footprint"]
    source = next((tmp_path / "full").iterdir())
    full = trained_model(config, data, source).embeddings
    curvature = asked.curvature_of(config, data, source, _ranks())
    rises = {}
    for name in ("squared", "metric"):
        model = stages.untrained(config, stages.check_config(override(config, {"compression": CODES})), data)
        model.load_state_dict(torch.load(tmp_path / name / "fitted.pt", weights_only=True))
        rises[name] = {
            table: predicted_rise(
                full.embedding_bags[table].weight,
                model.embeddings.table_rows(table, torch.arange(size)),
                data.counts()[table],
                curvature[table],
            )
            for table, size in zip(data.features, data.vocab, strict=True)
        }
    assert metric["predicted"] == pytest.approx(rises["metric"])
    assert rises["metric"]["user"] < 0.98 * rises["squared"]["user"]


def test_a_comparison_tells_prediction_beside_measurement(config):
    chosen = {name: {"compression": {"*": {**CODES["*"], "num_codes": codes}}} for name, codes in (("a", 1), ("b", 3))}
    chosen |= {"full": {}, "squared": {"compression": CODES, "curvature_rows": 0}}
    chosen["small"] = {"pretrain_compression": SMALL, "compression": {"*": {"method": "int8"}}}
    output = compare(override(config, {"compare": {"variants": chosen, "num_workers": 1}}))
    rows = json.loads((output / "report.json").read_text())["variants"]
    assert "predicted" not in rows["full"] and "predicted" not in rows["squared"]
    assert rows["b"]["predicted"] < rows["a"]["predicted"]
    small = dict(rows["small"]["fitted_gap"]["logloss"])  # against the small model, not the full one
    assert abs(small["mean"]) < 0.1 * abs(
        rows["small"]["test"]["logloss"]["mean"] - rows["full"]["test"]["logloss"]["mean"]
    )
    gap = rows["a"]["test"]["logloss"]["mean"] - rows["full"]["test"]["logloss"]["mean"]
    assert rows["a"]["fitted_gap"]["logloss"]["mean"] == pytest.approx(gap)
    lines = (output / "report.md").read_text().partition("## Predicted and measured")[2].splitlines()
    table = [line for line in lines if line.startswith("| a |") or line.startswith("| b |")][:2]
    assert [line[:5] for line in table] == ["| b |", "| a |"]
    assert f"| {rows['b']['predicted']:.4f} | {rows['b']['fitted_gap']['logloss']['mean']:+.4f} |" in table[0]


def test_small_tables_have_a_curvature_too(config, tmp_path):
    small = {"pretrain_compression": SMALL, "compression": {"*": {**CODES["*"], "width": 4}}}
    found = _of(config, tmp_path / "small", **small)
    assert all(rise >= 0 for rise in found["predicted"].values()) and found["predicted"]["user"] > 0


def test_a_resumed_run_tells_the_same(config, tmp_path, monkeypatch):
    found = _of(config, tmp_path / "a")
    for name in ("summary.json", "model.pt"):
        (tmp_path / "a" / name).unlink()
    monkeypatch.setattr(asked, "measure_curvature", None)  # it is not called again
    assert _of(config, tmp_path / "a")["predicted"] == found["predicted"]


def test_a_folder_of_before_there_was_a_curvature_stays_what_it_was(config, tmp_path):
    _of(config, tmp_path / "a", curvature_rows=0)
    for path in (tmp_path / "a" / "config.yaml",):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "curvature_rows" not in line))
    sums = tmp_path / "a" / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "config.yaml" not in line))
    with pytest.raises(ValueError, match=r"curvature_rows must be .* as when it was written, got 65536"):
        _of(config, tmp_path / "a")
    _of(config, tmp_path / "a", curvature_rows=0)


def test_a_curvature_of_another_model_is_refused(config, tmp_path):
    for seed, name in enumerate("ab"):
        _of(config, tmp_path / name / "run", seed=seed)
    [source], [target] = (next((tmp_path / name / "full").iterdir()).glob("curvature*") for name in "ab")
    shutil.rmtree(target)
    shutil.copytree(source, target)
    (tmp_path / "b" / "run" / "fitted.pt").unlink()
    with pytest.raises(ValueError, match=r"curvature65536: seed must be 0 as when it was written, got 1"):
        _of(config, tmp_path / "b" / "run", seed=1)


def test_an_answer_of_other_tables_is_refused(config, data, tmp_path):
    config = override(config, {"compression": CODES})
    source = stages.pretrain(config, tmp_path / "full", _ranks(), None)
    asked.curvature_of(config, data, source, _ranks())
    path = source / "curvature65536" / "curvature.pt"
    whole = load_tensors(path)
    no_user = {name: value for name, value in whole.items() if not name.startswith("user.")}
    for tensors in ({}, no_user, {**whole, "nobody.matrix": torch.eye(2)}, {**whole, "user.lookups": -torch.ones(())}):
        save_tensors(path, tensors)
        with pytest.raises(ValueError, match=r"curvature\.pt: curvature.* must .*delete .*curvature65536"):
            asked.curvature_of(config, data, source, _ranks())


@pytest.mark.slow
def test_two_ranks_measure_the_same(config, tmp_path, two_ranks):
    plain = dataclasses.asdict(override(config, {"compression": CODES}))
    one = _run(plain, str(tmp_path / "one" / "run"))
    shutil.copytree(tmp_path / "one" / "full", tmp_path / "two" / "full")
    for kept in (tmp_path / "two" / "full").glob("*/curvature*"):
        shutil.rmtree(kept)
    first, second = two_ranks.run(_run, plain, str(tmp_path / "two" / "run"))
    assert first["predicted"] == second["predicted"]
    assert first["predicted"] == pytest.approx(one["predicted"], rel=1e-2)
