"""What a plan costs: bytes per table and per rank, beside what the dense tables would take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_compress.planner.accounting import DenseOptimizer
from torchrec_compress.planner.counting import Counting
from torchrec_compress.planner.records import RankPlan, TablePlan, ratio_of
from torchrec_compress.planner.text import rank_lines, table_lines


@dataclass(frozen=True)
class PlanReport:
    """A plan in bytes, from the planner's sharding options.

    Args:
        tables: by name; "path.name" where a name stands in several collections.
        ranks: one entry per rank.
        compute_device: of the topology.
        batch_size: of a rank.
    """

    tables: dict[str, TablePlan]
    ranks: list[RankPlan] = field(repr=False)
    compute_device: str
    batch_size: int

    @classmethod
    def of(
        cls,
        module: nn.Module,
        options: Sequence[ShardingOption],
        topology: Topology,
        batch_size: int,
        *,
        dense_optimizer: DenseOptimizer = "adam",
        decoded: Mapping[str, int] | None = None,
        sharders: Iterable[ModuleSharder[Any]] = (),
    ) -> PlanReport:
        """Count a finished plan.

        Args:
            module: the model, before it is sharded.
            options: what the planner chose, ranks set: the argument of a planner's callback.
            topology: with what is left of each device's memory.
            batch_size: of a rank.
            dense_optimizer: that trains replicated parameters, as for the estimators.
            decoded: bytes of a rank by table, as `DecodeReservation.decoded`.
            sharders: of the planner, whose `fused_params` may name an optimizer.

        Raises:
            ValueError: the options were not estimated by `estimators()`.
        """
        tables, ranks = Counting(module, options, topology, dense_optimizer, decoded or {}, sharders).count()
        return cls(tables, ranks, topology.compute_device, batch_size)

    @property
    def dense_bytes(self) -> int:
        """What all dense tables would take."""
        return sum(table.dense_bytes for table in self.tables.values())

    @property
    def stored_bytes(self) -> int:
        """All stored bytes, of one copy."""
        return sum(table.stored_bytes for table in self.tables.values())

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes, over all tables."""
        return ratio_of(self.tables.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        names = ("compute_device", "batch_size", "dense_bytes", "stored_bytes", "ratio")
        return {
            **{name: getattr(self, name) for name in names},
            "tables": {name: table.to_dict() for name, table in self.tables.items()},
            "ranks": [{**asdict(rank), "weight_bytes": rank.weight_bytes} for rank in self.ranks],
        }

    def __str__(self) -> str:
        return "\n".join([*table_lines(self.tables), "", *rank_lines(self.ranks)])

    def save(self, folder: str | Path) -> list[Path]:
        """Write plan.json, plan.md and, where matplotlib is installed, plan.png; return their paths.

        Args:
            folder: made where it is missing.

        Raises:
            ImportError: matplotlib is missing; the other files are written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("plan.json", "plan.md", "plan.png")]
        paths[0].write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        paths[1].write_text(f"# Plan\n\n```\n{self}\n```\n\n![bytes per rank and table](plan.png)\n")
        from torchrec_compress.planner.plots import draw

        draw(self.tables, self.ranks, self.compute_device, paths[2])
        return paths
