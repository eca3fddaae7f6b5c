"""One method for all tables, at the size at which they fit a budget: how methods are compared at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.compression.candidates import can_store
from torchrec_compress.compression.frontier import check_budget
from torchrec_compress.methods import DenseConfig, MethodConfig, dense_bytes
from torchrec_compress.methods.base import shared_bytes, stored_together

_STEPS = 60  # halvings of the range of ratios


class _Size(NamedTuple):
    """A way to store a table, and its bytes."""

    num_bytes: int
    method: MethodConfig


def sized(
    tables: Sequence[BaseEmbeddingConfig], method: MethodConfig, budget_bytes: float, *, dense_share: float = 0.1
) -> dict[str, MethodConfig]:
    """Return a method for every table, the same but for its size, so that all of them together fit a budget.

    The smallest tables stay dense, as many as take no more than `dense_share` of the budget: a few weekdays that share
    a row lose far more than their bytes bring. The others become smaller by one ratio, the least with which all fit;
    one that the method cannot make so small has its smallest size, one that it cannot make smaller at all is dense.
    What tables share, as the array of `RobeConfig`, has one size for all.

    Args:
        tables: the user's configs.
        method: whose sizes (buckets, blocks, rows, a width, codes and codewords) are replaced.
        budget_bytes: for all tables, everything counted, as they are stored once they were trained.
        dense_share: of the budget, in [0, 1], for the smallest tables; 0 gives the method to all.

    Returns:
        The method by table name, as `compress` and compressed collections take it.

    Raises:
        ValueError: no tables, two of one name; no method, or one that can store none of them at any size; the budget is
            no number of bytes, or below the least that the method can do, which is named; a share that is none.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import HashConfig
        >>> tables = [EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16) for name, rows in
        ...           (("user", 10_000), ("day", 7))]
        >>> found = sized(tables, HashConfig(num_buckets=1), 64_000)
        >>> found["user"], found["day"]
        (HashConfig(num_buckets=979), DenseConfig())
    """
    check_budget("sized", budget_bytes)
    _check_asked(tables, method)
    if isinstance(dense_share, bool) or not isinstance(dense_share, int | float) or not 0 <= dense_share <= 1:
        raise ValueError(f"sized: dense_share must be a number in [0, 1], got {dense_share!r}")
    small = _smallest(tables, dense_share * budget_bytes)
    while True:
        dense = {table.name: DenseConfig() for table in small}
        rest = [table for table in tables if table.name not in dense]
        try:
            found = _fitted(rest, method, budget_bytes - sum(map(dense_bytes, small)))
        except _TooLittle:
            if not small:
                raise
            small.pop()  # its bytes are needed
        else:
            return {table.name: dense.get(table.name) or found[table.name] for table in tables}


class _TooLittle(ValueError):
    """A budget is below the least that a method can do."""

    def __init__(self, method: MethodConfig, least: int, budget_bytes: float) -> None:
        super().__init__(
            f"sized: budget_bytes must be at least {least}, the least that method {method.method!r} can store these "
            f"tables in, got {budget_bytes:g}; choose another method"
        )


def _smallest(tables: Sequence[BaseEmbeddingConfig], num_bytes: float) -> list[BaseEmbeddingConfig]:
    """Return the smallest tables, ascending, as many as take so many bytes dense; never all."""
    found: list[BaseEmbeddingConfig] = []
    for table in sorted(tables, key=dense_bytes)[:-1]:
        num_bytes -= dense_bytes(table)
        if num_bytes < 0:
            break
        found.append(table)
    return found


def _fitted(
    tables: Sequence[BaseEmbeddingConfig], method: MethodConfig, budget_bytes: float
) -> dict[str, MethodConfig]:
    """Return the method of each table, all of one ratio; arguments as in `sized`."""
    if _share(tables, method):
        return _sized_together(tables, method, budget_bytes)
    found = {table.name: _sizes(table, method) for table in tables}
    full = {table.name: dense_bytes(table) for table in tables}
    least = sum(sizes[0].num_bytes for sizes in found.values())
    if least > budget_bytes:
        raise _TooLittle(method, least, budget_bytes)

    def at(ratio: float) -> dict[str, _Size]:
        """Return what every table is stored as, when all are to be so many times smaller."""
        wanted = {name: num_bytes / ratio for name, num_bytes in full.items()}
        return {
            name: max((size for size in sizes if size.num_bytes <= wanted[name]), default=sizes[0])
            for name, sizes in found.items()
        }

    low, high = 1.0, float(max(full.values()))
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        fits = sum(size.num_bytes for size in at(middle).values()) <= budget_bytes
        low, high = (low, middle) if fits else (middle, high)
    return {name: size.method for name, size in at(high).items()}


def _check_asked(tables: object, method: object) -> None:
    """Raise ValueError unless these are tables of different names, of which the method can store one at some size."""
    if not isinstance(method, MethodConfig):
        raise ValueError(f"sized: method must be one such as HashConfig(num_buckets=1), got {method!r}")
    if not isinstance(tables, list | tuple) or not all(isinstance(table, BaseEmbeddingConfig) for table in tables):
        raise ValueError(f"sized: tables must be a list of TorchRec's configs, got {type(tables).__name__}")
    names = [table.name for table in tables]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sized: tables must have different names, one at least, got {names}")
    if not any(can_store(each, table) for table in tables for each in method.resized(table)):
        largest = max(tables, key=dense_bytes)
        for each in list(method.resized(largest))[-1:]:
            each.check(largest)  # says why


def _share(tables: Sequence[BaseEmbeddingConfig], method: MethodConfig) -> bool:
    """Return whether two tables would store something together."""
    seen: set[str] = set()
    for table in tables:
        mine = next((set(shared_bytes(each, table)) for each in method.resized(table) if can_store(each, table)), set())
        if seen & mine:
            return True
        seen |= mine
    return False


def _sizes(table: BaseEmbeddingConfig, method: MethodConfig) -> list[_Size]:
    """Return the sizes that a table can have, ascending in bytes; dense where all are larger."""
    full = _Size(DenseConfig().stored_bytes(table), DenseConfig())
    by_bytes: dict[int, _Size] = {}
    for each in method.resized(table):
        if can_store(each, table) and (num_bytes := each.exported().stored_bytes(table)) < full.num_bytes:
            by_bytes.setdefault(num_bytes, _Size(num_bytes, each))
    return [by_bytes[num_bytes] for num_bytes in sorted(by_bytes)] or [full]


def _sized_together(
    tables: Sequence[BaseEmbeddingConfig], method: MethodConfig, budget_bytes: float
) -> dict[str, MethodConfig]:
    """Return a method whose tables share what they store; arguments as in `sized`."""
    largest = max(tables, key=dense_bytes)
    fitting: list[tuple[int, dict[str, MethodConfig]]] = []
    least = None
    for each in method.resized(largest):
        chosen: dict[str, MethodConfig] = {
            table.name: each if can_store(each, table) else DenseConfig() for table in tables
        }
        total = stored_together((chosen[table.name], table) for table in tables)
        if total >= sum(map(dense_bytes, tables)):
            continue  # a collection would leave them dense
        least = total if least is None else min(least, total)
        if total <= budget_bytes:
            fitting.append((total, chosen))
    if not fitting:
        raise _TooLittle(method, least or sum(map(dense_bytes, tables)), budget_bytes)
    return max(fitting, key=lambda each: each[0])[1]
