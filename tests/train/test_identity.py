"""Done means done with these settings and data files, for every stage and for a comparison."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_compress.launch.preflight import check_output
from torchrec_compress.train import identity, sealed, stages
from torchrec_compress.train.compare.runs import _finished
from torchrec_compress.train.compare.worker import Worker, stamp
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.engine.loop import train
from torchrec_compress.train.evaluate.scoring import check_labels
from torchrec_compress.train.identity import check_unchanged, record
from torchrec_compress.train.ranks import start

CHANGES = [
    {"seed": 1},
    {"pretrain.batch_size": 120},
    {"model.embedding_dim": 8},
    {"data.tail_count": 4},
    {"retrain.epochs": 2.0},
    {"compression": {"*": {"method": "pq", "num_codes": 1, "codebook_size": 4}}},
    {"context": {"user": "item"}},
    {"parallel.init": "shards"},
]


def _copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def _run(config, folder):
    return stages.run(config, folder, folder / "full", start(config.parallel), None)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("left", ["all", "retrain", "pretrain"])
def test_a_folder_with_other_settings_is_refused(finished, tmp_path, change, left):
    """Finished, or begun: with the checkpoints of a stage alone."""
    folder, key = _copy(finished, tmp_path), next(iter(change))
    if left != "all":
        for name in ("fitted.pt", "model.pt", "summary.json"):
            (folder / name).unlink()
    if left == "pretrain":
        shutil.rmtree(folder / "retrain")
    config = override(finished.config, change)
    if left == "pretrain" and key in ("retrain.epochs", "compression", "context"):
        check_unchanged(config, folder)  # what comes after the full model may be mended
        return
    with pytest.raises(ValueError, match=rf"{key}.* must be .* as when it was written, got"):
        _run(config, folder)
    assert check_output(override(config, {"output": str(folder)})).outcome == "FAIL"


def test_a_run_whose_folder_looks_like_a_number_is_opened_again(finished, tmp_path):
    folder, config = _copy(finished, tmp_path), override(finished.config, {"output": "1e3"})
    record(config, folder, {})
    check_unchanged(config, folder)


def test_a_run_whose_full_model_lies_elsewhere_is_refused_too(finished, tmp_path):
    """As those of a comparison."""
    folder = _copy(finished, tmp_path)
    shutil.rmtree(folder / "full")
    with pytest.raises(ValueError, match=r"compression.* must be .* as when it was written, got"):
        check_unchanged(override(finished.config, {"compression": {}}), folder)


def test_settings_that_change_no_number_may_change(finished, tmp_path):
    free = {"num_threads": 2, "output": "x", "retrain.log_every": 1, "parallel.timeout": 3.0, "compare.seeds": [1]}
    free["parallel.sharding_types"] = {"user": ["row_wise", "table_wise"], "*": ["table_wise"]}  # who holds what
    check_unchanged(override(finished.config, free), finished.folder, identify(finished.config.data))
    assert check_output(override(finished.config, {"output": str(finished.folder)})).outcome == "ok"


def test_where_a_model_is_begun_tells_runs_of_a_comparison_apart(finished):
    marks = {init: stamp(override(finished.config, {"parallel.init": init})) for init in ("host", "shards")}
    assert marks["host"] != marks["shards"]
    assert stamp(override(finished.config, {"parallel.timeout": 3.0})) == marks["host"]


def test_a_checkpoint_of_another_seed_is_refused_by_the_loop(finished, ranks, tmp_path):
    """Whatever the folder's config.yaml says."""
    folder = _copy(finished, tmp_path)
    config = override(finished.config, {"seed": 1})
    data, files = stages.open_checked(config.data, ranks), identify(config.data)
    for stage in ("pretrain", "retrain"):
        where = next(folder.glob("full/*")) if stage == "pretrain" else folder
        with pytest.raises(ValueError, match="seed must be 0 as when it was written, got 1"):
            train(stages.full_model(config, data), stages._task(config, data, files, where, stage, None), ranks)


def _with_data(finished, tmp_path) -> tuple[RunConfig, Path]:
    """Return a run whose data file may be changed."""
    path = Path(shutil.copy(finished.config.data.path, tmp_path / "rows.parquet"))
    config = override(finished.config, {"data.path": str(path), "compression": {}})
    _run(config, tmp_path / "run")
    return config, path


def _change_a_label(path: Path) -> None:
    table = pq.read_table(path)
    labels = table["label"].to_numpy().copy()
    labels[0] = 1 - labels[0]
    changed = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    pq.write_table(changed, path, row_group_size=50)


@pytest.mark.parametrize("left", ["all", "full", "checkpoints"])
def test_another_data_file_under_the_same_name_is_noticed(finished, tmp_path, left):
    config, path = _with_data(finished, tmp_path)
    folder = tmp_path / "run"
    if left != "all":
        for file in [file for file in folder.iterdir() if file.is_file()]:
            file.unlink()
    if left == "checkpoints":
        next(folder.glob("full/*/summary.json")).unlink()
    os.utime(path)
    found = folder if left == "all" else tmp_path / "run2"
    if left != "all":
        shutil.copytree(folder / "full", found / "full")
        stages.pretrain(config, found / "full", start(config.parallel), None)  # the same content, whatever its time
    _change_a_label(path)
    with pytest.raises(ValueError, match=r"rows\.parquet\.sha256 must be"):
        _run(config, found) if left == "all" else stages.pretrain(config, found / "full", start(config.parallel), None)


