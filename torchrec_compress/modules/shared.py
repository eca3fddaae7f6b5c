"""Native tables that several of the user's tables look up: what these agree in, how they start, whose the bytes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

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

    Example:
        >>> start = SeededInit(seed=0, num_rows=6, width=2, init_fn=None)
        >>> whole, last_rows = torch.empty(6, 2), torch.empty(2, 2)
        >>> start(whole)
        >>> start.fill(last_rows, first_row=4, first_column=0)
        >>> torch.equal(last_rows, whole[4:])
        True
    """

    seed: int
    num_rows: int
    width: int
    init_fn: Callable[[Tensor], Tensor | None] | None

    def __call__(self, weight: Tensor) -> None:
        """Fill a whole table, or draw a shard, whose rows TorchRec does not tell: our sharders `fill` it afterwards."""
        if tuple(weight.shape) == (self.num_rows, self.width):
            self.fill(weight, 0, 0)
        else:
            self._draw(weight)

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
            torch.default_generator.manual_seed(stable_salt(self.seed, str(start)))  # no GPU's generator is touched
            self._draw(block)
        return block

    def _draw(self, rows: Tensor) -> None:
        if self.init_fn is None:
            bound = self.num_rows**-0.5
            nn.init.uniform_(rows, -bound, bound)
        else:
            self.init_fn(rows)


def seeded_init(seed: int, part: NativePart) -> SeededInit:
    """Return how a shared part of a collection with this seed starts."""
    assert part.shared is not None
    return SeededInit(stable_salt(seed, part.shared), part.num_embeddings, part.embedding_dim, part.init_fn)


def check_shared(tables: Sequence[BaseEmbeddingConfig], parts: Mapping[str, Parts]) -> None:
    """Check parts that share a table.

    Args:
        tables: the user's configs.
        parts: by the user's table.

    Raises:
        ValueError: they do not agree, or a user's table says how it starts, which the others would have to as well.
    """
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for table in tables:
        stored = parts[table.name]
        for part in stored.native:
            if part.shared is None:
                continue
            where = f"shared native table {part.shared!r}"
            if part.init_fn is None and _says_how_it_starts(table):
                raise ValueError(
                    f"{where}: table {table.name!r} must not say how it starts, got init_fn {table.init_fn}; leave "
                    "init_fn, weight_init_min and weight_init_max out, since others share its rows"
                )
            mine = {name: getattr(part, name) for name in _AGREE}
            mine["use"] = "bags" if part in stored.bags else "rows"
            mine["pooling"] = getattr(table, "pooling", None) if part in stored.bags else None
            other, theirs = first.setdefault(part.shared, (table.name, mine))
            differ = [name for name in mine if mine[name] != theirs[name]]
            if differ:
                raise ValueError(
                    f"{where}: tables {other!r} and {table.name!r} must agree in {differ}, got "
                    f"{[theirs[name] for name in differ]} and {[mine[name] for name in differ]}; let them share under "
                    "two names, or make them agree"
                )


def _says_how_it_starts(table: BaseEmbeddingConfig) -> bool:
    """Return whether a user's init differs from the one that TorchRec writes into every config."""
    plain = replace(table, init_fn=None, weight_init_min=None, weight_init_max=None)
    mine, default = (
        (init.func, init.args, init.keywords) if isinstance(init, partial) else init
        for init in (table.init_fn, plain.init_fn)
    )
    return mine is not None and mine != default


def cut(total: int, weights: Iterable[int]) -> list[int]:
    """Return shares of a number of bytes by weight, whole numbers that sum up to it.

    Example:
        >>> cut(10, [1, 1, 1])
        [3, 3, 4]
    """
    ends = [0, *accumulate(weights)]
    return [total * last // ends[-1] - total * first // ends[-1] for first, last in pairwise(ends)]
