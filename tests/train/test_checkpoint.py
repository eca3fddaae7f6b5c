from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from torchrec_compress.train import checkpoint

CONFIG = {"stage": {"batch_size": 4}, "seed": 0}


def _save(folder, step):
    return checkpoint.save(folder, step, {"value": torch.full((100,), float(step))}, CONFIG)


def test_the_newest_is_loaded_and_old_ones_go(tmp_path):
    assert checkpoint.load(tmp_path, CONFIG) is None
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert checkpoint.load(tmp_path, CONFIG)["value"][0] == 3
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step000000002", "step000000003"]


def test_a_truncated_checkpoint_is_refused_and_the_older_one_used(tmp_path, capsys):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2) / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoint.load(tmp_path, CONFIG)["value"][0] == 1
    said = capsys.readouterr().out
    assert "step000000002: truncated" in said and "older step000000001" in said


def test_only_truncated_checkpoints_are_an_error(tmp_path):
    path = _save(tmp_path, 1) / "state.pt"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"step000000001: truncated.*none is whole"):
        checkpoint.load(tmp_path, CONFIG)


def test_another_config_is_refused_by_key(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"stage\.batch_size must be 4 .* got 8"):
        checkpoint.load(tmp_path, {"stage": {"batch_size": 8}, "seed": 0})


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*step000000001 is still good"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path, CONFIG)["value"][0] == 1
    assert not list(tmp_path.glob(".partial*"))


def test_a_file_size_limit_at_save_leaves_the_old_checkpoint(tmp_path):
    """The system itself refuses the write, in a process of its own."""
    script = f"""
import pathlib, resource, signal, torch
from torchrec_compress.train import checkpoint
folder = pathlib.Path({str(tmp_path)!r})
checkpoint.save(folder, 1, {{"value": torch.ones(10)}}, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(folder, 2, {{"value": torch.ones(1_000_000)}}, {{}})
except OSError as error:
    assert "is still good" in str(error), error
else:
    raise SystemExit("the write should have failed")
assert len(checkpoint.load(folder, {{}})["value"]) == 10
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _train(config_file, output, wait=True):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torchrec_compress",
        "train",
        str(config_file),
        "--output",
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if wait:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    return process


@pytest.mark.slow
def test_killed_at_any_step_it_resumes_and_ends_with_the_same_metrics(config, tmp_path):
    """Both stages, dropout, fused and dense optimizers; killed wherever it stands, several times."""
    plain = dataclasses.asdict(config)
    stage = {"epochs": 3.0, "batch_size": 64, "evals_per_epoch": 2, "checkpoint_every": 7, "patience": 0}
    plain["model"]["dropout"] = 0.2
    plain["pretrain"] |= stage
    plain["retrain"] |= stage | {"distill_weight": 0.5}
    plain["compression"] = {"*": {"method": "pq", "num_codes": 2, "codebook_size": 16}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    _train(tmp_path / "config.yaml", tmp_path / "whole")
    kills = 0
    for pattern in ("full/*/pretrain/checkpoints/step*", "retrain/checkpoints/step*"):
        process = _train(tmp_path / "config.yaml", tmp_path / "killed", wait=False)
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if list((tmp_path / "killed").glob(pattern)):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
    assert kills == 2
    _train(tmp_path / "config.yaml", tmp_path / "killed")
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert first["metrics"] == second["metrics"] and first["fitted"] == second["fitted"]
    for name in ("retrain", "full/*/pretrain"):
        logs = [next(tmp_path.glob(f"{run}/{name}/metrics.jsonl")).read_text() for run in ("whole", "killed")]
        assert logs[0] == logs[1]
