"""Which method each table gets, of those that were measured, so that all of it fits and the loss rises least."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_compress.compression import Frontier
from torchrec_compress.compression.frontier import Unit, check_budget, told
from torchrec_compress.compression.knapsack import MAX_STATES, Candidate, allocate, convex_frontier, undominated
from torchrec_compress.methods import MethodConfig
from torchrec_compress.planner.accounting import DenseOptimizer
from torchrec_compress.planner.enumerators import CompressedEnumerator
from torchrec_compress.planner.lookups import decode_bytes
from torchrec_compress.planner.records import TablePlan
from torchrec_compress.planner.text import columns, how, size
from torchrec_compress.planner.what_if import WhatIf

_GIB, _FEW_TABLES = 2**30, 100
# those that take least; others are estimated only where constraints ask for them
_KINDS = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
# where rows lie in the memory of the host, or further away: slow, so only where constraints ask for it
_AWAY = {
    kernel.value
    for kernel in EmbeddingComputeKernel
    if any(word in kernel.value for word in ("uvm", "key_value", "virtual_table"))
}
_DENSE = EmbeddingComputeKernel.DENSE.value
_NEAR = [kernel.value for kernel in EmbeddingComputeKernel if kernel.value not in _AWAY]


@dataclass(frozen=True)
class Way:
    """One way to store one table, as it would be planned.

    Attributes:
        method: that stores it.
        stored_bytes: of one copy.
        planned_bytes: of all ranks: every copy, optimizer state, gradients and activations of a step.
        loss: by how much it rises, in the unit of the frontier.
        step: what TorchRec's planner thinks a step of it costs, its score in milliseconds summed over ranks.
        how: sharding types and compute kernels of its parts, those of least memory; of what is chosen, as planned.
    """

    method: MethodConfig
    stored_bytes: int
    planned_bytes: int
    loss: float
    step: float
    how: str


@dataclass(frozen=True)
class PlannedTable:
    """What one table gets, and what its neighbours would have been.

    Attributes:
        way: it is stored.
        smaller, larger: the next ones of fewer and of more bytes, or None.
    """

    way: Way
    smaller: Way | None
    larger: Way | None

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        mine, said = self.way, []
        if self.smaller is not None:
            saved, cost = mine.planned_bytes - self.smaller.planned_bytes, self.smaller.loss - mine.loss
            said.append(f"{told(self.smaller.method)} saves {size(saved)} for +{cost:.2g}")
        if self.larger is not None:
            more, gain = self.larger.planned_bytes - mine.planned_bytes, mine.loss - self.larger.loss
            said.append(f"{told(self.larger.method)} takes {size(more)} more for -{gain:.2g}")
        return "; ".join(said) or "it is the only way"


@dataclass(frozen=True, eq=False)
class PlannedChoice(Mapping[str, MethodConfig]):
    """The method of every table under a budget: a mapping by table name, as `compress` takes it.

    `str()` is a table with a reason for each.

    Attributes:
        tables: what each gets, by name; those that were not measured keep what they have.
        budget_bytes: of all ranks, that what is planned may take; less than was asked where that could not be placed.
        unit: of losses.
        frontier: bytes and loss of the best choice for many budgets, bytes ascending.
        one_more: by how much the loss falls with one GiB more.
    """

    tables: Mapping[str, PlannedTable]
    budget_bytes: int
    unit: Unit
    frontier: Sequence[tuple[int, float]]
    one_more: float

    def __getitem__(self, name: str) -> MethodConfig:
        return self.tables[name].way.method

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def planned_bytes(self) -> int:
        """Bytes of all tables over all ranks."""
        return sum(each.way.planned_bytes for each in self.tables.values())

    @property
    def loss(self) -> float:
        """By how much the loss rises."""
        return sum(each.way.loss for each in self.tables.values())

    def __str__(self) -> str:
        rows = [["table", "method", "stored", "planned", self.unit, "step", "how", "why"]]
        for name, each in self.tables.items():
            way = each.way
            rows.append([name, told(way.method), size(way.stored_bytes), size(way.planned_bytes)])
            rows[-1] += [f"{way.loss:.3g}", f"{way.step:.3g}", way.how, each.reason]
        stored = sum(each.way.stored_bytes for each in self.tables.values())
        step = sum(each.way.step for each in self.tables.values())
        rows.append(["all", "", size(stored), size(self.planned_bytes), f"{self.loss:.3g}", f"{step:.3g}", "", ""])
        lines = columns(rows, left=(0, 1, 6, 7))
        more = f"one more GiB: {f'-{self.one_more:.2g}' if self.one_more else 'no less'} {self.unit}"
        lines += ["", f"budget {size(self.budget_bytes)} over all ranks; {more}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON; `methods` is what a config's `compression` takes."""
        tables = {
            name: {
                "reason": each.reason,
                "chosen": _plain(each.way),
                "smaller": None if each.smaller is None else _plain(each.smaller),
                "larger": None if each.larger is None else _plain(each.larger),
            }
            for name, each in self.tables.items()
        }
        return {
            "unit": self.unit,
            "budget_bytes": self.budget_bytes,
            "planned_bytes": self.planned_bytes,
            "loss": self.loss,
            "one_more_gib": self.one_more,
            "methods": {name: method.to_dict() for name, method in self.items()},
            "tables": tables,
            "frontier": [list(point) for point in self.frontier],
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write choice.json, choice.md and, where matplotlib is installed, choice.png; return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("choice.json", "choice.md", "choice.png")]
        paths[0].write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        paths[1].write_text(f"# Choice\n\n```\n{self}\n```\n\n![loss against bytes](choice.png)\n")
        from torchrec_compress.planner.plots import draw_choice

        draw_choice(self.frontier, (self.planned_bytes, self.loss), self.unit, paths[2])
        return paths


