"""The order in which runs of a comparison begin: each as soon as its own full model is there."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future
from typing import Any

import pytest
from tqdm import tqdm

from torchrec_compress.train.compare import runs
from torchrec_compress.train.compare.worker import Job
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.stages import pretrained_key

INT8 = {"compression": {"*": {"method": "int8"}}}
HASH = {"start": "scratch", "compression": {"*": {"method": "hash", "num_buckets": 9}}}


class Pool:
    """A pool whose jobs end when they are told to, the first that were submitted first."""

    submitted: list[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        Pool.submitted, self._left = [], []
        Pool.made = self

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        assert not self._left, "jobs were left"

    def submit(self, _: Any, job: Job) -> Future:
        Pool.submitted.append(job[0])
        future: Future = Future()
        self._left.append((job[0], future))
        return future

    def end_first(self) -> str:
        name, future = self._left.pop(0)
        future.set_result((name, "done", "" if name != "full b" else "failed: no memory"))
        return name


@pytest.fixture
def begun(monkeypatch):
    """Return by job what had been submitted when it ended."""
    begun: dict[str, list[str]] = {}
    wait = runs.wait

    def end_one_and_wait(running, **options):
        name = Pool.made.end_first()
        begun[name] = list(Pool.submitted)
        return wait(running, **options)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "wait", end_one_and_wait)
    return begun


def test_a_run_begins_when_its_own_full_model_is_there_and_one_without_at_once(begun):
    configs = {name: override(RunConfig(), {"model.embedding_dim": dim}) for name, dim in (("a", 8), ("b", 16))}
    first: dict[str, Job] = {
        pretrained_key(config): (f"full {name}", config, "", "full") for name, config in configs.items()
    }
    left: list[Job] = [(f"int8 {name}", override(config, INT8), name, "full") for name, config in configs.items()]
    left.append(("hash", override(RunConfig(), HASH), "hash", "full"))
    there = override(RunConfig(), {**INT8, "model.embedding_dim": 32})  # its full model was trained before
    left.append(("int8 c", there, "c", "full"))
    with tqdm(disable=True) as bar:
        failed = runs._run_all(first, left, 2, bar)
    assert begun["full a"] == ["full a", "full b", "hash", "int8 c"]
    assert begun["full b"] == [*begun["full a"], "int8 a"]
    assert begun["int8 b"] == [*begun["full b"], "int8 b"]  # which tells why by itself
    assert failed == ["full b: failed: no memory"]


def test_nothing_left_starts_no_process():
    before = len(multiprocessing.active_children())
    with tqdm(disable=True) as bar:
        assert runs._run_all({}, [], 2, bar) == []
    assert len(multiprocessing.active_children()) == before
