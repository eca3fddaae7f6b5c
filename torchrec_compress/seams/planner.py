"""What TorchRec's planner keeps to itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchrec.distributed.planner.types import ShardingOption, StorageReservation


def plan_as(option: ShardingOption, tensor: Tensor | None = None, is_pooled: bool | None = None) -> None:
    """Have the stock estimators see another tensor than an option's own, or other pooling; the option is changed."""
    if tensor is not None:
        option._tensor = tensor
    if is_pooled is not None:
        option._is_pooled = is_pooled


def reserved_share(reservation: StorageReservation) -> float:
    """Return the share of memory that a reservation holds back; the stock planner prints it when it finds no plan."""
    return getattr(reservation, "_percentage", 0.0)


def planner_parts(planner: Any) -> dict[str, Any]:
    """Return what a stock planner was made with, by the names that it takes, but for how it lists options."""
    names = {"proposer": "_proposers", "partitioner": "_partitioner", "performance_model": "_perf_model"}
    names |= {name: f"_{name}" for name in ("stats", "callbacks", "timeout_seconds", "debug")}
    return {name: getattr(planner, kept) for name, kept in names.items()}
