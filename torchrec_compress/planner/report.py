"""What a plan costs: bytes per table and per rank, beside what the dense tables would take."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torchrec.distributed.planner.types import Shard, ShardingOption, Storage, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_compress.methods import dense_bytes
from torchrec_compress.methods.base import MARK_BYTES
from torchrec_compress.modules.decoder import Decoder
from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.modules.parts import CompressedParts
from torchrec_compress.modules.tables import CodeTableCollection
from torchrec_compress.planner.accounting import DenseOptimizer, managed_bytes, shard_bytes
from torchrec_compress.planner.text import rank_lines, table_lines

Kind = Literal["codes", "native", "managed", "decoder"]
_KINDS: tuple[Kind, ...] = ("codes", "native", "managed", "decoder")


@dataclass(frozen=True)
class PartPlan:
    """One stored tensor of a table, as it is planned. Bytes other than `stored_bytes` are sums over all ranks.

    Args:
        kind: code table, native table (dense ones too), table with a manager, or replicated tensor of the decoder.
        path: of its module in the model, and its name there.
        sharding_type, compute_kernel: the planner's choice.
        ranks: that hold a shard.
        stored_bytes: of one copy, what a manager keeps included.
        weight_bytes: of all copies, the same.
        optimizer_bytes: state of the optimizer that trains it.
        gradient_bytes: which are DDP's buckets too.
        activation_bytes: ids, codes and embeddings of a step, and caches before the host's memory.
        training_bytes: of `stored_bytes`, those that no look-up of a trained model reads.
    """

    kind: Kind
    path: str
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    stored_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    training_bytes: int = 0


@dataclass(frozen=True)
class TablePlan:
    """One of the user's tables.

    Args:
        method: how it is stored.
        num_embeddings, embedding_dim: its size.
        dense_bytes: what the user's own table would take.
        parts: its stored tensors.
        decoded_bytes: of embeddings that no stored tensor stands for, over all ranks.
    """

    method: str
    num_embeddings: int
    embedding_dim: int
    dense_bytes: int
    parts: tuple[PartPlan, ...]
    decoded_bytes: int = 0

    def stored(self, kind: Kind) -> int:
        """Return the stored bytes of one kind, of one copy."""
        return sum(part.stored_bytes for part in self.parts if part.kind == kind)

    @property
    def stored_bytes(self) -> int:
        """All stored bytes, of one copy: as `footprint()` counts them."""
        return sum(part.stored_bytes for part in self.parts)

    @property
    def served_bytes(self) -> int:
        """Stored bytes that serving the trained table takes, of one copy."""
        return self.stored_bytes - sum(part.training_bytes for part in self.parts)

    @property
    def held_bytes(self) -> int:
        """All that lasts while the table is trained, over all ranks: stored bytes, optimizer state and gradients."""
        return sum(part.weight_bytes for part in self.parts) + self.optimizer_bytes + self.gradient_bytes

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes; bigger is better."""
        return self.dense_bytes / self.stored_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state, over all ranks."""
        return sum(part.optimizer_bytes for part in self.parts)

    @property
    def gradient_bytes(self) -> int:
        """Gradients, over all ranks."""
        return sum(part.gradient_bytes for part in self.parts)

    @property
    def activation_bytes(self) -> int:
        """Activations of a step, over all ranks."""
        return self.decoded_bytes + sum(part.activation_bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        kinds = {f"{kind}_bytes": self.stored(kind) for kind in _KINDS}
        names = ("stored_bytes", "served_bytes", "held_bytes", "ratio", "optimizer_bytes")
        names += ("gradient_bytes", "activation_bytes")
        parts = [{**asdict(part), "ranks": list(part.ranks)} for part in self.parts]
        return {**asdict(self), "parts": parts, **kinds, **{name: getattr(self, name) for name in names}}


@dataclass
class RankPlan:
    """The bytes of one rank.

    Args:
        code_bytes, native_bytes, managed_bytes, decoder_bytes: weights that it holds, by kind; what managers keep too.
        optimizer_bytes, gradient_bytes, activation_bytes: as for `PartPlan`.
        device_bytes: what the planner charges to the memory of the device, reservations apart.
        host_bytes: what it charges to the host's memory, for a device that has its own.
        capacity_bytes: of the device's memory, less reservations.
    """

    code_bytes: int = 0
    native_bytes: int = 0
    managed_bytes: int = 0
    decoder_bytes: int = 0
    optimizer_bytes: int = 0
    gradient_bytes: int = 0
    activation_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    capacity_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights on the rank."""
        return self.code_bytes + self.native_bytes + self.managed_bytes + self.decoder_bytes


