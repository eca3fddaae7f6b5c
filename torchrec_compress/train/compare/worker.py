"""A process of a comparison, which does one job after another."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from torchrec_compress.train import stages
from torchrec_compress.train.config import DataConfig, ParallelConfig, RunConfig, fingerprint, lasting
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.evaluate.metrics import QUALITY
from torchrec_compress.train.journal import write_atomically
from torchrec_compress.train.machine import give_back, prepare
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.sealed import to_json, write_text

# name, config, folder of the run ("" trains the full model alone), folder of full models
Job = tuple[str, RunConfig, str, str]


class Worker:
    """Does jobs of a comparison one after another; most read the same rows, so those that were read last are kept.

    Args:
        position: line of its progress bars; None shows none.
    """

    def __init__(self, position: int | None = None) -> None:
        self._position = position
        self._ranks: Ranks | None = None
        self._opened: tuple[str, ClickSource] | None = None

    def run(self, job: Job) -> tuple[str, str, str]:
        """Return a job's name, what to say about it, and what went wrong."""
        name, config, folder, shared = job
        prepare(config.num_threads)
        try:
            ranks = self.join(config.parallel)
            if not folder:
                source = stages.pretrain(config, Path(shared), ranks, self._position, self.open)
                return name, f"trained, {source}", ""
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "fingerprint", stamp(config))
            summary = stages.run(config, path, Path(shared), ranks, self._position, self.open)
            test, size = summary["metrics"]["test"], summary["footprint"]
            text = "test " + " ".join(f"{title} {test[key]:.4f}" for key, title in QUALITY.items() if key in test)
            return name, f"{text}, {size['total_bytes']:,} bytes ({size['ratio']:.1f}x)", ""
        except Exception as error:  # noqa: BLE001 (one failed variant must not stop the others)
            where = Path(folder or shared)
            where.mkdir(parents=True, exist_ok=True)
            path = where / f"error-{os.getpid()}.json"
            write_atomically(path, to_json(path, {"job": name, "traceback": traceback.format_exc()}))
            return name, "", f"failed: {type(error).__name__}: {error}"
        finally:
            give_back()

    def join(self, config: ParallelConfig) -> Ranks:
        """Return this process as a job wants it, whose process group serves its device."""
        ranks = start(config)
        if self._ranks is not None and self._ranks.device.type != ranks.device.type:
            dist.destroy_process_group()
            ranks = start(config)
        self._ranks = ranks
        return ranks

    def open(self, config: DataConfig, ranks: Ranks) -> ClickSource:
        """Return a job's data: what was opened last, where files, settings and device are the same, else anew."""
        key = fingerprint(config, identify(config), ranks.device.type)
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # two may not fit in memory
            self._opened = key, stages.open_checked(config, ranks)
        return self._opened[1]


def stamp(config: RunConfig) -> str:
    """Return what tells a run's settings in its folder, those left out that change no number."""
    same = dataclasses.replace(
        config, output="", num_threads=1, tensorboard=True, parallel=ParallelConfig(init=config.parallel.init)
    )
    return fingerprint(lasting(same))


# set once, by what begins the process: a pool hands its functions nothing but the job
_worker = Worker()


def begin(lock: Any, slots: Any, parent: int) -> None:
    """Prepare a process of the pool: its line for a progress bar, and an end with its parent, also when that is killed.

    Args:
        lock: of the terminal, shared by all.
        slots: queue of the lines that are free.
        parent: its process number; asked here, a parent that is killed early would be taken for the one that adopts us.
    """
    global _worker
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tqdm.set_lock(lock)
    _worker = Worker(slots.get() if sys.stderr.isatty() else None)


def run_job(job: Job) -> tuple[str, str, str]:
    """Do a job on this process' worker."""
    return _worker.run(job)


def _end_with(parent: int) -> None:
    """Leave as soon as the parent is gone; a killed `compare` would otherwise leave its workers training."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
