"""Rows that start from a seed, the same under every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_compress.ops import stable_salt

_BLOCK_ROWS = 4096


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
        block = torch.empty(min(_BLOCK_ROWS, self.num_rows - start), self.width, dtype=torch.float32, device="cpu")
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
