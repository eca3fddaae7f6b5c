"""TorchRec's DistributedModelParallel around a model, in one process or many, and its state as plain tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_compress.modules import native_parameters
from torchrec_compress.train.config import OptimConfig, StageConfig

_FUSED = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


def init_process_group() -> None:
    """Start a process group of this process alone, without any port, unless one is running.

    Raises:
        ValueError: under torchrun with several processes; batches are not shared out among ranks yet.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world != 1:
        raise ValueError(f"training: must run as one process, got WORLD_SIZE={world}; start it without torchrun")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Trainable:
    """A model under DistributedModelParallel with its optimizers.

    Args:
        model: holds embedding collections; its weights are kept.
        stage: which parts are trained, and how.

    Attributes:
        module: what to call; wraps the model.
        optimizer: all optimizers as one.

    Raises:
        ValueError: an l2 that the chosen optimizer does not support.
    """

    def __init__(self, model: nn.Module, stage: StageConfig) -> None:
        init_process_group()
        config = stage.optim
        _check(config)
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        weights = native_parameters(model)
        fused = config.tables in _FUSED and bool(weights)
        if fused:
            # a fused table cannot be left out of the backward, so one that is not trained has the rate 0
            rate = config.table_lr if stage.train_tables else 0.0
            apply_optimizer_in_backward(_FUSED[config.tables], weights, {"lr": rate})
        # before wrapping: DDP waits for a gradient of everything that requires one when it is made
        train = {"tables": stage.train_tables or fused, "codebooks": stage.train_codebooks, "dense": stage.train_dense}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(train[_part(name)])
        self.module = _wrap(model, shard=config.tables in _FUSED)
        load_plain(self.module, before)
        self._set_dense(stage, fused)

    def _set_dense(self, stage: StageConfig, fused: bool) -> None:
        """Group the replicated parameters by part and give each an Adam with its own rate."""
        config = stage.optim
        rates = {
            "tables": (config.table_lr, config.table_l2, stage.train_tables),
            # MEmCom's multipliers start at 1: l2 towards 0 would shrink whole rows away
            "scalars": (config.table_lr, 0.0, stage.train_tables),
            "codebooks": (config.codebook_lr, 0.0, stage.train_codebooks),
            "dense": (config.dense_lr, config.dense_l2, stage.train_dense),
        }
        groups: dict[str, dict[str, Any]] = {part: {} for part in rates}
        for name, parameter in in_backward_optimizer_filter(self.module.named_parameters()):
            part = "scalars" if name.endswith("__scalars.weight") else _part(name)
            groups[part][name] = parameter  # type: ignore[assignment]
        self.pulled = {**groups["dense"], **groups["codebooks"]}
        optimizers: list[tuple[str, KeyedOptimizerWrapper]] = []
        self.adams: dict[str, torch.optim.Adam] = {}
        for part, (rate, l2, train) in rates.items():
            if groups[part] and train:
                optimizer = KeyedOptimizerWrapper(
                    groups[part],
                    lambda p, rate=rate, l2=l2: torch.optim.Adam(p, lr=rate, weight_decay=l2, foreach=True),
                )
                self.adams[part] = optimizer._optimizer  # type: ignore[assignment]
                optimizers.append((part, optimizer))
        self.fused = self.module.fused_optimizer if fused else None
        everything = ([("fused", self.fused)] if self.fused is not None else []) + optimizers
        self.optimizer = CombinedOptimizer(everything)  # type: ignore[arg-type]
        self._groups = [(group, group["lr"]) for group in self.optimizer.param_groups]

    def set_rate(self, factor: float) -> None:
        """Set every learning rate to `factor` times its configured value."""
        for group, rate in self._groups:
            group["lr"] = rate * factor  # type: ignore[index]

    def model_state(self) -> dict[str, Tensor]:
        """Return copies of the model's whole tensors, by name."""
        return plain_state(self.module)

    def optimizer_bytes(self) -> int:
        """Return the bytes of this rank's optimizer state."""
        return sum(
            value.numel() * value.element_size() for key, value in self._tensors() if not key.startswith("model.")
        )

    def state(self) -> dict[str, Tensor]:
        """Return this rank's parameters, buffers and optimizer state as copies of plain tensors."""
        return {key: value.detach().clone() for key, value in self._tensors()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned.

        Raises:
            ValueError: tensors are missing or have another shape.
        """
        for part, optimizer in self.adams.items():
            saved = {key: value for key, value in state.items() if key.startswith(f"adam.{part}.")}
            _load_adam(optimizer, saved, f"adam.{part}.")
        for key, value in self._tensors():
            if key not in state or state[key].shape != value.shape:
                raise ValueError(f"checkpoint: must hold {key!r} of shape {tuple(value.shape)}; it is of another model")
            value.copy_(state[key])

    @torch.no_grad()
    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.module.state_dict().items():
            for local, _ in _local(value):
                yield f"model.{name}", local
        if self.fused is not None:
            for key, state in self.fused.state_dict()["state"].items():
                for name, value in state.items():
                    for number, (local, _) in enumerate(_local(value)):
                        yield f"fused.{key}.{name}.{number}", local
        for part, optimizer in self.adams.items():
            for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    yield f"adam.{part}.{number}.{name}", value


def _load_adam(optimizer: torch.optim.Adam, saved: dict[str, Tensor], prefix: str) -> None:
    """Create Adam's state as saved; a fresh Adam has none."""
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        start = f"{prefix}{number}."
        values = {key[len(start) :]: value.clone() for key, value in saved.items() if key.startswith(start)}
        if values:
            optimizer.state[parameter] = values


def _part(name: str) -> str:
    """Return which optimizer group a parameter belongs to, by its full name."""
    if not name.startswith("embeddings."):
        return "dense"
    return "codebooks" if ".decoder." in name else "tables"


def _check(config: OptimConfig) -> None:
    if config.table_l2 and config.tables != "adam":
        raise ValueError(
            f"optim.table_l2: must be 0 with optim.tables = {config.tables!r} (FBGEMM's CPU kernels ignore it), "
            f"got {config.table_l2}; use optim.tables='adam', or optim.lookup_l2"
        )


def _wrap(model: nn.Module, shard: bool) -> DistributedModelParallel:
    """Plan and shard a model, or replicate all of it, so that its tables keep dense gradients.

    Replicated tables are left as they are rather than made data-parallel by a sharder: TorchRec 1.8's data-parallel
    `EmbeddingCollection` pools its rows on the CPU. Sharded tables are never data-parallel either: TorchRec would drop
    their fused optimizer without a word, and they train in the backward or not at all.
    """
    world, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    sharders, plan = _sharders() if shard else [], ShardingPlan({})
    if shard:
        kinds = [kind.value for kind in ShardingType if kind is not ShardingType.DATA_PARALLEL]
        names = {name.split(".")[-2] for name, _ in model.named_parameters() if _part(name) == "tables"}
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=world, compute_device="cpu"),
            constraints={name: ParameterConstraints(sharding_types=kinds) for name in names},
        )
        plan = planner.collective_plan(model, sharders, group)
    # DDP refuses a module of which nothing is trained
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=plan,
        sharders=sharders,
        init_data_parallel=any(not shard or _part(name) != "tables" for name in trained),
    )


