"""Workers of a comparison keep what the next job needs, mix up no two jobs, and end with their parent."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from torchrec_compress.train import ranks as joining
from torchrec_compress.train import stages
from torchrec_compress.train.compare.worker import Job, Worker
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.ranks import Ranks, start

CHILD = """
import os, subprocess, sys
watch = '''
import sys
from torchrec_compress.train.compare.worker import _end_with
print("up", flush=True)
_end_with(int(sys.argv[1]))
'''
command = [sys.executable, "-W", "ignore", "-c", watch, str(os.getpid())]
worker = subprocess.Popen(command, stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


@pytest.fixture
def handed(monkeypatch) -> list[Ranks]:
    """Return the ranks that runs are handed; none of them trains."""
    found: list[Ranks] = []
    summary = {"metrics": {"test": {"auc": 0.5, "logloss": 0.5}}, "footprint": {"total_bytes": 1, "ratio": 1.0}}
    monkeypatch.setattr(stages, "run", lambda *arguments: (found.append(arguments[3]), summary)[1])
    monkeypatch.setattr(stages, "pretrain", lambda *arguments: found.append(arguments[2]))
    return found


def _job(config: RunConfig, tmp_path, name: str, **changes) -> Job:
    return name, override(config, changes), str(tmp_path / name), str(tmp_path / "full")


def test_jobs_of_one_process_have_each_their_own_parallel(config, tmp_path, handed):
    worker = Worker()
    for timeout in (5.0, 9.0, 5.0):
        job = _job(config, tmp_path, "a", **{"parallel.timeout": timeout})
        assert not worker.run(job)[2] and not worker.run((*job[:2], "", job[3]))[2]
    assert [ranks.timeout for ranks in handed] == [5.0, 5.0, 9.0, 9.0, 5.0, 5.0]


def test_a_process_group_is_kept_between_jobs_but_for_another_kind_of_device(config, tmp_path, handed, monkeypatch):
    """Begun for a CPU, it would not serve a GPU; one that is there already costs nothing."""
    worker, groups = Worker(), []
    monkeypatch.setattr(joining, "_device", lambda parallel, _: torch.device("cpu" if parallel.timeout < 9 else "meta"))
    monkeypatch.setattr(dist, "init_process_group", lambda _, begin=dist.init_process_group, **at: begin("gloo", **at))
    for timeout in (5.0, 6.0, 9.0, 10.0, 5.0):
        assert not worker.run(_job(config, tmp_path, "a", **{"parallel.timeout": timeout}))[2]
        groups.append(dist.group.WORLD)
    assert [ranks.device.type for ranks in handed] == ["cpu", "cpu", "meta", "meta", "cpu"]
    assert groups[0] is groups[1] is not groups[2] and groups[2] is groups[3] is not groups[4]


def test_data_is_kept_for_the_next_job_and_read_anew_for_another(config, ranks, monkeypatch):
    worker, opened = Worker(), []
    monkeypatch.setattr(stages, "open_checked", lambda data, _: (opened.append(data), object())[1])
    other = override(config.data, {"generator.seed": 8})
    first = worker.open(config.data, ranks)
    assert worker.open(config.data, dataclasses.replace(ranks, timeout=3.0)) is first
    assert worker.open(config.data, dataclasses.replace(ranks, device=torch.device("cuda"))) is not first
    second = worker.open(other, ranks)
    assert second is not first and worker.open(other, ranks) is second and opened == [config.data] * 2 + [other]
    assert Worker().open(other, ranks) is not second  # what a worker keeps is its own


def test_jobs_over_other_data_are_what_they_are_alone(config, tmp_path):
    """Trained by one worker after the other, each from its own full model."""
    changes = ({"data.generator.seed": 7}, {"data.generator.seed": 8}, {"data.generator.seed": 7, "seed": 1})
    short = override(config, {"data.generator.num_rows": 1000})
    jobs, worker = [_job(short, tmp_path, f"job{i}", **change) for i, change in enumerate(changes)], Worker()
    found = []
    for name, run, folder, shared in jobs:
        assert worker.run((name, run, "", shared))[2] == ""
        assert worker.run((name, run, folder, shared))[2] == ""
        alone = stages.run(run, tmp_path / "alone" / name, tmp_path / "alone" / "full", start(run.parallel), None)
        found.append(json.loads((tmp_path / name / "summary.json").read_text()))
        assert found[-1]["metrics"] == alone["metrics"] and found[-1]["bayes"] == alone["bayes"]
    assert found[0]["bayes"] == found[2]["bayes"] != found[1]["bayes"]