def _plain(way: Way) -> dict[str, Any]:
    return {**dataclasses.asdict(way), "method": way.method.to_dict()}


class Settings(NamedTuple):
    """Of a planner.

    Attributes:
        topology, batch_size, constraints, dense_optimizer: as for `EmbeddingShardingPlanner`.
        reservation: what else needs memory.
    """

    topology: Topology
    batch_size: int
    constraints: dict[str, ParameterConstraints]
    dense_optimizer: DenseOptimizer
    reservation: StorageReservation


class Ways:
    """Every way to store every table that was measured, each planned as if it were the only one.

    What a table takes does not depend on the others, so as many models are estimated as the longest list of ways has.

    Args:
        module: the model, on any device.
        frontier: what was measured of its tables.
        settings, sharders: of the planner.

    Raises:
        ValueError: the frontier is of other tables, or two tables have one name.
    """

    def __init__(
        self,
        module: nn.Module,
        frontier: Frontier,
        settings: Settings,
        sharders: Sequence[ModuleSharder[Any]],
    ) -> None:
        self._settings, self._device = settings, settings.topology.compute_device
        self.what_if = WhatIf(module, sharders)
        self.unit: Unit = frontier.unit
        _check_tables(self.what_if, frontier)
        self.ways: dict[str, list[Way]] = {name: [] for name in self.what_if.tables}
        longest = max(len(some) for some in frontier.candidates.values())
        for number in range(longest):
            some = {name: each[number] for name, each in frontier.candidates.items() if number < len(each)}
            wanted = set(some) if number else set(self.ways)  # the first time, those that stay as they are, too
            self._add(some, wanted)

    def _add(self, some: Mapping[str, Candidate[MethodConfig]], wanted: set[str]) -> None:
        """Estimate tables in one way each."""
        changes = {name: each.option for name, each in some.items()}
        model, (topology, batch_size, wishes, optimizer, _) = self.what_if.build(changes), self._settings
        wishes = {name: _of_least_memory(wishes.get(name)) for name in self.what_if.tables}
        constraints = self.what_if.constraints(model, wishes, self._device)
        enumerator = CompressedEnumerator(topology, batch_size, constraints, optimizer)
        options = enumerator.enumerate(model, self.what_if.sharders)  # type: ignore[arg-type]
        decoded = decode_bytes(model, constraints, batch_size)
        parts: dict[str, dict[str, list[ShardingOption]]] = {}
        for option in options:
            parts.setdefault(self.what_if.table_of(option), {}).setdefault(option.fqn, []).append(option)
        for name in sorted(wanted):
            table, method = self.what_if.tables[name], changes.get(name, self.what_if.methods[name])
            best = [self._least(name, each) for each in parts.get(name, {}).values()]
            planned = sum(_memory(option, self._device) for option in best)
            planned += decoded.get(name, 0) * topology.world_size
            kinds = "; ".join(dict.fromkeys(f"{each.sharding_type} {each.compute_kernel}" for each in best))
            loss = some[name].error if name in some else 0.0
            step = sum(float(each.total_perf or 0.0) for each in best)
            self.ways[name].append(Way(method, method.stored_bytes(table), int(planned), loss, step, kinds))

    def _least(self, name: str, options: list[ShardingOption]) -> ShardingOption:
        """Return the option of least memory, in the memory of the device unless constraints ask for another."""
        asked = set(self._settings.constraints.get(name, ParameterConstraints()).compute_kernels or ())
        near = [each for each in options if each.compute_kernel not in _AWAY or each.compute_kernel in asked]
        return min(near or options, key=lambda each: (_memory(each, self._device), each.total_perf or 0.0))

    def choose(self, budget_bytes: int) -> PlannedChoice:
        """Return the choice of least loss within a budget.

        Raises:
            ValueError: it is below the smallest choice, which is named.
        """
        candidates = {
            name: undominated(name, [Candidate(way.planned_bytes, way.loss, way) for way in some])
            for name, some in self.ways.items()
        }
        # of many tables the greedy choice is off by one step of one of them at most
        most = MAX_STATES if len(candidates) <= _FEW_TABLES else 0
        found = allocate(candidates, budget_bytes, max_states=most)
        more = found.error - allocate(candidates, budget_bytes + _GIB, max_states=most).error
        tables = {}
        for name, each in found.choices.items():
            order = [one.option for one in candidates[name]]
            at = order.index(each.option)
            larger = order[at + 1] if at + 1 < len(order) else None
            tables[name] = PlannedTable(each.option, order[at - 1] if at else None, larger)
        return PlannedChoice(tables, int(budget_bytes), self.unit, convex_frontier(candidates), max(more, 0.0))

    @property
    def most_bytes(self) -> int:
        """What all tables take in their largest way."""
        return sum(max(way.planned_bytes for way in some) for some in self.ways.values())

    @property
    def least_bytes(self) -> int:
        """What all tables take in their smallest way."""
        return sum(min(way.planned_bytes for way in some) for some in self.ways.values())


