"""Native tables that several of the user's tables look up: what these agree in, how they start, whose the bytes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_compress.methods.storage import NativePart, Parts
from torchrec_compress.ops import stable_salt

_BLOCK_ROWS = 4096
_AGREE = ("num_embeddings", "embedding_dim", "data_type", "init_fn", "decay")


@dataclass(frozen=True)
class SeededInit:
    """Initialise rows from a seed and their numbers alone, so that no order of tables and no plan changes them.

    Args:
        seed: of the table.
        num_rows, width: of the whole table.
        init_fn: of a block of rows, in place; None: as TorchRec does for a table of this size.
    """

    seed: int
    num_rows: int
    width: int
    init_fn: Callable[[Tensor], Tensor | None] | None

    def __call__(self, weight: Tensor) -> None:
        """Fill a whole table; what has another size is a shard, which `fill` fills."""
        if tuple(weight.shape) == (self.num_rows, self.width):
            self.fill(weight, 0, 0)

    @torch.no_grad()
    def fill(self, weight: Tensor, first_row: int, first_column: int) -> None:
        """Fill rows and columns of the table, (L, C) from these on, in place."""
        last_row, last_column = first_row + weight.shape[0], first_column + weight.shape[1]
        for start in range(first_row // _BLOCK_ROWS * _BLOCK_ROWS, last_row, _BLOCK_ROWS):
            block = self._block(start)
            low, high = max(start, first_row), min(start + len(block), last_row)
            weight[low - first_row : high - first_row] = block[low - start : high - start, first_column:last_column].to(
                weight.dtype
            )

    def _block(self, start: int) -> Tensor:
        block = torch.empty(min(_BLOCK_ROWS, self.num_rows - start), self.width, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_salt(self.seed, str(start)))
            if self.init_fn is None:
                bound = self.num_rows**-0.5
                nn.init.uniform_(block, -bound, bound)
            else:
                self.init_fn(block)
        return block


def seeded_init(seed: int, part: NativePart) -> SeededInit:
    """Return how a shared part of a collection with this seed starts."""
    assert part.shared is not None
    return SeededInit(stable_salt(seed, part.shared), part.num_embeddings, part.embedding_dim, part.init_fn)


def check_shared(parts: Mapping[str, Parts], pooling: Mapping[str, Any]) -> None:
    """Raise ValueError where parts that share a table do not agree.

    Args:
        parts: by the user's table.
        pooling: of the user's tables; None where a collection does not pool.
    """
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for table, stored in parts.items():
        for part in stored.native:
            if part.shared is None:
                continue
            mine = {name: getattr(part, name) for name in _AGREE}
            mine["use"] = "bags" if part in stored.bags else "rows"
            mine["pooling"] = pooling[table] if part in stored.bags else None
            other, theirs = first.setdefault(part.shared, (table, mine))
            differ = [name for name in mine if mine[name] != theirs[name]]
            if differ:
                raise ValueError(
                    f"shared native table {part.shared!r}: tables {other!r} and {table!r} must agree in {differ}, got "
                    f"{[theirs[name] for name in differ]} and {[mine[name] for name in differ]}; let them share under "
                    "two names, or make them agree"
                )


def cut(total: int, weights: Iterable[int]) -> list[int]:
    """Return shares of a number of bytes by weight, whole numbers that sum up to it.

    Example:
        >>> cut(10, [1, 1, 1])
        [3, 3, 4]
    """
    ends = [0, *accumulate(weights)]
    return [total * last // ends[-1] - total * first // ends[-1] for first, last in pairwise(ends)]