def test_streamed_files_are_told_by_size_and_time(finished, tmp_path):
    config, path = _with_data(finished, tmp_path)
    told = identify(override(config.data, {"streaming": True}))
    assert told == {"rows.parquet": {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}}
    for name in ("train", "valid"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "parts" / name / "a.parquet")
    (tmp_path / "parts" / ".hidden.parquet").write_text("")
    parts = identify(override(config.data, {"path": str(tmp_path / "parts")}))
    assert list(parts) == ["train/a.parquet", "valid/a.parquet"] and "sha256" in parts["train/a.parquet"]
    streamed = identify(override(config.data, {"path": str(tmp_path / "parts"), "streaming": True}))
    assert all(told.keys() == {"bytes", "mtime_ns"} for told in streamed.values())
    assert identify(RunConfig().data) == {}


def test_a_comparison_takes_no_run_of_other_settings_or_data(finished, tmp_path):
    config, path = _with_data(finished, tmp_path)
    folder = tmp_path / "run"
    assert not _finished(folder, config)  # without a stamp it is not known to be this variant's
    sealed.write_text(folder / "fingerprint", stamp(config))
    assert _finished(folder, config)
    for change in ({"seed": 1}, {"retrain.epochs": 3.0}, {"data.tail_count": 9}):
        with pytest.raises(ValueError, match="was run with other settings"):
            _finished(folder, override(config, change))
    kept = (folder / "fingerprint").read_text()
    (folder / "fingerprint").write_text(kept[::-1])
    with pytest.raises(ValueError, match="fingerprint: is truncated or changed"):
        _finished(folder, config)
    (folder / "fingerprint").write_text(kept)
    kept = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(kept.replace("0.", "0.0", 1))
    with pytest.raises(ValueError, match=r"summary\.json: is truncated or changed"):
        _finished(folder, config)
    (folder / "summary.json").write_text(kept)
    _change_a_label(path)
    with pytest.raises(ValueError, match=r"rows\.parquet\.sha256 must be"):
        _finished(folder, config)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_split_of_one_label_is_refused_before_anything_is_trained(data, split, label):
    rows = data.split(split)
    changed = ClickData(**{**vars(data), split: type(rows)(rows.ids, rows.labels * 0 + label)})
    check_labels(data)
    with pytest.raises(ValueError, match=rf"the {split} split must have clicks and others, .* the label {int(label)}"):
        check_labels(changed)


def test_a_run_looks_at_the_labels_before_it_trains(finished, tmp_path):
    table = pq.read_table(finished.config.data.path)
    zero = pa.array(np.zeros(len(table), np.int8))
    pq.write_table(table.set_column(table.column_names.index("label"), "label", zero), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="the valid split must have clicks and others"):
        _run(override(finished.config, {"data.path": str(tmp_path / "rows.parquet")}), tmp_path / "run")
    assert not list(tmp_path.glob("run/full/*/pretrain"))


def test_a_process_reads_a_file_again_that_was_changed(finished, ranks, tmp_path):
    """A worker of a comparison keeps its data, and does several runs."""
    config, path = _with_data(finished, tmp_path)
    worker = Worker()
    first = worker.open(config.data, ranks)
    assert worker.open(config.data, ranks) is first
    _change_a_label(path)
    assert worker.open(config.data, ranks) is not first


def test_a_tail_of_one_label_is_left_out_and_said_so(finished, tmp_path, capsys):
    """JSON has no NaN, and a report no number that is none."""
    path = Path(shutil.copy(finished.config.data.path, tmp_path / "rows.parquet"))
    table = pq.read_table(path)
    users, labels = table["user"].to_numpy().copy(), table["label"].to_numpy()
    rare = np.flatnonzero(labels == 0)
    users[labels == 1], users[rare] = 0, 1 + np.arange(len(rare)) % 250
    table = table.set_column(table.column_names.index("user"), "user", pa.array(users))
    pq.write_table(table, path, row_group_size=50)
    change = {"data.path": str(path), "data.tail_tables": ["user"], "compression": {}}
    summary = _run(override(finished.config, change), tmp_path / "run")
    assert "tail_logloss" in summary["metrics"]["test"] and "tail_auc" not in summary["metrics"]["test"]
    assert summary["undefined"]["test tail_auc"].endswith("rows have the label 0")
    assert "test tail_auc is not defined and left out: all" in capsys.readouterr().out


def test_the_order_of_patterns_is_part_of_what_a_run_is():
    pq, int8 = {"method": "pq", "num_codes": 2}, {"method": "int8"}
    old = {"compression": {"user*": pq, "item": int8, "*": int8}}
    check_same(Path("run"), old, {"compression": {"item": int8, "user*": pq, "*": int8}})  # names come first anyway
    with pytest.raises(ValueError, match=r"the patterns of compression must come in the order \['user\*', '\*'\]"):
        check_same(Path("run"), old, {"compression": {"*": int8, "user*": pq, "item": int8}})


def test_a_finished_run_keeps_the_versions_that_made_it(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = (folder / "versions.json").read_text()
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "9.9"})
    identity.record(finished.config, folder, {})
    assert (folder / "versions.json").read_text() == before
    assert "(now 9.9)" in "".join(capsys.readouterr())
    (folder / "summary.json").unlink()
    identity.record(finished.config, folder, {})
    assert "9.9" in (folder / "versions.json").read_text()