def _of_least_memory(wish: ParameterConstraints | None) -> ParameterConstraints:
    """Return constraints that leave out what nobody asked for: kernels far away, sharding types that take no less."""
    wish = ParameterConstraints() if wish is None else wish
    kernels = wish.compute_kernels or _NEAR
    # the dense kernel is that of replicated tables alone
    types = wish.sharding_types or (_KINDS if set(kernels) - {_DENSE} else [ShardingType.DATA_PARALLEL.value])
    return dataclasses.replace(wish, sharding_types=list(types), compute_kernels=list(kernels))


def _memory(option: ShardingOption, device: str) -> int:
    """Return what an option takes over all ranks, wherever it lies."""
    total = option.total_storage
    return int(total.ddr if device == "cpu" else total.hbm + total.ddr + getattr(total, "ssd", 0))


def _check_tables(what_if: WhatIf, frontier: Frontier) -> None:
    """Raise ValueError unless a frontier is of tables of the model, each known by its name."""
    twice = sorted(name for name, count in Counter(what_if.names).items() if count > 1)
    if twice:
        raise ValueError(f"choose: tables must have names of their own, got {twice} in several collections")
    unknown = sorted(set(frontier.candidates) - set(what_if.tables))
    if unknown or not frontier.candidates:
        raise ValueError(f"choose: the frontier must be of tables {sorted(what_if.tables)}, got {unknown or 'none'}")
    for name, (rows, width) in frontier.sizes.items():
        table = what_if.tables[name]
        if (table.num_embeddings, table.embedding_dim) != (rows, width):
            raise ValueError(
                f"choose: table {name!r}: the frontier must be of {table.num_embeddings} x {table.embedding_dim}, got "
                f"{rows} x {width}; measure it on this model"
            )


