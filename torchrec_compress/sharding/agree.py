"""Errors that all ranks raise together, so that none is left waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardingEnv

Result = TypeVar("Result")


class Recount(Exception):
    """A check of this rank needs a sum over all ranks first."""


def hears_of_errors(env: ShardingEnv, device: torch.device) -> bool:
    """Return whether `run_together` makes an error of one rank one of all: where there are others, on a CPU."""
    return env.process_group is not None and env.world_size > 1 and device.type == "cpu"


def run_together(
    check: Callable[[], Result], env: ShardingEnv, device: torch.device, recount: Callable[[], None] | None = None
) -> Result:
    """Return what a check of this rank's batch returns, or raise on every rank when it fails on one.

    Call it on every rank, before the next collective. On a CPU it costs one all-reduce of 8 bytes. On a GPU ids are
    checked by the device itself, which never waits for the host, so there only a rank's own error is raised.

    Args:
        check: raises ValueError, RuntimeError or KeyError for a bad batch, or Recount; no collectives in it.
        env: ranks and process group.
        device: of the tables.
        recount: sums up what `check` asks for, on all ranks as soon as one asks; then all check again.

    Raises:
        ValueError, RuntimeError, KeyError: this rank's error; on the other ranks a ValueError that quotes it.
    """
    group = env.process_group
    if group is None or not hears_of_errors(env, device):
        try:
            return check()
        except Recount:
            pass  # what changes state does so on all ranks, and so all ask
    else:
        error, result, place = None, None, -1
        try:
            result = check()
        except Recount:
            place = 0
        except (ValueError, RuntimeError, KeyError) as caught:
            error, place = caught, env.world_size - env.rank
        first = torch.tensor([place])
        dist.all_reduce(first, dist.ReduceOp.MAX, group=group)
        if int(first) > 0:
            rank = env.world_size - int(first)
            message = [str(error)]
            dist.broadcast_object_list(message, src=dist.get_global_rank(group, rank), group=group)
            raise error or ValueError(f"rank {rank}: {message[0]}")
        if int(first) < 0:
            return result  # type: ignore[return-value]
    assert recount is not None
    recount()
    return run_together(check, env, device, recount)
