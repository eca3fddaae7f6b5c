"""What the planner tells at its end, kept: a report of the plan, or why there is none."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import (
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Stats,
)

from torchrec_compress.planner.accounting import DenseOptimizer, check_dense_optimizer
from torchrec_compress.planner.advice import Failure, InsufficientStorageError
from torchrec_compress.planner.report import PlanReport

logger = logging.getLogger(__name__)


class PlanStats(Stats):
    """Keep a `PlanReport` of the plan and log its text; pass it to a planner as `stats=`.

    Args:
        module: the model that is planned.
        dense_optimizer: that trains replicated parameters, as for the estimators.

    Attributes:
        report: of the last plan, or None.
        selected: the options of the last plan, each shard with its rank; none where there was no plan.
        failure: what is known where there was no plan, or None.

    Raises:
        ValueError: an unknown dense optimizer.
    """

    def __init__(self, module: nn.Module | None = None, dense_optimizer: DenseOptimizer = "adam") -> None:
        check_dense_optimizer(dense_optimizer)
        self._dense_optimizer: DenseOptimizer = dense_optimizer
        self.watch(module)

    def watch(self, module: nn.Module | None) -> None:
        """Forget the last plan; the next one is of this model."""
        self._module = module
        self.report: PlanReport | None = None
        self.selected: list[ShardingOption] = []
        self.failure: Failure | None = None

    def log(self, **found: Any) -> None:  # type: ignore[override]
        """Take what the planner tells, by keyword as every release does."""
        if self._module is None:
            raise ValueError("PlanStats: the model must be known, got None; make it with PlanStats(model)")
        topology = found["storage_reservation"].last_reserved_topology or found["topology"]
        sharders = list(found.get("sharders") or [])
        if found["sharding_plan"].plan:
            self.report = PlanReport.of(
                self._module,
                found["best_plan"],
                topology,
                found["batch_size"],
                dense_optimizer=self._dense_optimizer,
                decoded=getattr(found["storage_reservation"], "decoded", None),
                sharders=sharders,
            )
            self.selected = found["best_plan"]
            logger.info("plan:\n%s", self.report)
            return
        enumerator = found.get("enumerator")
        options = (enumerator.last_stored_search_space if enumerator else None) or found["best_plan"]
        self.failure = Failure(
            self._module,
            sharders,
            found.get("constraints"),
            found["batch_size"],
            self._dense_optimizer,
            topology,
            options,
        )

    def explain(self, error: PlannerError) -> PlannerError:
        """Return an error that says what does not fit and what would, or the same one where storage is not the reason.

        Args:
            error: that the planner raised.

        Example:
            >>> PlanStats().explain(PlannerError("no such rank", PlannerErrorType.OTHER)).args
            ('no such rank',)
        """
        about_storage = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS)
        if self.failure is None or error.error_type not in about_storage:
            return error
        return InsufficientStorageError.of(self.failure, error)
