"""TorchRec's DistributedModelParallel around a model, on one rank or many, with its optimizers and its pipeline."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipeline
from torchrec.distributed.types import ShardedModule, ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_compress.modules import after_step, discard, native_parameters, optimizer_bytes
from torchrec_compress.modules.after_step import has_managers
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.planner.accounting import FUSED_OPTIMIZERS
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.sharding.gradients import GradientExchange, compress_gradients
from torchrec_compress.sharding.loading import load_plain
from torchrec_compress.train.check import check_optim
from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig, of_pattern
from torchrec_compress.train.data.batch import Batch
from torchrec_compress.train.engine.checkpoint import Checkpoints, Saved
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.objective import Loss, TrainStep
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.ranks import Ranks, agree, gather

_FUSED = ("rowwise_adagrad", "adagrad", "sgd")  # Adam trains replicated tables: element-wise, and with l2
_RESERVED = 0.15  # of the memory, for activations and buffers
_PREFIX = "model."  # of the model inside TrainStep


class Trainable:
    """A model under DistributedModelParallel with its optimizers.

    Args:
        model: holds embedding collections; its weights are kept, unless they are on the meta device.
        stage: which parts are trained, and how.
        ranks: that train it together.
        parallel: how tables may be sharded.
        teacher: (train rows,) float32 logits to imitate, or None.
        pooling: the most ids per row by feature, for the planner; one where it is silent.
        rarity: of ids, where there is an `adaptive_l2`.

    Attributes:
        module: wraps the model and its loss; takes a batch.
        optimizer: all optimizers as one.

    Raises:
        ValueError: an l2 that the chosen optimizer does not support, or a sharding type that is not possible.
    """

    def __init__(
        self,
        model: Recommender,
        stage: StageConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        teacher: Tensor | None = None,
        pooling: Mapping[str, int] | None = None,
        rarity: Rarity | None = None,
    ) -> None:
        config = stage.optim
        check_optim(config, "optim")
        self.ranks, self._rarity = ranks, rarity
        is_meta = any(parameter.is_meta for parameter in model.parameters())
        before = {} if is_meta else {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.requires_grad_(True)  # whatever an earlier stage left out
        weights = native_parameters(model)
        fused = config.tables in _FUSED and bool(weights)
        if fused:
            # a fused table cannot be left out of the backward, so one that is not trained has the rate 0
            rate = config.table_lr if stage.train_tables else 0.0
            apply_optimizer_in_backward(FUSED_OPTIMIZERS[config.tables], weights, {"lr": rate})
        # before wrapping: DDP waits for a gradient of everything that requires one when it is made
        train = {"tables": stage.train_tables or fused, "codebooks": stage.train_codebooks, "dense": stage.train_dense}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(train[_part(name)])
        collections = [part for part in model.modules() if isinstance(part, CompressedParts)]
        self._undecayed = {name for part in collections for name in part.blueprint.undecayed()}
        self._loss = Loss(stage, ranks, teacher, model.fields, rarity, model.entropy)
        self._moves_rows = stage.train_tables
        step = TrainStep(model, self._loss)
        shard = config.tables in _FUSED
        if not shard and ranks.world > 1 and has_managers(model):
            raise ValueError(
                f"optim.tables: several ranks must train tables with managers in the backward, by one of "
                f"{sorted(_FUSED)}, got {config.tables!r}, of whose tables each rank has a copy"
            )
        constraints = make_constraints(model, ranks.world, parallel, pooling or {}) if shard else {}
        self.module = _wrap(step, shard, stage, ranks, constraints)
        self._exchange = _exchange(self.module, config, ranks)
        if before:
            load_plain(self.module, {_PREFIX + name: value for name, value in before.items()})
        self._set_optimizers(stage, fused)

    def _set_optimizers(self, stage: StageConfig, fused: bool) -> None:
        """Group the replicated parameters by part and give each an optimizer with its own rate."""
        config = stage.optim
        rates = {
            "tables": (config.table_lr, config.table_l2, stage.train_tables),
            # those that l2 must not pull; the name is in checkpoints
            "scalars": (config.table_lr, 0.0, stage.train_tables),
            "codebooks": (config.codebook_lr, 0.0, stage.train_codebooks),
            "dense": (config.dense_lr, config.dense_l2, stage.train_dense),
        }
        groups: dict[str, dict[str, Any]] = {part: {} for part in rates}
        for name, parameter in in_backward_optimizer_filter(self.module.named_parameters()):
            short = name.removeprefix(_PREFIX)
            owner = short.rpartition(".")[0].rpartition(".")[2]
            part = "scalars" if owner in self._undecayed else _part(short)
            groups[part][name] = parameter
        if stage.start_l2:
            pulled = {**groups["dense"], **groups["codebooks"]}
            self._loss.pulled = {name: (p, p.detach().clone()) for name, p in pulled.items()}
        optimizers: list[Any] = [("fused", self.module.fused_optimizer)] if fused else []
        for part, (rate, l2, train) in rates.items():
            if groups[part] and train:
                optimizers.append((part, KeyedOptimizerWrapper(groups[part], _dense_optimizer(config, rate, l2))))
        self.optimizer = CombinedOptimizer(optimizers)
        self._groups = [(group, group["lr"]) for group in self.optimizer.param_groups]

    def pipeline(self, step: int = 0) -> TrainPipeline[Batch, tuple[Tensor, Tensor, Batch]]:
        """Return what does the steps from `step` on: TorchRec's pipeline, which sends the next ids during this step."""
        optimizer: Any = Skippable(self.optimizer, self._loss, self.module, step, self._moves_rows)
        # one rank on a CPU has nothing to overlap, and without sharded tables there is nothing to send ahead
        is_sharded = any(isinstance(module, ShardedModule) for module in self.module.modules())
        if is_sharded and (self.ranks.world > 1 or self.ranks.device.type != "cpu"):
            return TrainPipelineSparseDist(self.module, optimizer, self.ranks.device, execute_all_batches=True)
        return TrainPipelineBase(self.module, optimizer, self.ranks.device)

    @property
    def model(self) -> nn.Module:
        """The model alone, as its ranks hold it."""
        step: Any = self.module.module
        return step.model

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, (B,) float32, in evaluation mode; no pipeline may be attached."""
        self.module.eval()
        return self.module(batch.to(self.ranks.device))[1][1]

    def set_rate(self, factor: float) -> None:
        """Set every learning rate to `factor` times its configured value."""
        for group, rate in self._groups:
            group["lr"] = rate * factor  # type: ignore[index]

    def set_table_rate(self, factor: float) -> None:
        """Set the rate of tables that train in the backward to `factor` times its configured value."""
        fused = self.module.fused_optimizer.param_groups
        for group, rate in self._groups[: len(fused)]:  # which come first
            group["lr"] = rate * factor  # type: ignore[index]

    @property
    def was_skipped(self) -> bool:
        """Whether the last batch was left out for a loss that is not finite, on all ranks alike."""
        return self._loss.was_skipped

    def state_bytes(self) -> int:
        """Return the bytes of one copy of the tables' optimizer state and of `rarity`; every rank calls it."""
        sizes = {name: optimizer_bytes(each) for name, each in self.optimizer.optimizers if name != "dense"}
        sharded = sizes.pop("fused", 0)
        rarity = 0 if self._rarity is None else self._rarity.num_bytes
        return sum(gather(sharded, self.ranks)) + sum(sizes.values()) + rarity + self._unsent_bytes()

    def _unsent_bytes(self) -> int:
        """Return the bytes of what tables' gradients have left to send, on one rank."""
        unsent = {} if self._exchange is None else self._exchange.errors
        return sum(4 * error.numel() for name, error in unsent.items() if _part(name.removeprefix(_PREFIX)) != "dense")

    def state(self) -> dict[str, Any]:
        """Return the state of model, optimizers and gradients for a checkpoint; tensors are the live ones."""
        return {"model": self._model_state(), "optimizer": self.optimizer.state_dict(), **self._unsent()}

    def _unsent(self) -> dict[str, Any]:
        """Return what this rank's gradients have left to send, by a name that no other rank has."""
        unsent = {} if self._exchange is None else self._exchange.state_dict()
        return {f"unsent_{self.ranks.rank}": unsent} if unsent else {}

    def load(self, store: Checkpoints, saved: Saved) -> None:
        """Take back everything, this rank's random state included.

        Raises:
            ValueError: the checkpoint is of another model or of other optimizers.
        """
        if saved.step == 0:  # optimizers have no state before the first step
            self.load_model(saved.path)
            return
        self.optimizer.init_state()  # fresh optimizers have none to load into; what this step does is overwritten
        self.optimizer.zero_grad()
        state = self.state()
        before, unsent = store.num_ranks(saved), self._unsent()
        if unsent and before != self.ranks.world:  # what each rank has left is of use to as many alone
            state = {name: value for name, value in state.items() if name not in unsent}
            if self.ranks.is_first:
                tqdm.write(f"{saved.path}: what gradients of {before} ranks had left to send is dropped")
        store.load(saved, state, random=True)
        self._load_model_state(state["model"])
        agree(lambda: self.optimizer.load_state_dict(state["optimizer"]), self.ranks)

    def load_model(self, path: Path) -> None:
        """Take the model alone from a checkpoint's folder."""
        state = {"model": self._model_state()}
        read(path, state, self.ranks)
        self._load_model_state(state["model"])

    def _model_state(self) -> dict[str, Any]:
        return {name.removeprefix(_PREFIX): value for name, value in self.module.state_dict().items()}

    def _load_model_state(self, state: dict[str, Any]) -> None:
        values = OrderedDict((_PREFIX + name, value) for name, value in state.items())
        agree(lambda: self.module.load_state_dict(values), self.ranks)


