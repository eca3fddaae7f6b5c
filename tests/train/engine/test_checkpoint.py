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

from torchrec_compress.seams import local_shards
from torchrec_compress.train import sealed
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.engine import checkpoint
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.ranks import start
from torchrec_compress.train.stages import full_model, run

CONFIG = {"stage": {"batch_size": 4}, "seed": 0}


def _store(folder, ranks, config=CONFIG) -> Checkpoints:
    return Checkpoints(folder, config, ranks)


def _save(folder, step, ranks, size=100, **options):
    store = _store(folder, ranks)
    store.save(step, {"value": torch.full((size,), float(step))}, {"at": step}, **options)
    store.wait()
    return folder / f"step{step:09d}"


def _value(store: Checkpoints) -> float:
    """Return what the newest whole checkpoint holds."""
    saved, state = store.newest(), {"value": torch.zeros(100)}
    assert saved is not None and saved.notes == {"at": saved.step}
    store.load(saved, state)
    assert len(state["value"].unique()) == 1
    return float(state["value"][0])


def test_the_newest_is_loaded_and_old_ones_go(tmp_path, ranks):
    assert _store(tmp_path, ranks).newest() is None
    for step in (1, 2, 3):
        _save(tmp_path, step, ranks)
    assert _value(_store(tmp_path, ranks)) == 3
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step000000002", "step000000003"]


def test_a_protected_one_stays(tmp_path, ranks):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, ranks, protected=1)
    assert sorted(int(path.name[4:]) for path in tmp_path.glob("step*")) == [1, 3, 4]


def test_what_is_saved_is_what_it_was_when_save_was_called(tmp_path, ranks):
    store, value = _store(tmp_path, ranks), torch.ones(100)
    store.save(1, {"value": value}, {"at": 1})
    value.fill_(7.0)  # as the next training step would, while the writing goes on
    store.wait()
    assert _value(store) == 1


def test_a_copy_takes_no_more_than_the_tensors_themselves(config, data, ranks):
    """FBGEMM keeps all tables in one storage, which must not be copied once per table."""
    state = checkpoint._copied(Trainable(full_model(config, data), config.pretrain, ranks, config.parallel).state())
    parts = [part for value in state["model"].values() for part, _ in local_shards(value)]
    parts += [part for of in state["optimizer"]["state"].values() for v in of.values() for part, _ in local_shards(v)]
    assert len(parts) > 10
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "random_0.pt"])
def test_a_truncated_checkpoint_is_refused_and_the_older_one_used(tmp_path, capsys, ranks, name):
    _save(tmp_path, 1, ranks)
    newest = _save(tmp_path, 2, ranks) / name
    newest.write_bytes(newest.read_bytes()[:-1])
    assert _value(_store(tmp_path, ranks)) == 1
    said = capsys.readouterr().out
    assert f"step000000002: {name} is truncated" in said and "older step000000001" in said


def test_a_changed_byte_is_noticed(tmp_path, ranks):
    _save(tmp_path, 1, ranks)
    path = _save(tmp_path, 2, ranks) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert _value(_store(tmp_path, ranks)) == 1


def test_only_truncated_checkpoints_are_an_error(tmp_path, ranks):
    path = _save(tmp_path, 1, ranks) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"step000000001: .*truncated.*none is whole"):
        _store(tmp_path, ranks).newest()


def test_another_format_is_refused(tmp_path, ranks):
    path = _save(tmp_path, 1, ranks) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    sealed.write_sums(path.parent, {**(sealed.listed(path.parent) or {}), path.name: sealed.digest(path)})
    with pytest.raises(ValueError, match=rf"must be of format {checkpoint.FORMAT}, got 1.*none is whole"):
        _store(tmp_path, ranks).newest()


def test_another_config_is_refused_by_key(tmp_path, ranks):
    _save(tmp_path, 1, ranks)
    with pytest.raises(ValueError, match=r"stage\.batch_size must be 4 .* got 8"):
        _store(tmp_path, ranks, {"stage": {"batch_size": 8}, "seed": 0}).newest()


def test_another_model_is_refused(tmp_path, ranks):
    _save(tmp_path, 1, ranks)
    store = _store(tmp_path, ranks)
    with pytest.raises(ValueError, match="must fit the model"):
        store.load(store.at(1), {"value": torch.zeros(3)})
    with pytest.raises(ValueError, match="must fit the model"):
        store.load(store.at(1), {"other": torch.zeros(100)})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, ranks, call):
    """It fills up while the shards are written, or only when the finished checkpoint is about to be named."""
    _save(tmp_path, 1, ranks)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else checkpoint.Path, call, full)
    with pytest.raises(OSError, match=r"step 2 could not be written.*No space left.*step000000001 is still good"):
        _save(tmp_path, 2, ranks)
    monkeypatch.undo()
    assert _value(_store(tmp_path, ranks)) in (1, 2)
    assert not list(tmp_path.glob(".partial*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, ranks):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/checkpoints: must be writable"):
        _save(tmp_path / "file" / "checkpoints", 1, ranks)


def test_a_file_size_limit_at_save_leaves_the_old_checkpoint(tmp_path):
    """The system itself refuses the write, in a process of its own."""
    script = f"""
import pathlib, resource, signal, torch
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.stages import full_model
from torchrec_compress.train.config import ParallelConfig
from torchrec_compress.train.ranks import start
store = Checkpoints(pathlib.Path({str(tmp_path)!r}), {{}}, start(ParallelConfig(device="cpu")))
store.save(1, {{"value": torch.ones(10)}}, {{}})
store.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(2, {{"value": torch.ones(1_000_000)}}, {{}})
    store.wait()
except OSError as error:
    assert "step000000001 is still good" in str(error), error
else:
    raise SystemExit("the write should have failed")
assert store.newest().step == 1
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _train(config_file, output):
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
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_killed_at_any_step_it_resumes_and_ends_with_the_same_metrics(config, tmp_path):
    """Both stages, dropout, fused and dense optimizers; killed wherever it stands, several times.

    The runs that nobody kills are this process's own.
    """
    plain = dataclasses.asdict(config)
    stage = {"epochs": 3.0, "batch_size": 64, "evals_per_epoch": 2, "checkpoint_every": 7, "patience": 0}
    plain["model"]["dropout"] = 0.2
    plain["pretrain"] |= stage
    plain["retrain"] |= stage | {"distill_weight": 0.5}
    plain["compression"] = {"*": {"method": "pq", "num_codes": 2, "codebook_size": 16}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    chosen, kills = override(RunConfig(), plain), 0
    run(chosen, tmp_path / "whole", tmp_path / "whole" / "full", start(chosen.parallel), None)
    for pattern in ("full/*/pretrain/checkpoints/step*", "retrain/checkpoints/step*"):
        process = _train(tmp_path / "config.yaml", tmp_path / "killed")
        deadline = time.monotonic() + 150
        while process.poll() is None and time.monotonic() < deadline:
            if list((tmp_path / "killed").glob(pattern)):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
    assert kills == 2
    run(
        dataclasses.replace(chosen, output=str(tmp_path / "killed")),
        tmp_path / "killed",
        tmp_path / "killed/full",
        start(chosen.parallel),
        None,
    )
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert first["metrics"] == second["metrics"] and first["fitted"] == second["fitted"]
    for name in ("retrain", "full/*/pretrain"):
        logs = [next(tmp_path.glob(f"{run}/{name}/metrics.jsonl")).read_text() for run in ("whole", "killed")]
        assert logs[0] == logs[1]
