"""Which bytes one shard of a table takes: weights, optimizer state and gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad

from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.modules.trained import TrainedCollection
from torchrec_compress.seams import backward_optimizer

DenseOptimizer: TypeAlias = str | float
"""Name of a dense optimizer, or its bytes of state per parameter."""

_DATA_TYPES = {torch.float32: DataType.FP32, torch.float16: DataType.FP16, torch.bfloat16: DataType.BF16}
# what native tables may be trained with in their backward, by the names in configs
FUSED_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
# Float32 values of state that FBGEMM keeps in a fused optimizer: per weight, per row of a shard. By the class that
# `apply_optimizer_in_backward` was given (torch's and TorchRec's share their names) or the sharder's `fused_params`.
_FUSED_STATE: dict[str, tuple[int, int]] = {
    "SGD": (0, 0),
    "LarsSGD": (1, 0),
    "Adagrad": (1, 0),
    "RowWiseAdagrad": (0, 1),
    "Adam": (2, 0),
    "PartialRowWiseAdam": (1, 1),
    "LAMB": (2, 0),
    "PartialRowWiseLAMB": (1, 1),
    "sgd": (0, 0),
    "exact_sgd": (0, 0),
    "lars_sgd": (1, 0),
    "exact_adagrad": (1, 0),
    "row_wise_adagrad": (0, 1),
    "exact_row_wise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_row_wise_adam": (1, 1),
    "lamb": (2, 0),
    "partial_row_wise_lamb": (1, 1),
    "none": (0, 0),
}
# values per parameter, in the parameter's own dtype, and bytes per tensor (PyTorch's float32 step count)
_DENSE_STATE: dict[str, tuple[int, int]] = {
    "sgd": (0, 0),
    "momentum": (1, 0),
    "adagrad": (1, 4),
    "rmsprop": (1, 4),
    "adam": (2, 4),
    "adamw": (2, 4),
}


@dataclass(frozen=True)
class ShardBytes:
    """The lasting bytes of one shard on its rank.

    Args:
        weights: the stored tensor itself.
        optimizer: state of the optimizer that trains it.
        gradient: its gradient, which with `DistributedModelParallel` is a view into DDP's bucket, so both at once.
        managed: what the manager of the table keeps beside its rows, as a sketch.
    """

    weights: int
    optimizer: int
    gradient: int
    managed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.optimizer + self.gradient + self.managed


def check_dense_optimizer(optimizer: DenseOptimizer) -> None:
    """Raise ValueError unless it is a known name or a number of bytes per parameter.

    Example:
        >>> check_dense_optimizer("adam")
    """
    known = optimizer in _DENSE_STATE if isinstance(optimizer, str) else optimizer >= 0
    if not known:
        raise ValueError(
            f"dense_optimizer: must be one of {sorted(_DENSE_STATE)} or bytes of state per parameter, got {optimizer!r}"
        )


def dense_state_bytes(num_values: int, optimizer: DenseOptimizer, value_bytes: int = 4) -> int:
    """Return the bytes of state that a dense optimizer keeps for one tensor of parameters.

    Args:
        num_values: parameters of the tensor.
        optimizer: its name, or its bytes of state per parameter, whatever the parameter's size.
        value_bytes: of a parameter, and so of a value of PyTorch's state.

    Example:
        >>> dense_state_bytes(1000, "adam"), dense_state_bytes(1000, "adam", 2), dense_state_bytes(1000, 2.0)
        (8004, 4004, 2000)
    """
    check_dense_optimizer(optimizer)
    if not isinstance(optimizer, str):
        return round(num_values * optimizer)
    per_value, per_tensor = _DENSE_STATE[optimizer]
    return num_values * per_value * value_bytes + per_tensor


def fused_state_bytes(rows: int, columns: int, optimizer: str | None) -> int:
    """Return the bytes of state that FBGEMM keeps for one shard of a table; None is no optimizer in the backward.

    They are float32 whatever the table is stored in. An optimizer that is not known counts one value per weight, as it
    does for TorchRec.

    Example:
        >>> fused_state_bytes(1000, 16, "RowWiseAdagrad"), fused_state_bytes(1000, 16, "Adam")
        (4000, 128000)
    """
    if optimizer is None or not rows * columns:
        return 0
    per_weight, per_row = _FUSED_STATE.get(optimizer, (1, 0))
    return 4 * (rows * columns * per_weight + rows * per_row)


def fused_optimizer(option: ShardingOption, fused_params: dict[str, Any] | None) -> str | None:
    """Return the name of the optimizer that runs in the backward of a table, or None.

    Args:
        option: of the table; `apply_optimizer_in_backward` leaves its mark on the tensor.
        fused_params: of its sharder, which count where there is no mark.
    """
    part = option.module[1]
    tensor = part.banks[option.name].handle if isinstance(part, TrainedCollection) else option.tensor
    marked = backward_optimizer(tensor)
    if marked is not None:
        return marked
    chosen = (fused_params or {}).get("optimizer")
    return None if chosen is None else str(getattr(chosen, "value", chosen))


def is_replicated(option: ShardingOption) -> bool:
    """Return whether every rank holds the whole tensor, and DDP and the dense optimizer train it."""
    return option.sharding_type == ShardingType.DATA_PARALLEL.value


def is_exact(option: ShardingOption) -> bool:
    """Return whether the bytes of an option are counted here: in device memory, without a cache before the host's."""
    return option.compute_kernel in (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)


def shard_bytes(
    option: ShardingOption, shard: Shard, fused_params: dict[str, Any] | None, dense_optimizer: DenseOptimizer
) -> ShardBytes:
    """Return the lasting bytes of one shard.

    Codes and frozen rows are integers: nothing trains them. Replicated floats are trained by the dense optimizer,
    whatever `apply_optimizer_in_backward` asked for, since DDP owns their gradients.

    Args:
        option: the table's sharding.
        shard: of the option.
        fused_params: of the sharder, or None.
        dense_optimizer: that trains replicated parameters.
    """
    rows, columns = shard.size
    value_bytes = option.tensor.element_size()
    weights = rows * columns * value_bytes
    part = option.module[1]
    if isinstance(part, TrainedCollection):
        return ShardBytes(weights, rows * part.state_bytes(option.name, fused_optimizer(option, fused_params)), 0)
    if not option.tensor.is_floating_point():
        return ShardBytes(weights, 0, 0)
    if is_replicated(option):
        return ShardBytes(weights, dense_state_bytes(rows * columns, dense_optimizer, value_bytes), weights)
    managed = managed_bytes(option) * rows // option.tensor.shape[0]
    return ShardBytes(weights, fused_state_bytes(rows, columns, fused_optimizer(option, fused_params)), 0, managed)


def managed_bytes(option: ShardingOption) -> int:
    """Return the bytes that the manager of a table keeps beside its rows; none where it has none."""
    part = option.module[1]
    return part.managed_bytes(option.name) if isinstance(part, ManagedCollection) else 0


def widest_type(dtypes: Iterable[torch.dtype | None]) -> DataType:
    """Return the data type that can hold all of some dtypes; None is float32."""
    found = {dtype or torch.float32 for dtype in dtypes}
    return _DATA_TYPES[reduce(torch.promote_types, found)]