class Skippable:
    """Optimizers that leave a step out where the loss says so, and tell tables with managers how each step ended.

    Args:
        optimizer: all of them as one.
        loss: says what is left out.
        module: of which they train the parameters.
        step: the number of the first step.
        moves_rows: whether tables are trained, so that managers may move their rows.
    """

    def __init__(
        self, optimizer: CombinedOptimizer, loss: Loss, module: nn.Module, step: int, moves_rows: bool
    ) -> None:
        self._optimizer, self._loss, self._module, self._step = optimizer, loss, module, step
        self._has_managers, self._moves_rows = has_managers(module), moves_rows

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Update, unless the batch is left out; momentum alone would move the weights."""
        if not self._loss.was_skipped:
            self._optimizer.step()
        if self._has_managers:
            if self._loss.was_skipped or not self._moves_rows:
                discard(self._module)
            else:
                after_step(self._module, self._step, self._optimizer)
        self._step += 1


def _dense_optimizer(config: OptimConfig, rate: float, l2: float) -> Any:
    if config.dense == "adagrad":
        return lambda parameters: torch.optim.Adagrad(parameters, lr=rate, weight_decay=l2, foreach=True)
    return lambda parameters: torch.optim.Adam(parameters, lr=rate, weight_decay=l2, foreach=True)


def _part(name: str) -> str:
    """Return which optimizer group a parameter belongs to, by its full name in the model."""
    if not name.startswith("embeddings."):
        return "dense"
    return "codebooks" if ".decoder." in name else "tables"


def _wrap(
    step: TrainStep, shard: bool, stage: StageConfig, ranks: Ranks, constraints: dict[str, ParameterConstraints]
) -> DistributedModelParallel:
    """Plan and shard a model, or replicate all of it, so that its tables keep dense gradients.

    Replicated tables are left as they are rather than made data-parallel by a sharder: TorchRec 1.8's data-parallel
    `EmbeddingCollection` pools its rows on the CPU. Sharded tables are never data-parallel either: TorchRec would drop
    their fused optimizer without a word, and they train in the backward or not at all.
    """
    group = dist.group.WORLD
    assert group is not None
    sharders, plan = get_default_sharders() if shard else [], ShardingPlan({})
    if shard:
        is_cpu = ranks.device.type == "cpu"
        memory = None if is_cpu else torch.cuda.get_device_properties(ranks.device).total_memory
        topology = Topology(
            world_size=ranks.world,
            local_world_size=ranks.local_world,
            compute_device=ranks.device.type,
            hbm_cap=memory,
        )
        local_batch = -(-stage.batch_size // ranks.world)
        reserved = FixedPercentageStorageReservation(_RESERVED)
        planner = EmbeddingShardingPlanner(topology, local_batch, constraints, storage_reservation=reserved, stats=[])
        plan = planner.collective_plan(step, sharders, group)
    # DDP refuses a module of which nothing is trained
    trained = [name.removeprefix(_PREFIX) for name, value in step.named_parameters() if value.requires_grad]
    return DistributedModelParallel(
        step,
        device=ranks.device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=any(not shard or _part(name) != "tables" for name in trained),
    )


def _exchange(module: DistributedModelParallel, config: OptimConfig, ranks: Ranks) -> GradientExchange | None:
    """Have gradients sent as the config says; None where nothing is sent, or all of it as it is."""
    has_copies = any(isinstance(part, DistributedDataParallel) for part in module.modules())
    if config.gradients == "float32" or ranks.world == 1 or not has_copies:
        return None
    return compress_gradients(module, config.gradients)


def make_constraints(
    model: Recommender, world: int, parallel: ParallelConfig, pooling: Mapping[str, int]
) -> dict[str, ParameterConstraints]:
    """Return how each of the user's tables may be sharded.

    Args:
        model: unsharded.
        world: number of ranks.
        parallel: sharding types by table name or pattern.
        pooling: the most ids per row by feature; one where it is silent.

    Raises:
        ValueError: a pattern fits no table, or a table that trains in the backward would be data-parallel.
    """
    configs = {table.name: table for table in model.table_configs()}
    tables = {name: table.num_embeddings for name, table in configs.items()}
    for pattern in parallel.sharding_types:
        if pattern not in tables and not fnmatch.filter(tables, pattern):
            raise ValueError(f"parallel.sharding_types: {pattern!r} must fit a table of {sorted(tables)}, got none")
    native = {
        name.split(".")[-2]: value.shape[0]
        for name, value in model.named_parameters()
        if _part(name) == "tables" and value.numel()  # trained rows are cut as their table is
    }
    constraints = {}
    for table, rows in tables.items():
        parts = {name: size for name, size in native.items() if name == table or name.startswith(f"{table}__")}
        wanted = of_pattern(parallel.sharding_types, table)
        kinds = wanted or [kind.value for kind in ShardingType if kind.value != "data_parallel"]
        if parts and "data_parallel" in kinds:
            raise ValueError(
                f"parallel.sharding_types: table {table!r} is trained in the backward and must not be data_parallel, "
                f"got {kinds}; leave it out, or replicate all tables by optim.tables='adam'"
            )
        if not wanted and any(size <= -(-size // world) * (world - 1) for size in (rows, *parts.values())):
            kinds = ["table_wise", "column_wise"]  # cut by rows, some rank would get none, which FBGEMM refuses
        factors = [float(pooling.get(feature, 1)) for feature in configs[table].feature_names]
        constraints[table] = ParameterConstraints(sharding_types=list(kinds), pooling_factors=factors)
    return constraints
