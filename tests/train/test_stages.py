from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_compress.compression import parse
from torchrec_compress.train import asked, budgeting, check, choosing, sealed, stages
from torchrec_compress.train.check import check_variants
from torchrec_compress.train.compare.report import collect, write_report
from torchrec_compress.train.compare.runs import compare
from torchrec_compress.train.config import ParallelConfig, RunConfig, override
from torchrec_compress.train.data.open import open_data
from torchrec_compress.train.engine import loop
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.evaluate.scoring import score
from torchrec_compress.train.full import untrained
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.sealed import write_json

STAGE = {"epochs": 1.0, "batch_size": 256, "distill_weight": 0.5}
PQ = {"*": {"method": "pq", "num_codes": 2, "codebook_size": 16}}


def _run(config, tmp_path, name, **changes):
    config = override(config, changes)
    return stages.run(config, tmp_path / name, tmp_path / "full", start(config.parallel), None)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "pq", "num_codes": 2, "codebook_size": 16},
        {"method": "mec", "num_codes": 2, "codebook_size": 16, "num_hot_rows": 5, "fit_options": {"num_steps": 5}},
        {"method": "int8"},
        {"method": "hash", "num_buckets": 20},
        {"method": "memcom", "num_buckets": 20},
    ],
)
@pytest.mark.parametrize("tables", ["adagrad", "adam"])
def test_three_stages_end_with_a_summary(config, tmp_path, method, tables):
    summary = _run(
        config,
        tmp_path,
        "a",
        compression={"*": method},
        **{"pretrain.optim.tables": tables, "retrain": vars(config.pretrain), "retrain.optim.tables": tables},
    )
    assert summary["footprint"]["ratio"] > 1 and summary["training"]["steps"] == 13
    assert {"auc", "logloss", "tail_auc"} <= set(summary["metrics"]["test"])
    # what was fitted competes with what was trained
    assert summary["metrics"]["valid"]["logloss"] <= summary["fitted"]["valid"]["logloss"] + 1e-6
    assert (tmp_path / "a" / "config.yaml").is_file() and (tmp_path / "a" / "versions.json").is_file()


@pytest.mark.parametrize("method", ["hash", "lma", "graph", "random", "quantile", "narrow"])
def test_tables_that_need_no_full_model_start_from_scratch(config, tmp_path, method):
    options = {"num_codes": 2, "codebook_size": 16}
    options = {"hash": {"num_buckets": 20}, "narrow": {"width": 4, "bits": 8}}.get(method, options)
    changes = {
        "start": "scratch",
        "compression": {"*": {"method": method, **options}},
        "retrain": vars(config.pretrain),
    }
    summary = _run(config, tmp_path, "a", **changes)
    assert not (tmp_path / "full").exists() and "fitted" not in summary
    with pytest.raises(ValueError, match=r"retrain\.epochs"):
        _run(config, tmp_path, "b", **{**changes, "retrain.epochs": 0.0})


def test_what_training_held_is_the_most_of_its_stages(config, tmp_path):
    whole = _run(config, tmp_path, "full alone")
    tables = whole["footprint"]["dense_bytes"]
    held = whole["held_bytes"]
    assert held == tables + whole["state_bytes"] and whole["state_bytes"] == tables / 8  # a value a row, no net's
    pq = {"compression": {"*": {"method": "pq", "num_codes": 2, "codebook_size": 16}}}
    assert _run(config, tmp_path, "a", **pq)["held_bytes"] == held
    narrow = {"method": "narrow", "width": 4, "bits": 8, "optimizer": "adagrad", "state_bits": 8}
    small = {"start": "scratch", "retrain": vars(config.pretrain), "compression": {"*": narrow}}
    found = _run(config, tmp_path, "b", **{**small, "retrain.optim.tables": "adagrad"})
    stored, state = found["footprint"]["total_bytes"], found["state_bytes"]
    assert found["held_bytes"] == stored + state
    kept = found["footprint"]["tables"].values()
    narrow_bytes = sum(table["dense_bytes"] for table in kept if table["method"] == "narrow")
    rows, projection = narrow_bytes // (4 * 8), 4 * 4 * 8
    number = sum(table["method"] == "narrow" for table in kept)
    left = tables - narrow_bytes
    assert stored == rows * 5 + number * projection + left and number > 1  # numbers of 8 bits, and scales
    # Adagrad in 8 bits with a count of steps, in 32 bits, and Adam of projections
    assert state == rows * 6 + number * 8 + left + number * (2 * projection + 4)


