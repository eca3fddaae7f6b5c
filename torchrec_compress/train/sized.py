"""One method at a budget of bytes, as `compression` states it; what it is follows from the sizes of tables alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.compression import parse, sized
from torchrec_compress.methods import MethodConfig, dense_bytes
from torchrec_compress.train.byte_budget import Budget


@dataclass(frozen=True)
class Sized:
    """A method and the budget that its size is set by.

    Args:
        method: whose sizes are replaced.
        budget: of all tables.
    """

    method: MethodConfig
    budget: Budget

    def methods(self, tables: Sequence[EmbeddingBagConfig]) -> dict[str, MethodConfig]:
        """Return the method of every table, see `compression.sized`.

        Raises:
            ValueError: the method cannot store them in so few bytes.
        """
        return sized(tables, self.method, self.budget.num_bytes(sum(map(dense_bytes, tables))))


def sized_of(budget: Budget) -> Sized | None:
    """Return the method that a budget names, or None where it names none.

    Raises:
        ValueError: it is no method, or stands beside what is for a choice.

    Example:
        >>> sized_of(Budget(budget_ratio=50, method={"method": "hash", "num_buckets": 1})).method
        HashConfig(num_buckets=1)
    """
    if not budget.method:
        return None
    usual = Budget()
    for name in ("codes", "num_codes", "widths"):
        if getattr(budget, name) != getattr(usual, name):
            raise ValueError(f"compression.{name}: must be left out beside one method, got {getattr(budget, name)}")
    try:
        found = parse(budget.method)
    except ValueError as error:
        raise ValueError(str(error).replace("compression", "compression.method", 1)) from error
    if not isinstance(found, MethodConfig):
        raise ValueError(f"compression.method: must be one method with its options, got {budget.method}")
    return Sized(found, budget)