def _check_near(tables: Mapping[str, TablePlan], settings: Settings) -> None:
    """Raise PlannerError where a plan fits only since rows lie in the memory of the host, which nobody asked for."""
    for name, table in tables.items():
        asked = set(settings.constraints.get(name, ParameterConstraints()).compute_kernels or ())
        away = [part.compute_kernel for part in table.parts if part.compute_kernel in _AWAY - asked]
        if away:
            raise PlannerError(
                f"choose: table {name!r}: must fit the memory of the devices, and fits {away[0]!r} alone; give more, "
                "measure smaller ways, or allow that kernel by its constraints",
                PlannerErrorType.INSUFFICIENT_STORAGE,
            )


class TooSmallBudget(ValueError):
    """A budget with which not even the smallest ways fit.

    Attributes:
        got: bytes, as given, or all that there are.
    """

    def __init__(self, text: str, got: int) -> None:
        super().__init__(text)
        self.got = got


def choose(
    planner: Any,
    module: nn.Module,
    frontier: Frontier,
    budget_bytes: int | None,
    sharders: list[ModuleSharder[Any]],
    settings: Settings,
) -> PlannedChoice:
    """Return what `EmbeddingShardingPlanner.choose` does; the planner plans what is chosen, to see that it fits."""
    if budget_bytes is not None:
        check_budget("choose", budget_bytes)
    ways = Ways(module, frontier, settings, sharders)
    left = settings.reservation.reserve(settings.topology, settings.batch_size, module, sharders, settings.constraints)
    storages = [device.storage for device in left.devices]
    room = sum(storage.ddr if left.compute_device == "cpu" else storage.hbm for storage in storages)
    budget = room if budget_bytes is None else min(room, int(budget_bytes))
    if budget < ways.least_bytes:
        raise TooSmallBudget(
            f"choose: budget_bytes must be at least the {ways.least_bytes:,} bytes ({size(ways.least_bytes)}) of the "
            f"smallest way of every table, over all ranks, got {budget:,}"
            + (f", all that {settings.topology.world_size} ranks have left" if budget == room else "")
            + f", of weights, states and what batches of {settings.batch_size} make; give more, measure smaller ways, "
            "or plan smaller batches",
            budget,
        )
    most = min(budget, ways.most_bytes)
    # what fits in all may not fit on each: less, until it does
    for share in (1.0, 0.97, 0.93, 0.85, 0.7, 0.5, 0.0):
        found = ways.choose(max(int(share * most), ways.least_bytes))
        try:
            planner.plan(ways.what_if.build(found), ways.what_if.sharders)
            planned = planner.report.tables
            _check_near(planned, settings)
        except PlannerError:
            if share:
                continue
            raise
        tables = {
            name: dataclasses.replace(each, way=dataclasses.replace(each.way, how=how(planned[name])))
            for name, each in found.tables.items()
        }
        return dataclasses.replace(found, tables=tables, budget_bytes=budget if share == 1.0 else found.budget_bytes)
    raise AssertionError("the last share returns or raises")