def test_a_start_from_scratch_depends_on_the_seed_alone(config, tmp_path):
    changes = {"start": "scratch", "compression": {"*": {"method": "hash", "num_buckets": 20}}}
    changes["retrain"] = vars(config.pretrain)
    first = _run(config, tmp_path, "a", **changes)
    torch.rand(7)  # as other jobs of the same process would
    assert _run(config, tmp_path, "b", **changes)["metrics"] == first["metrics"]
    assert _run(config, tmp_path, "c", seed=1, **changes)["metrics"] != first["metrics"]


def test_without_training_nothing_but_tables_changes(config, tmp_path):
    _run(config, tmp_path, "full_run")
    summary = _run(config, tmp_path, "a", compression=PQ)
    assert summary["metrics"] == summary["fitted"] and "training" not in summary
    full = torch.load(tmp_path / "full_run" / "model.pt", weights_only=True)
    mine = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    net = [name for name in full if not name.startswith("embeddings.")]
    assert net and all(torch.equal(full[name], mine[name]) for name in net)


def test_codes_stay_frozen_while_codebooks_train(config, tmp_path):
    _run(
        config,
        tmp_path,
        "a",
        compression=PQ,
        **{"retrain": vars(config.pretrain), "retrain.train_dense": False, "retrain.optim.codebook_lr": 0.01},
    )
    before = torch.load(tmp_path / "a" / "fitted.pt", weights_only=True)
    after = {name: value.clone() for name, value in before.items()}
    read(sorted((tmp_path / "a/retrain/checkpoints").glob("step*"))[-1], {"model": after})
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("codebooks" in name for name in moved)
    assert not any("codes" in name.split(".") or not name.startswith("embeddings.") for name in moved)


LOW_BIT = {"*": {**PQ["*"], "codebook_dtype": "int8", "num_hot_rows": 5, "hot_dtype": "int8"}}


def test_codebooks_and_hot_rows_of_few_bits_train_in_float32_and_are_stored_rounded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "held_bytes", lambda source: 0)  # of stage 1, which holds more
    config = override(config, {"model.dropout": 0.5})
    rates = {"retrain": vars(config.pretrain), "retrain.train_dense": False, "retrain.optim.codebook_lr": 0.01}
    rates["retrain.dequantize"] = True
    summary = _run(config, tmp_path, "a", compression=LOW_BIT, **rates)
    before = torch.load(tmp_path / "a" / "fitted.pt", weights_only=True)
    after = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"codebooks", "hot_rows", "is_set", "weight"}
    assert all(after[name].dtype == before[name].dtype for name in moved)
    assert summary["metrics"]["valid"]["logloss"] < summary["fitted"]["valid"]["logloss"]
    data, ranks = open_data(config.data), start(config.parallel)
    model = untrained(config, parse(LOW_BIT), data)
    model.load_state_dict(after)
    model.eval()
    found, _ = score(lambda batch: model(batch.features, batch.dense).logits, data, config.data, ranks)
    assert found == summary["metrics"]  # of what is stored
    num_tables = sum(name.endswith("hot_rows") for name in moved)
    in_few_bits, in_floats = 32 * (4 + 4) + 5 * (8 + 4), 4 * (32 * 4 + 5 * 8)
    small = summary["footprint"]["total_bytes"]
    assert summary["held_bytes"] == small + num_tables * (in_floats - in_few_bits) + summary["state_bytes"]


