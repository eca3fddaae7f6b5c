"""Errors that all ranks raise together, so that none is left waiting in a collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardingEnv


def raise_together(error: Exception | None, env: ShardingEnv, device: torch.device) -> None:
    """Raise on every rank when one rank has an error; call it on every rank, before the next collective.

    On a CPU this is one all-reduce of 8 bytes. On a GPU ids are checked by the device itself, which never waits for
    the host, so there only a rank's own error is raised.

    Args:
        error: what this rank would raise, or None.
        env: ranks and process group.
        device: of the tables.

    Raises:
        Exception: this rank's error, or on the other ranks a ValueError that quotes it.
    """
    if env.process_group is None or env.world_size == 1 or device.type != "cpu":
        if error is not None:
            raise error
        return
    first = torch.tensor([-1 if error is None else env.world_size - env.rank])
    dist.all_reduce(first, dist.ReduceOp.MAX, group=env.process_group)
    if int(first) < 0:
        return
    rank = env.world_size - int(first)
    message = [str(error)]
    dist.broadcast_object_list(message, src=dist.get_global_rank(env.process_group, rank), group=env.process_group)
    if error is not None:
        raise error
    raise ValueError(f"rank {rank}: {message[0]}")
