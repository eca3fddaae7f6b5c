"""The ranks of a run: one process alone, or those that torchrun started."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchrec_compress.train.config import ParallelConfig

Result = TypeVar("Result")
# A rank that fails takes its connections along. Its launcher names the first error by whole seconds, and ends the other
# ranks at once, so those who only lost a connection give it time.
_ECHO = 3.0
# errors that one rank tells the others
_TOLD = (ValueError, OSError, RuntimeError)
_BEATS = 4  # signs of life within the timeout, while rank 0 works and the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together.

    Args:
        rank: of this process.
        world: number of processes.
        local_world: processes on this host.
        device: where this process trains.
        timeout: seconds that a rank waits for another's sign of life.
        waiting: group on the CPU for whatever is agreed on between steps; None in one process.
        saving: group of the threads that write checkpoints, on the CPU; None in one process.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device
    timeout: float
    waiting: dist.ProcessGroup | None
    saving: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0


def start(config: ParallelConfig) -> Ranks:
    """Join the other ranks, or start a process group of this process alone, without any port.

    What trains in this process is handed the result. Every rank calls it; a process group that is there already is
    kept, and a device of another kind than it was begun for is not served by it.

    Args:
        config: device and timeout.

    Raises:
        ValueError: a GPU is asked for and there is none, or there are fewer GPUs than ranks on this host.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device = _device(config, local_world)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=config.timeout)
    if dist.is_initialized():
        pass
    elif "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
    groups: list[Any] = [None, None]
    if world > 1:
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in groups]
    return Ranks(dist.get_rank(), world, local_world, device, config.timeout, *groups)


def stop(ranks: Ranks) -> None:
    """Leave the process group of several ranks, when all is done; that of one process ends with it."""
    if ranks.world > 1:
        dist.destroy_process_group()


def end_for_all(error: BaseException, status: int) -> NoReturn:
    """End this process at once after an error, so that its launcher ends the other ranks, and report the error first.

    A usual exit would wait for threads that write a checkpoint together with ranks that wait for this one.

    Args:
        error: written where torchrun looks for the root cause.
        status: exit status of the process.
    """
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(_ECHO)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def _device(config: ParallelConfig, local_world: int) -> torch.device:
    """Return this rank's device."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.device_count() < local_world:
        raise ValueError(
            f"parallel.device: every rank must have a GPU of its own, got {local_world} ranks and "
            f"{torch.cuda.device_count()} GPUs on this host; start fewer processes, or set parallel.device=cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def on_first(work: Callable[[], Result], ranks: Ranks) -> Result:
    """Return on every rank what `work` returns on rank 0.

    The others wait as long as it takes, be it hours of fitting, but no longer than the timeout for a sign of life.

    Args:
        work: runs on rank 0; what it returns is pickled for the others. No collectives in it.
        ranks: all of them.

    Raises:
        ValueError, OSError: what `work` raised; on all ranks alike.
        RuntimeError: another rank is gone or gives no sign of life.
    """
    if ranks.world == 1:
        return work()
    found: list[Any] = [None, None]
    if ranks.is_first:
        done = threading.Event()
        beats = threading.Thread(target=_beat, args=(done, ranks), name="heartbeat", daemon=True)
        beats.start()
        try:
            found[0] = work()
        except _TOLD as error:  # not by its own type, which may want other arguments
            found[1] = next(kind for kind in _TOLD if isinstance(error, kind))(str(error))
        done.set()
        beats.join()
    else:
        while not _is_done(False, ranks):
            pass
    dist.broadcast_object_list(found, src=0, group=ranks.waiting)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _beat(done: threading.Event, ranks: Ranks) -> None:
    """Tell the others, again and again, whether rank 0 is done."""
    try:
        while not _is_done(done.wait(ranks.timeout / _BEATS), ranks):
            pass
    except RuntimeError:
        return  # a rank is gone: the main thread meets the same error when it broadcasts


def _is_done(mine: bool, ranks: Ranks) -> bool:
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, group=ranks.waiting)
    return bool(flag)


def agree(work: Callable[[], Result], ranks: Ranks) -> Result:
    """Return what this rank's `work` returns, or raise on all ranks where it fails on one.

    Args:
        work: of this rank; no collectives in it.
        ranks: all of them.

    Raises:
        ValueError, OSError: this rank's own error, or that of the first rank that failed, by its number.
    """
    if ranks.world == 1:
        return work()
    error, result = None, None
    try:
        result = work()
    except _TOLD as caught:
        error = caught
    errors = gather(None if error is None else (type(error).__name__, str(error)), ranks)
    failed = [(rank, found) for rank, found in enumerate(errors) if found is not None]
    if error is not None:
        raise error
    if failed:
        rank, (kind, text) = failed[0]
        raise (OSError if kind in ("OSError", "FileNotFoundError") else ValueError)(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """Return every rank's value, in the order of the ranks, on every rank.

    Example:
        >>> gather(3, Ranks(0, 1, 1, torch.device("cpu"), 60.0, None, None))
        [3]
    """
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=ranks.waiting)
    return values