@pytest.mark.parametrize("change", [{}, {"retrain.dequantize": True, "retrain.train_codebooks": False}])
def test_frozen_codebooks_of_few_bits_stay(config, tmp_path, change, monkeypatch):
    monkeypatch.setattr(stages, "held_bytes", lambda source: 0)
    rates = {"retrain": vars(config.pretrain), **change}
    summary = _run(config, tmp_path, "a", compression=LOW_BIT, **rates)
    before = torch.load(tmp_path / "a" / "fitted.pt", weights_only=True)
    after = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and not any(name.endswith(("codebooks", "hot_rows")) for name in moved)
    assert summary["held_bytes"] == summary["footprint"]["total_bytes"] + summary["state_bytes"]


def test_a_byte_budget_is_kept_and_chosen_once(config, tmp_path):
    changes = {
        "compression": {
            "budget_ratio": 3.0,
            "num_codes": [1, 2],
            "codes": {"method": "pq", "num_codes": 1, "codebook_size": 16},
        }
    }
    summary = _run(config, tmp_path, "a", **changes)
    assert summary["footprint"]["ratio"] >= 3.0
    stamp = (tmp_path / "a" / "compression.json").stat().st_mtime_ns
    _run(config, tmp_path, "a", **changes)
    assert (tmp_path / "a" / "compression.json").stat().st_mtime_ns == stamp


def test_budgets_of_one_full_model_share_a_measurement(config, tmp_path, monkeypatch):
    codes = {"method": "pq", "num_codes": 1, "codebook_size": 16}
    _run(config, tmp_path, "a", compression={"budget_ratio": 3.0, "num_codes": [1, 2], "codes": codes})
    (kept,) = tmp_path.glob("**/frontiers/*/frontier.json")
    plain, measure = json.loads(kept.read_text()), budgeting.measure_frontier
    assert plain["unit"] == "loss" and len(plain["tables"]) > 1
    monkeypatch.setattr(budgeting, "measure_frontier", None)
    more = _run(config, tmp_path, "b", compression={"budget_ratio": 2.0, "num_codes": [1, 2], "codes": codes})
    assert 2.0 <= more["footprint"]["ratio"] < 3.0
    calls = []
    monkeypatch.setattr(
        budgeting, "measure_frontier", lambda *given, **named: (calls.append(1), measure(*given, **named))[1]
    )
    _run(config, tmp_path, "c", compression={"budget_ratio": 3.0, "num_codes": [1], "codes": codes})
    assert calls == [1]
    squared = {"budget_ratio": 3.0, "num_codes": [1, 2], "codes": codes}
    _run(config, tmp_path, "squared", compression=squared, curvature_rows=0)
    units = {json.loads(path.read_text())["unit"] for path in tmp_path.glob("**/frontiers/*/frontier.json")}
    assert units == {"loss", "squared error"} and calls == [1, 1]
    for change, message in (
        (lambda found: found["identity"].update(checkpoint="other"), "checkpoint must be 'other'"),
        (lambda found: found.update(unit="AUC"), "must have tables and a unit .*; delete"),
        (lambda found: found["tables"].popitem(), "must be of tables"),
    ):
        changed = json.loads(json.dumps(plain))
        change(changed)
        write_json(kept, changed)
        with pytest.raises(ValueError, match=message):
            _run(config, tmp_path, "d", compression={"budget_ratio": 4.0, "num_codes": [1, 2], "codes": codes})


def test_a_budget_is_read_once(config, tmp_path, monkeypatch):
    calls, read_budget = [], check.budget_of
    monkeypatch.setattr(check, "budget_of", lambda plain: (calls.append(plain), read_budget(plain))[1])
    for plain in ({"budget_ratio": 3.0, "num_codes": [1, 2]}, PQ):
        _run(config, tmp_path, f"run{len(calls)}", compression=plain)
    assert calls == [{"budget_ratio": 3.0, "num_codes": [1, 2]}, PQ]