@dataclass(frozen=True)
class PlanReport:
    """A plan in bytes, from the planner's sharding options.

    Args:
        tables: by name; "path.name" where a name stands in several collections.
        ranks: one entry per rank.
        compute_device: of the topology.
        batch_size: of a rank.
    """

    tables: dict[str, TablePlan]
    ranks: list[RankPlan] = field(repr=False)
    compute_device: str
    batch_size: int

    @classmethod
    def of(
        cls,
        module: nn.Module,
        options: Sequence[ShardingOption],
        topology: Topology,
        batch_size: int,
        *,
        dense_optimizer: DenseOptimizer = "adam",
        decoded: Mapping[str, int] | None = None,
        sharders: Iterable[ModuleSharder[Any]] = (),
    ) -> PlanReport:
        """Count a finished plan.

        Args:
            module: the model, before it is sharded.
            options: what the planner chose, ranks set: the argument of a planner's callback.
            topology: with what is left of each device's memory.
            batch_size: of a rank.
            dense_optimizer: that trains replicated parameters, as for the estimators.
            decoded: bytes of a rank by table, as `DecodeReservation.decoded`.
            sharders: of the planner, whose `fused_params` may name an optimizer.

        Raises:
            ValueError: the options were not estimated by `estimators()`.
        """
        return _Counter(module, options, topology, dense_optimizer, decoded or {}, sharders).report(batch_size)

    @property
    def dense_bytes(self) -> int:
        """What all dense tables would take."""
        return sum(table.dense_bytes for table in self.tables.values())

    @property
    def stored_bytes(self) -> int:
        """All stored bytes, of one copy."""
        return sum(table.stored_bytes for table in self.tables.values())

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes, over all tables."""
        return self.dense_bytes / self.stored_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        names = ("compute_device", "batch_size", "dense_bytes", "stored_bytes", "ratio")
        return {
            **{name: getattr(self, name) for name in names},
            "tables": {name: table.to_dict() for name, table in self.tables.items()},
            "ranks": [{**asdict(rank), "weight_bytes": rank.weight_bytes} for rank in self.ranks],
        }

    def __str__(self) -> str:
        return "\n".join([*table_lines(self.tables), "", *rank_lines(self.ranks)])

    def save(self, folder: str | Path) -> list[Path]:
        """Write plan.json, plan.md and, where matplotlib is installed, plan.png; return their paths.

        Args:
            folder: made where it is missing.

        Raises:
            ImportError: matplotlib is missing; the other files are written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("plan.json", "plan.md", "plan.png")]
        paths[0].write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        paths[1].write_text(f"# Plan\n\n```\n{self}\n```\n\n![bytes per rank and table](plan.png)\n")
        from torchrec_compress.planner.plots import draw

        draw(self, paths[2])
        return paths


