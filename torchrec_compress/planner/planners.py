"""The one-line way to plan compressed tables: TorchRec's planner with everything of ours put in."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import distributed as dist
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.comm import get_local_size, get_topology_domain_multiple
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Partitioner,
    PerfModel,
    PlannerError,
    Proposer,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.distributed.utils import get_device_type

from torchrec_compress.compression import Frontier
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.planner.accounting import DenseOptimizer
from torchrec_compress.planner.choosing import PlannedChoice, Settings, choose
from torchrec_compress.planner.constraints import translate_constraints
from torchrec_compress.planner.enumerators import CompressedEnumerator
from torchrec_compress.planner.means import SoundMeans
from torchrec_compress.planner.proposers import TradeOffProposer, UnlessMany, UnlessNoQuicker
from torchrec_compress.planner.report import PlanReport
from torchrec_compress.planner.reservation import DecodeReservation
from torchrec_compress.planner.stats import PlanStats
from torchrec_compress.sharding import compressed_sharders, get_default_sharders

logger = logging.getLogger(__name__)

_DEFAULT_BATCH_SIZE = 512  # TorchRec's
_MOST_ON_A_HOST = 128  # numbers of a torch.device, beyond which it names another one or none


class EmbeddingShardingPlanner(StockPlanner):
    """TorchRec's `EmbeddingShardingPlanner` for models with compressed tables; other tables are planned as ever.

    It counts compressed tables as they are stored (`estimators`), translates constraints that name them
    (`translate_constraints`), keeps a report, and says what would fit where nothing does.

    Args:
        topology: default: of the running process group.
        batch_size: examples of a rank, default 512 as in TorchRec.
        constraints: by the user's table name.
        dense_optimizer: that trains codebooks and other replicated parameters, by name or as bytes of state per
            parameter.
        storage_reservation: default TorchRec's; what a rank decodes itself is held back in any case.
        proposer, partitioner, performance_model, callbacks, timeout_seconds, debug: as in TorchRec. Proposers default
            to TorchRec's and `TradeOffProposer`, and for more than `many_tables` to the latter alone.
        stats: besides the report, default TorchRec's.
        many_tables: tables and other shardable parameters from which TorchRec's own proposers are left out, since their
            work grows with the square.

    Attributes:
        report: a `PlanReport` of the last plan, on the rank that made it (rank 0 with `collective_plan`), else None.

    Raises:
        ValueError: an unknown dense optimizer; a host of more GPUs than PyTorch has numbers for.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress import PQEmbeddingBagCollection
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10**9, embedding_dim=64, feature_names=["user"])
        >>> model = nn.ModuleDict({"sparse": PQEmbeddingBagCollection([table], device="meta")})
        >>> planner = EmbeddingShardingPlanner(Topology(world_size=8, compute_device="cuda", hbm_cap=4 * 2**30))
        >>> plan = planner.plan(model)
        >>> sorted(plan.plan), round(planner.report.ratio)
        (['sparse.code_tables', 'sparse.decoder'], 32)
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        *,
        dense_optimizer: DenseOptimizer = "adam",
        storage_reservation: StorageReservation | None = None,
        proposer: Proposer | list[Proposer] | None = None,
        partitioner: Partitioner | None = None,
        performance_model: PerfModel | None = None,
        stats: Stats | list[Stats] | None = None,
        callbacks: list[Callable[[list[ShardingOption]], list[ShardingOption]]] | None = None,
        timeout_seconds: int | None = None,
        debug: bool = True,
        many_tables: int = 100,
    ) -> None:
        topology = topology or _topology_of_the_process_group()
        _check_hosts(topology)
        batch_size = batch_size or _DEFAULT_BATCH_SIZE
        self._device = topology.compute_device
        self._wishes = dict(constraints or {})
        # the planner's parts share this dict; `plan` fills it with what the model's parts can do
        self._translated = dict(self._wishes)
        self._plan_stats = PlanStats(dense_optimizer=dense_optimizer)
        reservation = DecodeReservation(storage_reservation)
        self._settings = Settings(topology, batch_size, self._wishes, dense_optimizer, reservation.inner)
        own_stats = [EmbeddingStats()] if stats is None else stats if isinstance(stats, list) else [stats]
        if proposer is None:
            # it goes by the rating and the placing that are the default
            is_usual = partitioner is None and performance_model is None
            grid = UnlessNoQuicker(GridSearchProposer()) if is_usual else GridSearchProposer()
            stock = [grid, GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()]
            proposer = [TradeOffProposer(), *(UnlessMany(each, many_tables) for each in stock)]
        self._options = CompressedEnumerator(topology, batch_size, self._translated, dense_optimizer)
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=self._options,
            storage_reservation=reservation,
            proposer=proposer,
            partitioner=SoundMeans(partitioner or GreedyPerfPartitioner()),
            performance_model=performance_model,
            stats=[*own_stats, self._plan_stats],
            constraints=self._translated,
            debug=debug,
            callbacks=callbacks,
            timeout_seconds=timeout_seconds,
        )

    @property
    def report(self) -> PlanReport | None:
        """The report of the last plan."""
        return self._plan_stats.report

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None) -> ShardingPlan:
        """Return the best plan that was found.

        Args:
            module: the model, on any device; on the meta device nothing is allocated.
            sharders: default `torchrec_compress.sharding.get_default_sharders()`.

        Raises:
            InsufficientStorageError: nothing fits; it says what does not, and what to change.
            PlannerError: no plan for another reason.
        """
        sharders = get_default_sharders() if sharders is None else sharders
        _warn_of_missing_sharders(module, sharders)
        self._plan_stats.watch(module)
        self._options.found = None
        self._translated.clear()
        self._translated.update(translate_constraints(module, self._wishes, self._device, sharders))
        try:
            return super().plan(module, sharders)
        except PlannerError as error:
            explained = self._plan_stats.explain(error)
            self._plan_stats.watch(None)  # TorchRec checks a plan after it has told of it
            if explained is error:
                raise
            raise explained from error

    def get_selected_options(self) -> list[ShardingOption]:
        """Return the options of the last plan, each shard with its rank, bytes and time; none without a plan here.

        TorchRec 1.9's executor asks for them; its own planner has those of an earlier plan where the last one failed.
        """
        return self._plan_stats.selected

    def get_search_space(self) -> list[ShardingOption] | None:
        """Return all options that the last plan was chosen from, or None where it did not come so far."""
        return self._options.found

    def choose(
        self,
        module: nn.Module,
        frontier: Frontier,
        budget_bytes: int | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
    ) -> PlannedChoice:
        """Return the method of every table, of those that were measured, with which all fits and the loss rises least.

        Args:
            module: the model, on any device; its tables may be stored in any way, and stay as they are.
            frontier: of `measure_frontier`; tables that it does not name keep their methods.
            budget_bytes: of all ranks, for tables, their optimizer state, gradients and activations; None, and what is
                more than there is: all that the topology has left.
            sharders: default `torchrec_compress.sharding.get_default_sharders()`.

        Returns:
            The methods as `compress` takes them; printed, a table with reasons. `report` is of the plan with them.

        Raises:
            ValueError: the frontier is of other tables, or the budget is below the smallest choice.
            PlannerError: not even that can be placed.

        Example:
            >>> import torch
            >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
            >>> from torchrec_compress.compression import measure_frontier
            >>> table = EmbeddingBagConfig(name="user", num_embeddings=4000, embedding_dim=16, feature_names=["user"])
            >>> model = nn.ModuleList([EmbeddingBagCollection([table])])
            >>> frontier = measure_frontier(model[0], {"user": torch.arange(4000)}, num_codes=(2,))
            >>> planner = EmbeddingShardingPlanner(Topology(world_size=2, compute_device="cuda"), stats=[])
            >>> planner.choose(model, frontier, budget_bytes=300_000)["user"].method
            'int8'
        """
        sharders = get_default_sharders() if sharders is None else sharders
        return choose(self, module, frontier, budget_bytes, sharders, self._settings)

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Plan on rank 0 and send the plan to all ranks; arguments and errors as for `plan`, errors on every rank."""
        group = pg or dist.GroupMember.WORLD
        if group is None:
            raise ValueError("collective_plan: a process group must be running, got none; call init_process_group()")
        plan, error = invoke_on_rank_and_broadcast_result(group, 0, self._plan_or_error, module, sharders)
        if plan is None:
            assert error is not None
            raise error
        return plan

    def _plan_or_error(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None
    ) -> tuple[ShardingPlan | None, Exception | None]:
        # TorchRec would leave the other ranks waiting
        try:
            return self.plan(module, sharders), None
        except (PlannerError, ValueError, RuntimeError) as error:
            return None, error


def _check_hosts(topology: Topology) -> None:
    if topology.compute_device != "cpu" and topology.local_world_size > _MOST_ON_A_HOST:
        raise ValueError(
            f"EmbeddingShardingPlanner: local_world_size of the topology must be at most {_MOST_ON_A_HOST}, as many "
            f"devices as PyTorch has numbers for, got {topology.local_world_size}; give the ranks of one host"
        )


def _topology_of_the_process_group() -> Topology:
    if not dist.is_initialized():
        raise ValueError(
            "EmbeddingShardingPlanner: topology must be given without a process group, got None; pass "
            "Topology(world_size=..., compute_device=..., hbm_cap=...)"
        )
    return Topology(
        world_size=dist.get_world_size(),
        local_world_size=get_local_size(),
        compute_device=get_device_type(),
        pod_size=get_topology_domain_multiple(),
    )


def _warn_of_missing_sharders(module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> None:
    """Warn where parts of compressed tables would be replicated for want of a sharder."""
    given = {sharder.module_type for sharder in sharders}
    wanted = {sharder.module_type for sharder in compressed_sharders(fused_params={})}
    parts = {type(part) for child in module.modules() if isinstance(child, CompressedParts) for part in child.modules()}
    missing = sorted(kind.__name__ for kind in parts & wanted - given)
    if missing:
        logger.warning(
            "planner: no sharder for %s, so they are replicated on every rank; pass "
            "sharders=torchrec_compress.sharding.get_default_sharders()",
            missing,
        )