def _sharders() -> list:
    import torchrec_compress

    ours = getattr(torchrec_compress, "get_default_sharders", None)
    return ours() if ours is not None else get_default_sharders()


def _local(value: object) -> list[tuple[Tensor, list[int] | None]]:
    """Return this rank's shards of a tensor with their offsets in the whole; None for a plain tensor."""
    if hasattr(value, "local_shards"):
        shards = value.local_shards()  # type: ignore[attr-defined]
        if shards and hasattr(shards[0], "tensor"):
            return [(shard.tensor, list(shard.metadata.shard_offsets)) for shard in shards]
        return list(zip(shards, value.local_offsets(), strict=True))  # type: ignore[attr-defined]
    if hasattr(value, "to_local"):
        return _local(value.to_local())  # type: ignore[attr-defined]
    return [(value, None)]  # type: ignore[list-item]


@torch.no_grad()
def load_plain(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into a sharded module.

    Args:
        module: wrapped or not.
        state: whole tensors by the module's own names.

    Raises:
        ValueError: names or shapes do not fit.
    """
    own = module.state_dict()
    if set(own) != set(state):
        raise ValueError(f"load_plain: names must fit, got {sorted(set(own) ^ set(state))[:4]} on one side only")
    for name, value in own.items():
        for local, offsets in _local(value):
            source = state[name]
            for axis, first in enumerate(offsets or []):
                source = source.narrow(axis, int(first), local.shape[axis])
            if source.shape != local.shape:
                raise ValueError(
                    f"load_plain: {name!r} must have shape {tuple(local.shape)}, got {tuple(source.shape)}"
                )
            local.copy_(source)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole tensors of a module, by name; in one process only.

    Raises:
        ValueError: a tensor lies on several ranks.
    """
    result = {}
    for name, value in module.state_dict().items():
        shards = _local(value)
        if len(shards) != 1 or shards[0][0].shape != value.shape:
            raise ValueError(f"plain_state: {name!r} must lie on one rank, got {len(shards)} shards here")
        result[name] = shards[0][0].detach().clone()
    return result