class _Counter:
    """Sum the shards of a plan up by table and by rank."""

    def __init__(
        self,
        module: nn.Module,
        options: Sequence[ShardingOption],
        topology: Topology,
        dense_optimizer: DenseOptimizer,
        decoded: Mapping[str, int],
        sharders: Iterable[ModuleSharder[Any]],
    ) -> None:
        self._options, self._topology, self._optimizer = options, topology, dense_optimizer
        self._decoded = decoded
        self._on_host = topology.compute_device == "cpu"
        self._ranks = [
            RankPlan(capacity_bytes=device.storage.ddr if self._on_host else device.storage.hbm)
            for device in topology.devices
        ]
        self._fused = {sharder.module_type: getattr(sharder, "fused_params", None) for sharder in sharders}
        self._collections = {path: part for path, part in module.named_modules() if isinstance(part, CompressedParts)}
        self._native_names = {
            (path, physical): name
            for path, collection in self._collections.items()
            for name in collection.methods()
            for physical in collection._plan.native_names(name).values()
        }

    def report(self, batch_size: int) -> PlanReport:
        parts: dict[tuple[str, str], list[PartPlan]] = {}
        for option in self._options:
            parts.setdefault(self._table_of(option), []).append(self._part(option))
        for path, collection in self._collections.items():
            for name in collection.methods():
                parts.setdefault((path, name), []).extend(self._unplanned(path, name, parts.get((path, name), [])))
        names = Counter(name for _, name in parts)
        tables = {
            name if names[name] == 1 else f"{path}.{name}": self._table(path, name, parts[path, name])
            for path, name in sorted(parts, key=self._order)
        }
        for rank in self._ranks:
            rank.activation_bytes += sum(self._decoded.values())
        return PlanReport(tables, self._ranks, self._topology.compute_device, batch_size)

    def _table_of(self, option: ShardingOption) -> tuple[str, str]:
        """Return the path of the collection and the name of the user's table that an option belongs to."""
        name = option.name.partition(".")[0] if isinstance(option.module[1], Decoder) else option.name
        owners = [path for path in self._collections if not path or option.path.startswith(f"{path}.")]
        if not owners:
            return option.path, name
        path = max(owners, key=len)
        # a native table whose own sharder was not passed is planned by TorchRec's, by its own name
        return path, self._native_names.get((path, name), name)

    def _unplanned(self, path: str, name: str, parts: list[PartPlan]) -> list[PartPlan]:
        """Return what no sharder was passed for, and so every rank holds."""
        collection = self._collections[path]
        table = collection._plan.by_table[name][0].table
        rest = collection.methods()[name].stored_bytes(table) - sum(part.stored_bytes for part in parts)
        if not rest:
            return []
        for rank in self._ranks:
            rank.decoder_bytes += rest
        ranks = tuple(range(len(self._ranks)))
        return [PartPlan("decoder", f"{path}: {name}", "unplanned", "dense", ranks, rest, rest * len(ranks), 0, 0, 0)]

    def _order(self, table: tuple[str, str]) -> tuple[str, int]:
        """Return the place of a table: in the user's order where it is compressed."""
        path, name = table
        collection = self._collections.get(path)
        return path, list(collection.methods()).index(name) if collection else 0

    def _table(self, path: str, name: str, found: list[PartPlan]) -> TablePlan:
        parts = tuple(sorted(found, key=lambda part: (_KINDS.index(part.kind), part.path)))
        decoded = self._decoded.get(name, 0) * len(self._ranks)
        collection = self._collections.get(path)
        if collection is None:
            option = next(option for option in self._options if (option.path, option.name) == (path, name))
            rows, columns = option.tensor.shape
            return TablePlan("dense", rows, columns, parts[0].stored_bytes, parts)
        table = collection._plan.by_table[name][0].table
        method = collection.methods()[name].method
        return TablePlan(method, table.num_embeddings, table.embedding_dim, dense_bytes(table), parts, decoded)

    def _part(self, option: ShardingOption) -> PartPlan:
        kind: Kind = "native"
        if isinstance(option.module[1], CodeTableCollection):
            kind = "codes"
        elif isinstance(option.module[1], Decoder):
            kind = "decoder"
        elif isinstance(option.module[1], ManagedCollection):
            kind = "managed"
        totals = [0, 0, 0, 0]
        for shard in option.shards:
            found = self._shard(option, shard)
            totals = [total + value for total, value in zip(totals, found, strict=True)]
            self._charge(kind, shard, found)
        # the mark of a code table's integers, as in `footprint()`
        stored = option.tensor.numel() * option.tensor.element_size() + MARK_BYTES * (kind == "codes")
        stored += managed_bytes(option)
        ranks = tuple(sorted({int(shard.rank or 0) for shard in option.shards if shard.size[0]}))
        how, extra = (option.sharding_type, option.compute_kernel), self._training_bytes(option)
        return PartPlan(kind, option.fqn, *how, ranks, stored, *totals, training_bytes=extra)

    def _training_bytes(self, option: ShardingOption) -> int:
        path, name = self._table_of(option)
        collection = self._collections.get(path)
        managed = None if collection is None else collection._plan.parts[name].managed
        return 0 if managed is None else managed.training_bytes

    def _shard(self, option: ShardingOption, shard: Shard) -> tuple[int, int, int, int]:
        """Return weights, optimizer state, gradient and activations of a shard."""
        lasting = shard_bytes(option, shard, self._fused.get(type(option.module[1])), self._optimizer)
        storage = _storage(shard)
        activations = storage.hbm + storage.ddr + storage.ssd - lasting.total
        if activations < 0:
            raise ValueError(
                f"PlanReport: {option.fqn} must be charged at least {lasting.total:,} bytes on rank {shard.rank}, got "
                f"{lasting.total + activations:,}; plan with estimator=torchrec_compress.planner.estimators(...)"
            )
        return lasting.weights + lasting.managed, lasting.optimizer, lasting.gradient, activations

    def _charge(self, kind: Kind, shard: Shard, found: tuple[int, int, int, int]) -> None:
        rank, storage = self._ranks[int(shard.rank or 0)], _storage(shard)
        weights, optimizer, gradient, activations = found
        if kind == "codes":
            rank.code_bytes += weights
        elif kind == "decoder":
            rank.decoder_bytes += weights
        elif kind == "managed":
            rank.managed_bytes += weights
        else:
            rank.native_bytes += weights
        rank.optimizer_bytes += optimizer
        rank.gradient_bytes += gradient
        rank.activation_bytes += activations
        rank.device_bytes += storage.ddr if self._on_host else storage.hbm
        rank.host_bytes += 0 if self._on_host else storage.ddr


def _storage(shard: Shard) -> Storage:
    assert shard.storage is not None
    return shard.storage
