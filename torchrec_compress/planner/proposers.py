"""A proposer whose work grows with the tables, not with their square, and what is left of TorchRec's own."""

from __future__ import annotations

import math
import operator
from functools import reduce
from itertools import product
from typing import NamedTuple

from torchrec.distributed.planner.types import Enumerator, PartitionByType, Proposer, ShardingOption, Topology

from torchrec_compress.planner.means import sound_choices

# Weights of storage against time, as shares of their spreads over all options.
_TRADE_OFFS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class TradeOffProposer(Proposer):
    """Propose a dozen plans between the quickest and the smallest, and with tables that pool by mean two dozen.

    Each table takes the option with the least time plus weighted storage, for several weights; the ends are the least
    time (of the slowest shard, and over all shards), the least storage over all ranks, and the smallest largest shard.
    TorchRec's `GreedyProposer` moves one table at a time and looks at all of them again for each move, which for 1,000
    tables takes hours.
    """

    def __init__(self) -> None:
        self._proposals: list[list[ShardingOption]] = []
        self._next = 0

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Make the proposals from estimated options."""
        costs = {id(option): _costs(option) for option in search_space}
        spread = [max((cost[n] for cost in costs.values()), default=0.0) or 1.0 for n in range(4)]
        weights = [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)]
        weights += [(1.0, 0.0, share, share) for share in _TRADE_OFFS]
        found: dict[tuple[int, ...], list[ShardingOption]] = {}
        tables = [_by_table(space) for space in sound_choices(search_space)]
        for weight, by_table in product(weights, tables):

            def score(option: ShardingOption, weight: tuple[float, ...] = weight) -> tuple[float, float, str]:
                cost = costs[id(option)]
                total = sum(w * c / s for w, c, s in zip(weight, cost, spread, strict=True))
                # ties by storage, then by name, so that a plan does not depend on the order of the options
                return total, cost[2], f"{option.sharding_type} {option.compute_kernel}"

            proposal = [min(options, key=score) for options in by_table.values()]
            found.setdefault(tuple(id(option) for option in proposal), proposal)
        self._proposals, self._next = list(found.values()), 0

    def propose(self) -> list[ShardingOption] | None:
        """Return the next proposal, or None after the last."""
        return self._proposals[self._next] if self._next < len(self._proposals) else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Go on to the next; what the planner says of the last one does not matter."""
        self._next += 1


def _by_table(search_space: list[ShardingOption]) -> dict[str, list[ShardingOption]]:
    by_table: dict[str, list[ShardingOption]] = {}
    for option in search_space:
        by_table.setdefault(option.fqn, []).append(option)
    return by_table


def _costs(option: ShardingOption) -> tuple[float, float, float, float]:
    """Return the slowest shard and all shards in ms, all bytes and the largest shard in bytes."""
    times, sizes = [], []
    for shard in option.shards:
        assert shard.perf is not None and shard.storage is not None
        times.append(shard.perf.total)
        sizes.append(float(shard.storage.hbm + shard.storage.ddr))
    return max(times), sum(times), sum(sizes), max(sizes)


class UnlessMany(Proposer):
    """Another proposer, which proposes nothing where there are more than `limit` tables to place."""

    def __init__(self, inner: Proposer, limit: int) -> None:
        self._inner, self._limit, self._active = inner, limit, False

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Load the other proposer where there are few."""
        self._active = len({option.fqn for option in search_space}) <= self._limit
        if self._active:
            self._inner.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        """Return the other's proposal, or None."""
        return self._inner.propose() if self._active else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Hand the planner's answer on."""
        self._inner.feedback(partitionable, plan, perf_rating, storage_constraint)


class UnlessNoQuicker(Proposer):
    """Another proposer, without what cannot be quicker than a plan that is there already.

    The planner keeps the first of its quickest plans, so it finds the same one. For a proposer that does not ask what
    became of its proposals, as TorchRec's grid search, whose thousands each take time for every rank; for the rating
    that is the planner's default, the time of the slowest rank; and for `GreedyPerfPartitioner`, which puts one shard
    of an option that is cut uniformly on each rank.
    """

    def __init__(self, inner: Proposer) -> None:
        self._inner, self._best = inner, math.inf
        self._times: dict[int, _Times] = {}

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Load the other proposer."""
        self._best, self._times = math.inf, {id(option): _times(option) for option in search_space}
        self._inner.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        """Return the other's next proposal that may be quicker, or None."""
        while (proposal := self._inner.propose()) is not None and self._least_time(proposal) >= self._best:
            self._inner.feedback(partitionable=False)
        return proposal

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Note how quick a plan is, and hand the planner's answer on."""
        if perf_rating is not None:
            self._best = min(self._best, perf_rating)
        self._inner.feedback(partitionable, plan, perf_rating, storage_constraint)

    def _least_time(self, proposal: list[ShardingOption]) -> float:
        """Return what the slowest rank takes at least, wherever shards that are not uniform go.

        Added up in the order of the rating, of some of what it adds up, so that it is no larger in floats either.
        """
        times = [self._times[id(option)] for option in proposal]
        ranks = [[each.least for each in times]]
        for number, mine in enumerate(times):
            if not mine.is_uniform:  # its slowest shard goes to a rank that has one of each uniform option, too
                ranks.append([each.least for each in times])
                ranks[-1][number] = mine.most
        return max(reduce(operator.add, rank) for rank in ranks)  # `sum` of newer Pythons would round otherwise


class _Times(NamedTuple):
    """Of an option: whether each rank gets a shard, and the ms that each has of it at least, and one at most."""

    is_uniform: bool
    least: float
    most: float


def _times(option: ShardingOption) -> _Times:
    times = [shard.perf.total for shard in option.shards if shard.perf is not None]
    if option.partition_by == PartitionByType.UNIFORM.value:
        return _Times(True, min(times), max(times))
    return _Times(False, 0.0, max(times))