def test_a_run_has_no_ranks_but_those_it_is_handed(config, tmp_path, monkeypatch):
    """Of all three stages and of a full model alone: whoever waits for, tells or counts with others does so on them."""
    mine, seen = start(ParallelConfig(device="cpu", timeout=7.0)), {}
    uses = [(stages, name) for name in ("agree", "on_first", "score", "train")]
    uses += [(choosing, "total_counts"), *((asked, name) for name in ("on_first", "predict", "Trainable"))]
    for module, name in (*uses, (loop, "Trainable"), (loop, "Checkpoints"), (loop, "validate")):
        used = getattr(module, name)

        def watched(*given, key=f"{module.__name__}.{name}", used=used, **named):
            seen.setdefault(key, []).append([value for value in given if isinstance(value, Ranks)])
            return used(*given, **named)

        monkeypatch.setattr(module, name, watched)
    for name, change in {"full": {}, "pq": {"compression": PQ, "retrain": STAGE}}.items():
        stages.run(override(config, change), tmp_path / name, tmp_path / "full", mine, None)
    assert len(seen) == 11
    for name, found in seen.items():
        assert all(ranks is mine for [ranks] in found), name


def test_a_folder_with_other_settings_is_refused_by_key(config, tmp_path):
    _run(config, tmp_path, "a", compression=PQ)
    with pytest.raises(ValueError, match=r"compression\.\*\.num_codes must be 2 .* got 4"):
        _run(config, tmp_path, "a", compression={"*": {**PQ["*"], "num_codes": 4}})
    others = {
        "seed": 1,
        "context": {"user": "item"},
        "data.tail_count": 3,
        "data.generator.seed": 8,
        "model.dropout": 0.5,
        "pretrain.optim.table_lr": 0.01,
        "retrain.patience": 3,
    }
    for key, value in others.items():
        named = r"context\.user" if key == "context" else key.replace(".", r"\.")
        with pytest.raises(ValueError, match=rf": {named} must be .* as when it was written"):
            _run(config, tmp_path, "a", compression=PQ, **{key: value})
    free = {"num_threads": 2, "output": "elsewhere", "tensorboard": True, "parallel.timeout": 60.0}
    _run(config, tmp_path, "a", compression=PQ, **free, **{"pretrain.log_every": 1, "compare.num_workers": 1})


def test_full_models_are_shared_by_what_they_depend_on(config):
    key = stages.pretrained_key(config)
    assert stages.pretrained_key(override(config, {"compression": PQ, "retrain.epochs": 1.0, "output": "x"})) == key
    for change in ({"seed": 1}, {"model.dropout": 0.5}, {"pretrain.epochs": 2.0}, {"data.tail_count": 3}):
        assert stages.pretrained_key(override(config, change)) != key


@pytest.mark.parametrize(
    ("change", "key"),
    [({"context": {"user": "usr"}}, r"context\.user"), ({"retrain.distill_weight": 0.5}, r"retrain\.distill_weight")],
)
def test_bad_stages_name_their_key(config, tmp_path, change, key):
    codes = {"method": "quantile", "num_codes": 2, "codebook_size": 16}
    with pytest.raises(ValueError, match=key):
        _run(
            config,
            tmp_path,
            "a",
            start="scratch",
            compression={"*": codes},
            **{"retrain": vars(config.pretrain), **change},
        )


def _comparison(config: RunConfig) -> RunConfig:
    chosen = {
        "full": {},
        "pq": {"compression": PQ},
        "bad": {"pretrain.optim.dense_lr": 1e30},  # a loss that is not finite, which no check can know
    }
    return override(config, {"compare": {"variants": chosen, "seeds": [0, 1], "num_workers": 1}})


