"""Share a byte budget out over tables: the multiple-choice knapsack problem.

One option per table, total bytes within the budget, total error least (Kellerer, Pferschy, Pisinger, "Knapsack
Problems", 2004, chapter 11): lower convex hulls and a greedy walk give a good choice and a lower bound; exact dynamic
programming over undominated (bytes, error) states, cut by that bound, then gives the best one.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Option = TypeVar("Option")
MAX_STATES = 200_000


@dataclass(frozen=True)
class Candidate(Generic[Option]):
    """One way to store one table.

    Attributes:
        num_bytes: all that it stores, in bytes, >= 0.
        error: what it costs in quality, >= 0, on one scale for all tables, for example lookups * weighted error * D.
        option: whatever the caller wants back, for example a config.
    """

    num_bytes: int
    error: float
    option: Option


@dataclass(frozen=True)
class Allocation(Generic[Option]):
    """Result of `allocate`.

    Attributes:
        choices: one candidate per table.
        num_bytes: their bytes together, within the budget.
        error: their error together.
        lower_bound: no choice within the budget has a smaller error; equal to `error` where the choice is proven best.
    """

    choices: dict[str, Candidate[Option]]
    num_bytes: int
    error: float
    lower_bound: float


def allocate(
    candidates: Mapping[str, Sequence[Candidate[Option]]], budget_bytes: float, *, max_states: int = MAX_STATES
) -> Allocation[Option]:
    """Choose one candidate per table so that the bytes fit the budget and the summed error is least.

    The choice is optimal unless the exact search needs more than `max_states` states for one table; then it is the
    greedy one, and `lower_bound` tells how far from the best it can be at most.

    Args:
        candidates: table name -> its candidates, at least one.
        budget_bytes: bytes for all tables together.
        max_states: limit of the exact search, about 100 bytes of memory a state and table.

    Raises:
        ValueError: no tables, a table without candidates, a negative or NaN number, or a budget below the cheapest
            choice (the message names both in bytes).

    Example:
        >>> hot = [Candidate(10, 8.0, "short"), Candidate(20, 1.0, "long")]
        >>> cold = [Candidate(10, 2.0, "short"), Candidate(20, 1.0, "long")]
        >>> {name: c.option for name, c in allocate({"hot": hot, "cold": cold}, 30).choices.items()}
        {'hot': 'long', 'cold': 'short'}
    """
    fronts = {name: undominated(name, some) for name, some in candidates.items()}
    if not fronts:
        raise ValueError("allocate: candidates must name at least one table, got none")
    cheapest = sum(front[0].num_bytes for front in fronts.values())
    if budget_bytes < cheapest:
        raise ValueError(
            f"allocate: budget_bytes must be at least the cheapest choice's {cheapest} bytes, got {budget_bytes} bytes "
            f"({cheapest - budget_bytes} too few); raise the budget or offer shorter codes"
        )
    names = list(fronts)
    tables = [fronts[name] for name in names]
    greedy, bound = _greedy(tables, budget_bytes)
    best = _search(tables, budget_bytes, sum(c.error for c in greedy), max_states)
    chosen = greedy if best is None else best
    error = sum(c.error for c in chosen)
    return Allocation(
        choices=dict(zip(names, chosen, strict=True)),
        num_bytes=sum(c.num_bytes for c in chosen),
        error=error,
        lower_bound=min(bound, error) if best is None else error,
    )


def convex_frontier(candidates: Mapping[str, Sequence[Candidate[Option]]]) -> list[tuple[int, float]]:
    """Return bytes and error of all tables together, from the cheapest choice on, step by step of their convex hulls.

    Each is the best choice of so many bytes; between two of them there may be others.

    Example:
        >>> hot = [Candidate(10, 8.0, "short"), Candidate(20, 1.0, "long")]
        >>> convex_frontier({"hot": hot, "cold": [Candidate(10, 2.0, "short"), Candidate(20, 1.0, "long")]})
        [(20, 10.0), (30, 3.0), (40, 2.0)]
    """
    tables = [undominated(name, some) for name, some in candidates.items()]
    relaxed = _Relaxed(tables)
    return [(size, max(error, 0.0)) for size, error in zip(relaxed.sizes, relaxed.errors, strict=True)]


def undominated(name: str, candidates: Sequence[Candidate[Option]]) -> list[Candidate[Option]]:
    """Return the undominated candidates: bytes rise and error falls, strictly."""
    if not candidates:
        raise ValueError(f"allocate: table {name!r} must have at least one candidate, got none")
    for c in candidates:
        if c.num_bytes < 0 or not 0 <= c.error < math.inf:
            raise ValueError(
                f"allocate: table {name!r}: bytes must be >= 0 and error finite and >= 0, "
                f"got {c.num_bytes} bytes and error {c.error} for {c.option!r}"
            )
    front: list[Candidate[Option]] = []
    for c in sorted(candidates, key=lambda c: (c.num_bytes, c.error)):
        if not front or c.error < front[-1].error:
            front.append(c)
    return front


def _hull(front: list[Candidate[Option]]) -> list[Candidate[Option]]:
    """Return the lower convex hull of a front: error saved per byte falls from step to step."""
    hull: list[Candidate[Option]] = []
    for c in front:
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _rate(small: Candidate[Option], large: Candidate[Option]) -> float:
    """Return the error saved per byte between two neighbours of a front."""
    return (small.error - large.error) / (large.num_bytes - small.num_bytes)


def _steps(tables: list[list[Candidate[Option]]]) -> list[tuple[float, int, Candidate[Option], Candidate[Option]]]:
    """Return the hull steps (rate, table, from, to) of all tables, best rate first."""
    steps = []
    for number, front in enumerate(tables):
        hull = _hull(front)
        steps += [(_rate(a, b), number, a, b) for a, b in itertools.pairwise(hull)]
    # Within a table rates fall, so this order never takes a step before the one it starts from.
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2].num_bytes))


def _greedy(tables: list[list[Candidate[Option]]], budget: float) -> tuple[list[Candidate[Option]], float]:
    """Walk the hull steps while they fit; return the choice and the lower bound of the relaxed problem."""
    chosen = [front[0] for front in tables]
    left = budget - sum(c.num_bytes for c in chosen)
    bound, stopped = sum(c.error for c in chosen), False
    spare = left
    for rate, number, small, large in _steps(tables):
        size = large.num_bytes - small.num_bytes
        if not stopped:
            bound -= rate * min(size, spare)
            stopped = size > spare
            spare -= size
        if chosen[number] is small and size <= left:
            chosen[number], left = large, left - size
    return chosen, bound


class _Relaxed:
    """Lower bound of the error of tables number.. within some bytes: the hull steps, the last one taken in part."""

    def __init__(self, tables: list[list[Candidate[Option]]]) -> None:
        error, size = sum(front[0].error for front in tables), sum(front[0].num_bytes for front in tables)
        self.sizes, self.errors, self.rates = [size], [error], [0.0]
        for rate, _, small, large in _steps(tables):
            self.sizes.append(self.sizes[-1] + large.num_bytes - small.num_bytes)
            self.errors.append(self.errors[-1] - (small.error - large.error))
            self.rates.append(rate)

    def bound(self, num_bytes: float) -> float:
        """Return the bound; infinite where not even the cheapest choice fits."""
        at = bisect.bisect_right(self.sizes, num_bytes) - 1
        if at < 0:
            return math.inf
        if at + 1 == len(self.sizes):
            return self.errors[at]
        return self.errors[at] - self.rates[at + 1] * (num_bytes - self.sizes[at])


def _search(
    tables: list[list[Candidate[Option]]], budget: float, known: float, max_states: int
) -> list[Candidate[Option]] | None:
    """Return the best choice, or None where it takes more than `max_states` states for one table."""
    # rounding must not cut the best state off, where its error is zero either
    slack = max(1e-9 * known, 1e-12 * sum(front[0].error for front in tables), 1e-300)
    states: list[tuple[int, float, tuple]] = [(0, 0.0, ())]  # bytes, error, (candidate, the state before it)
    for number, front in enumerate(tables):
        rest = _Relaxed(tables[number + 1 :])
        grown = []
        for size, error, trail in states:
            for c in front:
                total, cost = size + c.num_bytes, error + c.error
                if total <= budget and cost + rest.bound(budget - total) <= known + slack:
                    grown.append((total, cost, (c, trail)))
            if len(grown) > 4 * max_states:
                return None
        grown.sort(key=lambda state: state[:2])
        states, least = [], math.inf
        for state in grown:
            if state[1] < least:
                states.append(state)
                least = state[1]
        if len(states) > max_states:
            return None
    chosen, trail = [], min(states, key=lambda state: state[1])[2]
    while trail:
        chosen.append(trail[0])
        trail = trail[1]
    return chosen[::-1]
