"""What to compress further where tables do not fit, tried out before it is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.planner.utils import reset_shard_rank
from torchrec.distributed.types import ModuleSharder

from torchrec_compress.compression.candidates import step
from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.base import NUM_LEVELS, stored_together
from torchrec_compress.planner.accounting import DenseOptimizer
from torchrec_compress.planner.enumerators import CompressedEnumerator
from torchrec_compress.planner.lookups import decode_bytes
from torchrec_compress.planner.proposers import TradeOffProposer
from torchrec_compress.planner.text import size
from torchrec_compress.planner.what_if import WhatIf

_MOST_NAMED = 8


@dataclass(frozen=True)
class Failure:
    """Everything about a plan that was not found.

    Args:
        module: the model.
        sharders, constraints, batch_size, dense_optimizer: of the planner.
        topology: with what the reservations left.
        options: everything that the planner could choose from, estimated.
    """

    module: nn.Module
    sharders: list[ModuleSharder[nn.Module]]
    constraints: dict[str, ParameterConstraints] | None
    batch_size: int
    dense_optimizer: DenseOptimizer
    topology: Topology
    options: list[ShardingOption]


@dataclass(frozen=True)
class Advice:
    """What does not fit, and what would.

    Args:
        missing_bytes: memory that every rank lacks, at least.
        tables: stored bytes, over all ranks, of the tables that are to change, or of the largest where nothing helps.
        changes: the methods under which everything fits, by table name; empty where none was found.
    """

    missing_bytes: int
    tables: dict[str, int]
    changes: dict[str, MethodConfig]

    @property
    def yaml_line(self) -> str:
        """The changes as one line of YAML, for the mapping `compression:`."""
        plain = {name: _written(method) for name, method in self.changes.items()}
        return json.dumps(plain)  # which is YAML too

    @property
    def python_line(self) -> str:
        """The changes as one line of Python."""
        return "compression={" + ", ".join(f"{name!r}: {_call(method)}" for name, method in self.changes.items()) + "}"


class InsufficientStorageError(PlannerError):
    """No plan fits; the message names tables, the bytes missing, and a line to paste.

    Attributes:
        advice: the same as data.
    """

    def __init__(self, message: str, advice: Advice, error_type: PlannerErrorType) -> None:
        super().__init__(message, error_type)
        self.advice = advice

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.advice, self.error_type)

    @classmethod
    def of(cls, failure: Failure, error: PlannerError) -> InsufficientStorageError:
        """Work out what is missing and what would help.

        Args:
            failure: what the planner could choose from.
            error: that it raised, whose text is kept.
        """
        advice = advise(failure)
        named = list(advice.tables.items())
        tables = ", ".join(f"{name!r} ({size(stored)})" for name, stored in named[:_MOST_NAMED])
        if len(named) > _MOST_NAMED:
            tables += f" and {len(named) - _MOST_NAMED} more"
        left = min(_memory(device.storage, failure.topology) for device in failure.topology.devices)
        lines = [
            f"planner: all tables must fit into {size(left)} on each of {failure.topology.world_size} ranks, but "
            f"{size(advice.missing_bytes)} ({advice.missing_bytes:,} bytes) a rank are missing. Too large: {tables}."
        ]
        if advice.changes:
            lines += [
                "It fits with these methods, put before any pattern such as '*':",
                f"  YAML, under compression:  {advice.yaml_line}",
                f"  Python:                   {advice.python_line}",
            ]
        else:
            lines.append("No compression of single tables was found to fit; use more ranks, or a smaller batch.")
        return cls("\n".join([*lines, "", f"TorchRec says: {error}"]), advice, error.error_type)


def advise(failure: Failure) -> Advice:
    """Return what is missing, and the gentlest compression that makes the tables fit.

    Methods are tried from the gentlest: int8, int4, then codes, ever fewer. For the first that would free enough, as
    few tables as possible change, the largest first. The result is estimated and placed like any plan before it is
    returned.
    """
    missing = missing_bytes(failure.options, failure.topology)
    what_if = WhatIf(failure.module, failure.sharders)
    stored = _stored_by_table(failure.options, what_if)
    for level in range(NUM_LEVELS):
        steps = {
            name: step(what_if.tables[name], what_if.methods[name], level) for name in stored if name in what_if.methods
        }
        changes = {name: method for name, method in steps.items() if method is not None}
        room = sum(_memory(device.storage, failure.topology) for device in failure.topology.devices)
        if not changes or _least_bytes(what_if, changes) > room:
            continue
        trial = _Trial(failure, what_if, changes)
        if trial.fits(len(changes)):
            changes = dict(list(changes.items())[: trial.fewest()])
            return Advice(missing, {name: stored[name] for name in changes}, changes)
    return Advice(missing, dict(list(stored.items())[:_MOST_NAMED]), {})


def missing_bytes(options: list[ShardingOption], topology: Topology) -> int:
    """Return how much memory every rank lacks for some plan to fit, to a thousandth.

    Args:
        options: to choose from, estimated.
        topology: with what is left of the memory.

    Raises:
        ValueError: the constraints allow no plan, however much memory there is.
    """
    proposals = _proposals(options)
    low, high = 0, 2**20
    while not any(_places(proposal, topology, high) for proposal in proposals):
        low, high = high, 2 * high
        if high > 2**60:
            raise ValueError("missing_bytes: constraints must allow some plan, got none that fits any memory")
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        if any(_places(proposal, topology, middle) for proposal in proposals):
            high = middle
        else:
            low = middle
    return high


class _Trial:
    """Some tables under other methods: their options, in place of those that they have now.

    The options of a table do not depend on other tables, so all are estimated once, whichever of them change.
    """

    def __init__(self, failure: Failure, what_if: WhatIf, changes: Mapping[str, MethodConfig]) -> None:
        self._topology, self._names = failure.topology, list(changes)
        model = what_if.build(changes)
        constraints = what_if.constraints(model, failure.constraints, failure.topology.compute_device)
        enumerator = CompressedEnumerator(failure.topology, failure.batch_size, constraints, failure.dense_optimizer)
        self._before = [(what_if.table_of(option), option) for option in failure.options]
        self._after = [(what_if.table_of(option), option) for option in enumerator.enumerate(model, what_if.sharders)]
        decoded = decode_bytes(model, constraints, failure.batch_size)
        already = decode_bytes(failure.module, failure.constraints, failure.batch_size)
        self._decoded = {name: decoded.get(name, 0) - already.get(name, 0) for name in changes}

    def fits(self, count: int) -> bool:
        """Return whether everything fits with the first `count` changes."""
        changed = set(self._names[:count])
        options = [option for name, option in self._before if name not in changed]
        options += [option for name, option in self._after if name in changed]
        decoded = sum(self._decoded[name] for name in changed)
        return any(_places(proposal, self._topology, -decoded) for proposal in _proposals(options))

    def fewest(self) -> int:
        """Return the least number of changes, largest tables first, under which everything fits."""
        low, high = 0, len(self._names)  # `high` changes are known to fit, `low` ones not to
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(middle) else (middle, high)
        return high


def _least_bytes(what_if: WhatIf, changes: Mapping[str, MethodConfig]) -> int:
    """Return what the tables take at least, once: a quick look before all of them are estimated."""
    return stored_together(
        (changes.get(name, method), what_if.tables[name]) for name, method in what_if.methods.items()
    )


def _proposals(options: list[ShardingOption]) -> list[list[ShardingOption]]:
    proposer = TradeOffProposer()
    proposer.load(options)
    found = []
    while (proposal := proposer.propose()) is not None:
        found.append(proposal)
        proposer.feedback(False)
    return found


def _places(proposal: list[ShardingOption], topology: Topology, extra: int) -> bool:
    """Return whether a proposal can be placed where every rank has so many bytes more."""
    roomy = copy.deepcopy(topology)
    for device in roomy.devices:
        if topology.compute_device == "cpu":
            device.storage.ddr += extra
        else:
            device.storage.hbm += extra
    needed = sum(_memory(option.total_storage, topology) for option in proposal)
    if needed > sum(_memory(device.storage, topology) for device in roomy.devices):
        return False
    try:
        GreedyPerfPartitioner().partition(proposal, roomy)
    except PlannerError:
        return False
    finally:
        reset_shard_rank(proposal)
    return True


def _stored_by_table(options: list[ShardingOption], what_if: WhatIf) -> dict[str, int]:
    """Return the least bytes of every table over all ranks, the largest first."""
    least: dict[tuple[str, str], int] = {}
    for option in options:
        total = option.total_storage
        key = (what_if.table_of(option), option.fqn)
        least[key] = min(least.get(key, total.hbm + total.ddr), total.hbm + total.ddr)
    found: dict[str, int] = {}
    for (name, _), num_bytes in least.items():
        found[name] = found.get(name, 0) + num_bytes
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _memory(storage: Storage | None, topology: Topology) -> int:
    assert storage is not None
    return math.floor(storage.ddr if topology.compute_device == "cpu" else storage.hbm)


def _changed(method: MethodConfig) -> dict[str, Any]:
    """Return the options of a method that are not its defaults."""
    defaults = {
        field.name: field.default
        if field.default is not dataclasses.MISSING or field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(method)
    }
    return {name: getattr(method, name) for name in defaults if getattr(method, name) != defaults[name]}


def _written(method: MethodConfig) -> dict[str, Any]:
    plain = method.to_dict()
    return {"method": method.method, **{name: plain[name] for name in _changed(method)}}


def _call(method: MethodConfig) -> str:
    return f"{type(method).__name__}({', '.join(f'{name}={value!r}' for name, value in _changed(method).items())})"