@pytest.mark.slow
def test_compare_reports_resumes_and_survives_a_bad_variant(config, capfd):
    config = _comparison(config)
    output = compare(config)
    report = json.loads((output / "report.json").read_text())
    assert list(report["variants"]) == ["full", "pq"] and report["variants"]["pq"]["seeds"] == [0, 1]
    assert report["variants"]["pq"]["held_bytes"] == report["variants"]["full"]["held_bytes"] > 0
    assert report["variants"]["full"]["state_bytes"] > 0 and report["variants"]["pq"]["state_bytes"] is None
    assert len(list((output / "full").glob("*/summary.json"))) == 2  # one per seed, shared by the variants
    text = (output / "report.md").read_text()
    assert "| pq |" in text and " ± " in text and "Best possible" in text
    assert all(
        (output / name).is_file() for name in ("auc_against_bytes.png", "logloss_against_bytes.png", "code_usage.png")
    )
    assert "bad seed 1: failed: ValueError" in capfd.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/seed*/summary.json")}
    compare(override(config, {"compare.only": ["full", "pq"]}))
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with pytest.raises(ValueError, match="other settings"):
        compare(override(config, {"pretrain.epochs": 2.0, "compare.only": ["full"]}))


def test_variants_are_overrides_with_checked_keys(config):
    config = _comparison(config)
    assert check_variants(config)["pq"].compression == PQ
    for change, message in (
        ({"compare.only": ["pqq"]}, "did you mean 'pq'"),
        (
            {"compare.variants": {"a": {"model.embeding_dim": 3}}},
            "did you mean 'compare.variants.a.model.embedding_dim'",
        ),
        ({"compare.variants": {}}, "must have variants"),
        ({"compare.variants": {"a": {"model.embedding_dim": "x"}}}, "must be int at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_variants(override(config, change))


def test_overrides_take_every_type_of_a_key():
    config = override(RunConfig(), {"data.split": None, "data.hash_size": {"a": 3}, "model.init_scale": None})
    assert config.data.split is None and config.model.init_scale is None
    assert override(config, {"data.hash_size": 5}).data.hash_size == 5
    for key, value in (("data.label", 3), ("seed", None), ("data.hash_size", "x"), ("tensorboard", 1)):
        with pytest.raises(ValueError, match=rf"{key}: must be "):
            override(config, {key: value})


def test_a_report_needs_finished_runs(tmp_path):
    with pytest.raises(ValueError, match="finished runs"):
        write_report(tmp_path)


def _note_run(output: Path, name: str, seed: int, auc: float, **more: Any) -> None:
    """Write what a finished run leaves for the report."""
    folder = output / "runs" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    metrics = {"auc": auc, "logloss": 0.5}
    size = {"total_bytes": 10, "dense_bytes": 20, "ratio": 2.0, "compressed_ratio": 2.0}
    summary = {"seed": seed, "metrics": {"test": metrics, "valid": metrics}, "footprint": size, "bayes": {}}
    write_json(folder / "summary.json", {**summary, **more})


def test_examples_a_second_are_those_of_the_training_over_seeds(tmp_path):
    for seed, rate in enumerate((1000.0, 4000.0)):
        told = {"training": {"rows_per_second": rate}, "state_bytes": 7, "held_bytes": 17}
        _note_run(tmp_path, "trained", seed, 0.7, **told)
    _note_run(tmp_path, "fitted", 0, 0.7)
    lines = [line.split(" | ") for line in write_report(tmp_path).read_text().splitlines() if line.startswith("| ")]
    columns = [lines[0].index(title) for title in ("optimizer state", "held in training", "examples/s")]
    found = {cells[0]: [cells[column] for column in columns] for cells in lines[1:]}
    assert found == {"| trained": ["7", "17", "2,500"], "| fitted": ["-", "-", "-"]}


def test_spread_is_over_seeds(tmp_path):
    for seed, value in enumerate((0.7, 0.8)):
        _note_run(tmp_path, "a", seed, value)
    found = collect(Path(tmp_path))["variants"]["a"]
    assert found["test"]["auc"]["mean"] == pytest.approx(0.75)
    assert found["test"]["auc"]["spread"] == pytest.approx(0.0707106, abs=1e-6)


def test_configs_are_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_a_full_disk_while_a_model_is_written_leaves_nothing_half(config, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(sealed.torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written"):
        sealed.save_tensors(tmp_path / "model.pt", {"a": torch.ones(2)})
    assert not list(tmp_path.iterdir())
