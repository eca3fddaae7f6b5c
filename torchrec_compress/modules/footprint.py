"""Bytes counted whole: codes, codebooks, native rows and sketches too, beside what the dense tables would take.

Of a state dict all is counted but what says how to read it: `decoder.format_version`, 8 bytes a collection, and
`decoder.layout`, 24 bytes a table, its fingerprints. They hang on no row, and no look-up reads them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_compress.methods import METHODS, dense_bytes
from torchrec_compress.modules.blueprint import Blueprint
from torchrec_compress.modules.shared import cut
from torchrec_compress.seams import shape_and_dtype


@dataclass(frozen=True)
class TableFootprint:
    """The bytes of one table, summed over its real tensors.

    Args:
        method: how it is stored.
        dense_bytes: what the user's own table would take.
        code_bytes: code table (and the four-byte mark of its integers).
        decoder_bytes: codebooks and hot rows.
        native_bytes: rows of native tables, and trained rows. Of what several tables share, here and in the decoder,
            the share by dense bytes.
        managed_bytes: what the manager of a table keeps, as a sketch.
        training_bytes: of all, those that serving a trained table does not take: of a manager what no look-up of it
            reads, of queries (DPQ) what their codes save.
    """

    method: str
    dense_bytes: int
    code_bytes: int
    decoder_bytes: int
    native_bytes: int
    managed_bytes: int = 0
    training_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All stored bytes."""
        return self.code_bytes + self.decoder_bytes + self.native_bytes + self.managed_bytes

    @property
    def served_bytes(self) -> int:
        """The bytes that serving a trained table takes."""
        return self.total_bytes - self.training_bytes

    @property
    def ratio(self) -> float:
        """Dense bytes over all stored bytes, codes included; bigger is better."""
        return self.dense_bytes / self.total_bytes


@dataclass(frozen=True)
class Footprint:
    """The bytes of a collection by table: of its state dict all but format and layout, `8 + 24 * tables` bytes.

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
    def served_bytes(self) -> int:
        """The bytes that serving the trained tables takes."""
        return sum(table.served_bytes for table in self.tables.values())

    @property
    def ratio(self) -> float:
        """Dense bytes over all stored bytes, over all tables."""
        return self.dense_bytes / self.total_bytes

    @property
    def compressed_ratio(self) -> float:
        """The same over the compressed tables alone; 1.0 where there are none."""
        tables = [table for table in self.tables.values() if METHODS[table.method].is_compressed]
        stored = sum(table.total_bytes for table in tables)
        return sum(table.dense_bytes for table in tables) / stored if stored else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with the totals."""
        return {
            "dense_bytes": self.dense_bytes,
            "total_bytes": self.total_bytes,
            "served_bytes": self.served_bytes,
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
        if (reason := why_no_smaller(self.to_dict())) is not None:
            lines.append(reason)
        return "\n".join(lines)


def why_no_smaller(footprint: Mapping[str, Any]) -> str | None:
    """Return why tables are not smaller than dense ones, or None where some are stored otherwise.

    Args:
        footprint: plain data of `Footprint.to_dict`; without tables, of a model that was never compressed.

    Example:
        >>> small = TableFootprint("dense", dense_bytes=1000, code_bytes=0, decoder_bytes=0, native_bytes=1000)
        >>> why_no_smaller(Footprint({"weekday": small}).to_dict())
        'all tables are dense: asked for, chosen for a budget, or they are too small for their method to save bytes'
    """
    tables = footprint.get("tables")
    if not tables:
        return "no table is compressed: no compression was asked for"
    if any(METHODS[table["method"]].is_compressed for table in tables.values()):
        return None
    return "all tables are dense: asked for, chosen for a budget, or they are too small for their method to save bytes"


def count(state: Mapping[str, Any], blueprint: Blueprint) -> Footprint:
    """Return the bytes of a collection from its state dict, whose names and whole shapes no sharding changes.

    Format version and layout, `8 + 24 * tables` bytes, are not among them.

    Args:
        state: of the collection; tensors, `ShardedTensor` or `DTensor`, on any device.
        blueprint: that it was built from.

    Raises:
        ValueError: the state dict lacks a part of a table.
    """
    owners: dict[str, dict[str, int]] = {}  # by native table, the user's tables that it is of, by weight
    for name in blueprint.methods:
        for physical in blueprint.native_names(name).values():
            owners[physical] = blueprint.shares.get(physical, {name: 1})
    sizes: Counter[tuple[str, str]] = Counter()
    missing = {("code", name) for name in blueprint.methods if blueprint.parts[name].codes is not None}
    missing |= {("native", physical) for physical in owners}
    missing |= {("dense", table.name) for table in blueprint.dense_tables()}
    missing |= {("managed", table.name) for table in blueprint.managed()}
    missing |= {("trained", table.name) for table in blueprint.trained()}
    for key, value in state.items():
        stored = stored_part(key)
        if stored is not None:
            missing.discard(stored)
            kind, name = stored
            mine = owners[name] if kind == "native" else blueprint.shares.get(name, {name: 1})
            shape, dtype = shape_and_dtype(value)
            for owner, share in zip(mine, cut(math.prod(shape) * dtype.itemsize, mine.values()), strict=True):
                sizes[kind, owner] += share
    if missing:
        raise ValueError(
            f"footprint: every part of a table must be in the state dict, got none for {sorted(missing)}; count the "
            "collection before its parts are replaced by modules that store them otherwise"
        )
    return Footprint(
        {
            table.name: TableFootprint(
                method=method.method,
                dense_bytes=dense_bytes(table),
                code_bytes=sizes["code", table.name],
                decoder_bytes=sizes["decoder", table.name],
                native_bytes=sum(sizes[kind, table.name] for kind in ("native", "dense", "trained")),
                managed_bytes=sizes["managed", table.name],
                training_bytes=method.stored_bytes(table) - method.served_bytes(table),
            )
            for table in blueprint.tables
            for method in (blueprint.methods[table.name],)
        }
    )


def stored_part(key: str) -> tuple[str, str] | None:
    """Return the kind of a tensor and the name of its stored table, by its own name; None where it is of no table.

    Args:
        key: in the state dict of a compressed collection.

    Example:
        >>> stored_part("decoder.banks.user.codebooks"), stored_part("decoder.layout")
        (('decoder', 'user'), None)
    """
    path = key.split(".")
    if path[0] == "managed" and path[1] == "managers":
        return "managed", path[2]
    if path[0] == "trained":
        return "trained", path[2]
    if path[0] in ("code_tables", "decoder") and "banks" in path:
        return path[0].removesuffix("_tables"), path[path.index("banks") + 1]
    if len(path) > 2 and path[-3] in ("embedding_bags", "embeddings"):
        return "dense" if path[0] == "dense" else "native", path[-2]
    return None


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
    if not isinstance(getattr(optimizer, "state", None), Mapping):
        raise ValueError(f"optimizer_bytes: must be given an optimizer, got {type(optimizer).__name__}")
    return sum(_state_bytes(state) for state in optimizer.state.values())


def _state_bytes(value: object) -> int:
    if hasattr(value, "to_local"):  # a DTensor: this rank's part
        return _state_bytes(value.to_local())  # type: ignore[attr-defined]
    if hasattr(value, "local_shards"):  # a ShardedTensor, or what TorchRec puts into a DTensor; Tensors too
        return sum(_state_bytes(getattr(shard, "tensor", shard)) for shard in value.local_shards())  # type: ignore[attr-defined]
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_state_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_state_bytes(item) for item in value)
    return 0
