"""What an earlier version wrote is read: state dicts of every method, and the output of a comparison.

`stored/before.tar.xz` was made before the code moved into its present folders: by `torchrec-compress compare` with the
config inside it, and from the collections of `tests/cases.py`.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from tests.cases import CASES, NUM_ROWS, batch, fresh
from torchrec_compress.train import stages
from torchrec_compress.train.check import check_variants
from torchrec_compress.train.command_line import read
from torchrec_compress.train.compare import runs
from torchrec_compress.train.compare.runs import compare
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.ranks import start

# fits of then were to squared error, which a config says since there is another way
THEN = ["config.yaml", "--curvature_rows", "0"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).parent / "stored" / "before.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    return folder


def test_a_state_dict_of_every_method_loads_and_gives_the_same_rows(stored):
    paths = sorted((stored / "collections").iterdir())
    found = {path.stem.split("-")[0] for path in paths}
    assert len(found) == 9 and found <= set(CASES)
    for path in paths:
        name, number = path.stem.split("-")
        saved = torch.load(path, weights_only=True)
        collection = fresh(CASES[name][int(number)])
        assert list(collection.state_dict()) == list(saved["state"])
        collection.load_state_dict(saved["state"])
        rows = collection(batch([[number] for number in range(0, NUM_ROWS, 13)])).values()
        torch.testing.assert_close(rows, saved["rows"], msg=lambda text, path=path: f"{path.stem}: {text}")


def test_a_comparison_goes_on_where_it_stood(stored, tmp_path, monkeypatch):
    shutil.copytree(stored, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    config = read(RunConfig(), THEN, "")
    summaries = {path: path.read_text() for path in Path("out").glob("runs/*/seed0/summary.json")}
    assert len(summaries) == 3
    monkeypatch.setattr(runs, "_run_all", lambda first, left, *_: [job[0] for job in [*first.values(), *left]])
    compare(config)
    assert summaries == {path: path.read_text() for path in summaries}
    report = json.loads(Path("out/report.json").read_text())
    assert set(report["variants"]) == {"full", "pq", "hash"}


def test_a_report_is_of_the_runs_that_its_config_stands_for(stored, tmp_path, monkeypatch, capsys):
    shutil.copytree(stored, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    config = read(RunConfig(), THEN, "")
    assert len(runs._reported(config, Path("out"))) == 3
    changed = override(config, {"pretrain.epochs": 2.0, "compare.seeds": [1]})
    assert runs._reported(changed, Path("out")) == []
    renamed = dict(config.compare.variants)
    renamed["other"] = renamed.pop("hash")
    kept = runs._reported(override(config, {"compare.variants": renamed}), Path("out"))
    assert [path.parent.name for path in kept] == ["full", "pq"]
    assert "hash/seed0: left out of the report: its name is none of compare.variants" in capsys.readouterr().err


def test_runs_of_before_there_was_a_curvature_are_not_mixed_with_others(stored, tmp_path, monkeypatch):
    shutil.copytree(stored, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(ValueError, match="other settings"):
        compare(read(RunConfig(), ["config.yaml"], ""))
    run = check_variants(read(RunConfig(), ["config.yaml"], ""))["pq"]
    with pytest.raises(ValueError, match=r"curvature_rows must be .* as when it was written, got 65536"):
        stages.run(run, Path("out/runs/pq/seed0"), Path("out/full"), start(run.parallel), None)


@pytest.mark.parametrize("name", ["pq", "hash"])
def test_a_run_goes_on_from_its_last_checkpoint(stored, tmp_path, monkeypatch, name):
    """Killed after its training, before the summary: checkpoints, fitted tables and the full model are read again."""
    shutil.copytree(stored, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    folder = Path("out/runs") / name / "seed0"
    before = json.loads((folder / "summary.json").read_text())
    for lost in ("summary.json", "model.pt"):
        (folder / lost).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.distcp")}
    run = check_variants(read(RunConfig(), THEN, ""))[name]
    after = stages.run(run, folder, Path("out/full"), start(run.parallel), None)
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.distcp")}  # no step was made
    for split in ("valid", "test"):
        found = after["metrics"][split]
        assert found.pop("calibrated_logloss") > 0  # which a version of then did not tell
        assert found == pytest.approx(before["metrics"][split], rel=1e-5)
