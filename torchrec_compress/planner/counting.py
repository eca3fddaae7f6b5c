"""The bytes of a plan, counted from the planner's sharding options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import Shard, ShardingOption, Storage, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_compress.methods import dense_bytes
from torchrec_compress.methods.base import MARK_BYTES
from torchrec_compress.modules.code_tables import CodeTableCollection
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.modules.decoder import Decoder
from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.modules.shared import cut
from torchrec_compress.planner.accounting import DenseOptimizer, managed_bytes, shard_bytes
from torchrec_compress.planner.records import KINDS, Kind, PartPlan, RankPlan, TablePlan


class Counting:
    """Sum the shards of a plan up by table and by rank; the arguments are those of `PlanReport.of`."""

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
            for physical in collection.blueprint.native_names(name).values()
            if physical not in collection.blueprint.shares
        }

    def count(self) -> tuple[dict[str, TablePlan], list[RankPlan]]:
        """Return the tables by name and the ranks.

        Raises:
            ValueError: the options were not estimated by `estimators()`.
        """
        parts: dict[tuple[str, str], list[PartPlan]] = {}
        for option in self._options:
            path, name = self._table_of(option)
            shares = self._shares(path, name)
            for table, part in zip(shares, _cut(self._part(option), [*shares.values()]), strict=True):
                parts.setdefault((path, table), []).append(part)
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
        return tables, self._ranks

    def _table_of(self, option: ShardingOption) -> tuple[str, str]:
        """Return the path of the collection and the name of the user's table that an option belongs to."""
        owners = [path for path in self._collections if not path or option.path.startswith(f"{path}.")]
        if not owners:
            return option.path, option.name
        path, name = max(owners, key=len), option.name.partition(".")[0]
        # a native table whose own sharder was not passed is planned by TorchRec's, by its own name
        return path, self._native_names.get((path, name), name)

    def _shares(self, path: str, name: str) -> dict[str, int]:
        """Return the user's tables that a stored tensor is of, by weight: several where they share it."""
        collection = self._collections.get(path)
        return {name: 1} if collection is None else collection.blueprint.shares.get(name, {name: 1})

    def _unplanned(self, path: str, name: str, parts: list[PartPlan]) -> list[PartPlan]:
        """Return what no sharder was passed for, and so every rank holds."""
        collection = self._collections[path]
        rest = collection.blueprint.stored_bytes(name) - sum(part.stored_bytes for part in parts)
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
        parts = tuple(sorted(found, key=lambda part: (KINDS.index(part.kind), part.path)))
        decoded = self._decoded.get(name, 0) * len(self._ranks)
        collection = self._collections.get(path)
        if collection is None:
            option = next(option for option in self._options if (option.path, option.name) == (path, name))
            rows, columns = option.tensor.shape
            return TablePlan("dense", rows, columns, parts[0].stored_bytes, parts)
        table = collection.blueprint.by_table[name][0].table
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
        method = None if collection is None else collection.methods().get(name)  # none: of several tables
        if collection is None or method is None or isinstance(option.module[1], Decoder):
            return 0
        table = collection.blueprint.by_table[name][0].table
        return method.stored_bytes(table) - method.served_bytes(table)

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


def _cut(part: PartPlan, weights: list[int]) -> list[PartPlan]:
    """Return the share of a stored tensor that each of several tables is counted with."""
    names = ("stored_bytes", "weight_bytes", "optimizer_bytes", "gradient_bytes", "activation_bytes", "training_bytes")
    shares = [cut(getattr(part, name), weights) for name in names]
    return [replace(part, **dict(zip(names, mine, strict=True))) for mine in zip(*shares, strict=True)]


def _storage(shard: Shard) -> Storage:
    assert shard.storage is not None
    return shard.storage
