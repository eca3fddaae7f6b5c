"""Bytes counted whole: codes, codebooks, hot rows and native rows, beside what the dense tables would take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchrec.optim.keyed import KeyedOptimizer


@dataclass(frozen=True)
class TableFootprint:
    """The bytes of one table, summed over its real tensors.

    Args:
        method: how it is stored.
        dense_bytes: what the user's own table would take.
        code_bytes: code table (and its one-byte flag).
        decoder_bytes: codebooks and hot rows.
        native_bytes: rows of native tables.
    """

    method: str
    dense_bytes: int
    code_bytes: int
    decoder_bytes: int
    native_bytes: int

    @property
    def total_bytes(self) -> int:
        """All stored bytes."""
        return self.code_bytes + self.decoder_bytes + self.native_bytes

    @property
    def ratio(self) -> float:
        """Dense bytes over all stored bytes, codes included; bigger is better."""
        return self.dense_bytes / self.total_bytes


@dataclass(frozen=True)
class Footprint:
    """The bytes of a collection by table.

    Example:
        >>> table = TableFootprint("pq", dense_bytes=256000, code_bytes=4000, decoder_bytes=6000, native_bytes=0)
        >>> small = TableFootprint("dense", dense_bytes=1000, code_bytes=0, decoder_bytes=0, native_bytes=1000)
        >>> footprint = Footprint({"item": table, "weekday": small})
        >>> footprint.total_bytes, round(footprint.ratio, 1), round(footprint.compressed_ratio, 1)
        (11000, 23.4, 25.6)
    """

    tables: dict[str, TableFootprint]

    @property
    def dense_bytes(self) -> int:
        """What all dense tables would take."""
        return sum(table.dense_bytes for table in self.tables.values())

    @property
    def total_bytes(self) -> int:
        """All stored bytes of all tables."""
        return sum(table.total_bytes for table in self.tables.values())

    @property
    def ratio(self) -> float:
        """Dense bytes over all stored bytes, over all tables."""
        return self.dense_bytes / self.total_bytes

    @property
    def compressed_ratio(self) -> float:
        """The same over the compressed tables alone; 1.0 where there are none."""
        tables = [table for table in self.tables.values() if table.method != "dense"]
        stored = sum(table.total_bytes for table in tables)
        return sum(table.dense_bytes for table in tables) / stored if stored else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with the totals."""
        return {
            "dense_bytes": self.dense_bytes,
            "total_bytes": self.total_bytes,
            "ratio": self.ratio,
            "compressed_ratio": self.compressed_ratio,
            "tables": {
                name: {**asdict(table), "total_bytes": table.total_bytes, "ratio": table.ratio}
                for name, table in self.tables.items()
            },
        }

    def __str__(self) -> str:
        lines = [f"{'table':<24}{'method':<10}{'dense bytes':>16}{'stored bytes':>16}{'ratio':>9}"]
        rows = [(name, t.method, t.dense_bytes, t.total_bytes, t.ratio) for name, t in self.tables.items()]
        rows.append(("all tables", "", self.dense_bytes, self.total_bytes, self.ratio))
        lines += [
            f"{name:<24}{method:<10}{dense:>16,}{stored:>16,}{ratio:>8.1f}x"
            for name, method, dense, stored, ratio in rows
        ]
        return "\n".join(lines)


def optimizer_bytes(optimizer: KeyedOptimizer | torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state tensors on this rank, counted apart from the tables.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(10))
        >>> weight.grad = torch.ones(10)
        >>> optimizer = torch.optim.Adam([weight])
        >>> optimizer.step()
        >>> optimizer_bytes(optimizer)  # two moments and the step count
        84
    """
    return sum(_state_bytes(state) for state in optimizer.state.values())


def _state_bytes(value: object) -> int:
    if hasattr(value, "local_shards"):  # a ShardedTensor, which is a Tensor too: this rank's part
        return sum(_state_bytes(shard.tensor) for shard in value.local_shards())  # type: ignore[attr-defined]
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_state_bytes(item) for item in value.values())
    return 0
