"""Gloo ranks that live as long as the test session: starting one costs seconds, asking it costs nothing."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

_ENVIRONMENT = dict(os.environ)


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=90),
    )
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001 (whatever it is, the test shall see it)
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def forkserver() -> Any:
    """Return the context of processes that are forked from one that has imported everything, and started no thread.

    They have the environment that the suite began with, whichever test asks first.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torchrec.distributed.model_parallel", "torchrec_compress.planner"])
    with patch.dict(os.environ, _ENVIRONMENT, clear=True):
        ensure_running()
    return context


class Ranks:
    """A process group of `world_size` processes that run a function of a test module on every rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context, rendezvous = forkserver(), tempfile.mktemp(prefix="ranks-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, rendezvous, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 200) -> list[Any]:
        """Return what the function returns on every rank; it finds its rank by torch.distributed.

        Raises:
            AssertionError: it raised on a rank, or a rank did not answer in time; the group is started anew next time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(5 if failures else timeout):
                failures.append(f"rank {rank}: no answer in {timeout} s")
                continue
            fine, result = pipe.recv()
            (results if fine else failures).append(result if fine else f"rank {rank}:\n{result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
