"""What TorchRec 1.9's executor and dry run need to plan compressed tables."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torchrec
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner.types import StorageReservation, Topology
from torchrec.distributed.types import PipelineType

from torchrec_compress.planner.accounting import DenseOptimizer, check_dense_optimizer
from torchrec_compress.planner.planners import EmbeddingShardingPlanner
from torchrec_compress.seams import planner_parts


class CompressedPlannerProvider:
    """Have TorchRec 1.9's planner executor plan with `EmbeddingShardingPlanner` of this package.

    It is a `torchrec.distributed.planner.provider.PlannerProvider`. Topologies and reservations are those of another
    one, as are proposers, partitioner and performance model where the request names them. Requests need the sharders of
    compressed tables: `sharders=get_default_sharders()`.

    Args:
        inner: the other provider, default TorchRec's.
        dense_optimizer: that trains replicated parameters, by name or as bytes of state per parameter.

    Attributes:
        planners: that were made, by SKU; `planners[sku].report` is of its last plan.

    Raises:
        ImportError: TorchRec is older than 1.9.
        ValueError: an unknown dense optimizer.

    Example:
        >>> import pytest
        >>> api = pytest.importorskip("torchrec.distributed.planner.dry_run", exc_type=ImportError)
        >>> from torchrec.distributed.planner.executor import DefaultPlannerExecutor
        >>> orchestrator = api.DryRunOrchestrator(DefaultPlannerExecutor(CompressedPlannerProvider()))
    """

    def __init__(self, inner: Any = None, dense_optimizer: DenseOptimizer = "adam") -> None:
        check_dense_optimizer(dense_optimizer)
        self._inner = stock_provider() if inner is None else inner
        self._dense_optimizer: DenseOptimizer = dense_optimizer
        self.planners: dict[str, EmbeddingShardingPlanner] = {}

    def build_topology(self, sku: str, request: Any, ctx: Any) -> Topology:
        """Return the machines of a SKU, a `Topology`, as the other provider knows them."""
        return self._inner.build_topology(sku, request, ctx)

    def build_storage_reservation(self, sku: str, request: Any) -> StorageReservation:
        """Return what else needs memory, as the other provider knows it."""
        return self._inner.build_storage_reservation(sku, request)

    def build_planner(
        self, sku: str, *, topology: Topology, storage_reservation: StorageReservation, ctx: Any
    ) -> EmbeddingShardingPlanner:
        """Return the planner of a SKU; `ctx.request` has batch size, constraints and `planner_config`.

        Raises:
            ValueError: the request asks for estimates or a planner that compressed tables cannot have.
        """
        config = ctx.request.planner_config
        _check_estimates(config)
        stock = self._inner.build_planner(sku, topology=topology, storage_reservation=storage_reservation, ctx=ctx)
        if not isinstance(stock, StockPlanner):
            raise ValueError(
                "CompressedPlannerProvider: planner_variant must be TorchRec's EmbeddingShardingPlanner, got "
                f"{type(stock).__name__}; leave it unset"
            )
        parts = planner_parts(stock)
        if config.proposer_type is None and getattr(config.proposer_config, "kind", "default") == "default":
            parts["proposer"] = None  # TorchRec's and ours
        self.planners[sku] = EmbeddingShardingPlanner(
            topology,
            ctx.request.batch_size,
            ctx.request.constraints,
            dense_optimizer=self._dense_optimizer,
            storage_reservation=storage_reservation,
            **parts,
        )
        return self.planners[sku]


def _check_estimates(config: Any) -> None:
    """Raise ValueError where a request asks for other estimates than those of `estimators()`."""
    asked = {
        "pipeline_type": config.pipeline_type not in (None, PipelineType.NONE.value),
        "use_hardware_based_compute": config.use_hardware_based_compute,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"CompressedPlannerProvider: planner_config.{name} must be left as it is, since it is of TorchRec's "
                f"estimators and compressed tables have their own, got {getattr(config, name)!r}"
            )


def stock_provider() -> Any:
    """Return TorchRec's own provider.

    Raises:
        ImportError: before TorchRec 1.9 there is none.
    """
    try:
        return import_module("torchrec.distributed.planner.provider").DefaultPlannerProvider()
    except ModuleNotFoundError as error:
        raise ImportError(
            "CompressedPlannerProvider: torchrec must be at least 1.9, which has planner.executor and planner.dry_run, "
            f"got {torchrec.__version__}; use torchrec_compress.planner.EmbeddingShardingPlanner itself"
        ) from error
