"""From the user's tables and their methods to the parts that store them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any, Generic, TypeVar

from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from torchrec_compress.compression import Compression, resolve
from torchrec_compress.methods import MethodConfig, NativePart, Parts
from torchrec_compress.methods.base import dense_bytes, init_like, shared_bytes
from torchrec_compress.modules.code_bank import CodeTableConfig
from torchrec_compress.modules.managed import ManagedTable
from torchrec_compress.modules.remapped import RemappedFeature
from torchrec_compress.modules.shared import check_shared, check_shared_decoders, cut, seeded_init
from torchrec_compress.modules.trained_rows import TrainedTable
from torchrec_compress.names import check_feature_names, check_table_names
from torchrec_compress.ops import stable_salt

MANAGED = "managed"  # the group of all rows with managers; no group of native tables is called so

TableConfig = TypeVar("TableConfig", EmbeddingBagConfig, EmbeddingConfig)


@dataclass(frozen=True)
class Lookup:
    """One (table, feature) pair, in the order of the output.

    Args:
        table: the user's config.
        feature: name of the feature.
        output: its key in the output, "feature" or, where several tables share the feature, "feature@table".
        key: a name that is unique over the collection, for codes and rewritten features.
    """

    table: BaseEmbeddingConfig
    feature: str
    output: str
    key: str


@dataclass(frozen=True)
class Blueprint(Generic[TableConfig]):
    """Everything that a compressed collection is built from.

    Args:
        given: the user's configs, never written to; where one names no features, a copy that names them.
        tables: copies of them.
        methods: the method by table name.
        parts: what each table is stored as, by table name.
        lookups: every output of the collection, in order.
        seed: of start codes and hashes, and of what native tables that are shared start as.

    Attributes:
        by_table: the look-ups of every table.
        shares: of every shared native table and decoder, its bytes cut among its tables, by what these take dense.
        banks: the name of every table's decoder: its own, or that of a shared one.
    """

    given: list[TableConfig]
    tables: list[TableConfig]
    methods: dict[str, MethodConfig]
    parts: dict[str, Parts]
    lookups: list[Lookup]
    seed: int
    by_table: dict[str, list[Lookup]] = field(init=False)
    shares: dict[str, dict[str, int]] = field(init=False)
    banks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        by_table: dict[str, list[Lookup]] = {table.name: [] for table in self.tables}
        for lookup in self.lookups:
            by_table[lookup.table.name].append(lookup)
        object.__setattr__(self, "by_table", by_table)
        owners: dict[str, dict[str, int]] = {}
        totals: dict[str, int] = {}
        banks = {table.name: table.name for table in self.tables}
        for table in self.tables:
            mine = shared_bytes(self.methods[table.name], table)
            totals |= mine
            for name in mine:
                owners.setdefault(name, {})[table.name] = dense_bytes(table)
            decoder = self.methods[table.name].shared_decoder(table)
            if decoder is not None:
                banks[table.name] = decoder.name
        object.__setattr__(self, "banks", banks)
        shares = {name: dict(zip(mine, cut(totals[name], mine.values()), strict=True)) for name, mine in owners.items()}
        object.__setattr__(self, "shares", shares)

    @classmethod
    def of(cls, tables: Sequence[TableConfig], compression: Compression, seed: int) -> Blueprint[TableConfig]:
        """Check the user's configs and lay out their parts.

        Raises:
            ValueError: the seed is no int in [0, 2**63), a name is missing, repeated or unfit for a module, or a method
                cannot store its table.
        """
        _check_names(tables)
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
            raise ValueError(f"compressed collection: seed must be an int in [0, 2**63), got {seed!r}")
        given = [table if table.feature_names else _with_features(table) for table in tables]
        copies = [_with_features(table) for table in given]
        methods = resolve(copies, compression)
        parts = {table.name: methods[table.name].parts(table, seed) for table in copies}
        lookups = [
            Lookup(table, feature, output, f"{table.name}:{feature}")
            for table, outputs in zip(copies, _output_names(copies), strict=True)
            for feature, output in zip(table.feature_names, outputs, strict=True)
        ]
        check_shared(copies, parts)
        check_shared_decoders(copies, methods, parts)
        _check_made_names(copies, parts, [lookup.key for lookup in lookups])
        return cls(given, copies, methods, parts, lookups, int(seed))

    def dense_tables(self) -> list[TableConfig]:
        """Return the tables that stay as they are."""
        return [table for table in self.tables if self.parts[table.name].dense]

    def code_tables(self, will_fit: bool = False) -> list[CodeTableConfig]:
        """Return the code tables; their outputs are named by look-up key.

        Args:
            will_fit: whether tables whose method needs a fit stay empty until it comes.
        """
        configs = []
        for table in self.tables:
            part = self.parts[table.name].codes
            if part is not None:
                if will_fit and self.methods[table.name].needs != "nothing":
                    part = replace(part, start=None)
                names = tuple(table.feature_names)
                keys = tuple(lookup.key for lookup in self.by_table[table.name])
                configs.append(CodeTableConfig(table.name, table.num_embeddings, part, names, keys))
        return configs

    def bags(self) -> tuple[list[EmbeddingBagConfig], list[RemappedFeature]]:
        """Return the physical tables that are pooled natively behind rewritten ids, and their look-ups."""
        tables: dict[str, EmbeddingBagConfig] = {}
        remaps: list[RemappedFeature] = []
        for table in self.tables:
            if isinstance(table, EmbeddingBagConfig):
                for part in self.parts[table.name].bags:
                    # means of a table without a row for some ids are sums, which `whole_means` divides by all ids
                    pooling = PoolingType.SUM if part.remap.is_partial else table.pooling
                    _merge(tables, EmbeddingBagConfig(**self._physical(table, part), pooling=pooling))
                    remaps += self._remapped(table, part)
        return [*tables.values()], remaps

    def whole_means(self) -> dict[str, str]:
        """Return the feature of the look-ups whose bags are sums yet and are to be means, by key."""
        means = [lookup for lookup in self.lookups if getattr(lookup.table, "pooling", None) == PoolingType.MEAN]
        return {
            lookup.key: lookup.feature
            for lookup in means
            if any(part.remap.is_partial for part in self.parts[lookup.table.name].bags)
        }

    def rows(self) -> dict[str, tuple[list[EmbeddingConfig], list[RemappedFeature]]]:
        """Return the physical tables whose rows come back unpooled, and their look-ups, one group per width and part.

        Tables of one group share an `EmbeddingCollection`, which wants one width and, here, one rewrite per look-up.
        """
        groups: dict[str, tuple[dict[str, EmbeddingConfig], list[RemappedFeature]]] = {}
        for table in self.tables:
            for part in self._unpooled(table.name):
                tables, remaps = groups.setdefault(row_group(part), ({}, []))
                _merge(tables, EmbeddingConfig(**self._physical(table, part)))
                remaps += self._remapped(table, part)
        return {group: ([*tables.values()], remaps) for group, (tables, remaps) in groups.items()}

    def managed(self) -> list[ManagedTable]:
        """Return the tables with managers."""
        found = []
        for table in self.tables:
            part = self.parts[table.name].managed
            if part is not None:
                native = EmbeddingConfig(**{**self._physical(table, part.rows), "feature_names": [table.name]})
                keys = tuple(lookup.key for lookup in self.by_table[table.name])
                names = tuple(table.feature_names)
                found.append(ManagedTable(table.name, table.num_embeddings, names, keys, part, native))
        return found

    def trained(self) -> list[TrainedTable]:
        """Return the tables of trained rows."""
        found = []
        for table in self.tables:
            part = self.parts[table.name].trained
            if part is not None:
                keys = tuple(lookup.key for lookup in self.by_table[table.name])
                is_mean = isinstance(table, EmbeddingBagConfig) and table.pooling == PoolingType.MEAN
                dither = stable_salt(self.seed, f"{table.name}:dither")
                names = tuple(table.feature_names)
                found.append(TrainedTable(table.name, table.num_embeddings, names, keys, part, dither, is_mean))
        return found

    def found_rows(self, lookup: Lookup) -> list[tuple[str, str]]:
        """Return where a look-up's rows of each unpooled part are, in the order that its decoder takes them.

        By group, and by key in the group.
        """
        if self.parts[lookup.table.name].managed is not None:
            return [(MANAGED, lookup.key)]
        return [(row_group(part), native_key(lookup, part)) for part in self._unpooled(lookup.table.name)]

    def bag_keys(self, lookup: Lookup) -> list[str]:
        """Return the key of a look-up's bag of each part that is pooled before it is decoded."""
        if self.parts[lookup.table.name].trained is not None:
            return [lookup.key]
        return [native_key(lookup, part) for part in self.parts[lookup.table.name].bags]

    def native_names(self, table: str) -> dict[str, str]:
        """Return the physical table name of every native part of a table, by part name."""
        return {part.name: physical_name(table, part) for part in self.parts[table].native}

    def undecayed(self) -> set[str]:
        """Return the physical names of native tables that l2 must not pull towards zero."""
        return {
            physical_name(table, part) for table, parts in self.parts.items() for part in parts.native if not part.decay
        }

    def _unpooled(self, table: str) -> tuple[NativePart, ...]:
        """Return a table's unpooled parts; in an unpooled collection its bags are among them."""
        parts = self.parts[table]
        bag_tables = any(isinstance(config, EmbeddingBagConfig) for config in self.tables)
        return parts.rows if bag_tables else parts.bags + parts.rows

    def common(self, table: str) -> set[str]:
        """Return the names of what a table shares with others: native tables, a decoder."""
        return {name for name, mine in self.shares.items() if table in mine and len(mine) > 1}

    def stored_bytes(self, table: str) -> int:
        """Return the bytes that a table is stored in; of what is shared its share, so that all sum up."""
        method, config = self.methods[table], self.by_table[table][0].table
        shared = shared_bytes(method, config)
        return method.stored_bytes(config) + sum(self.shares[name][table] - whole for name, whole in shared.items())

    def _physical(self, table: BaseEmbeddingConfig, part: NativePart) -> dict[str, Any]:
        return {
            "name": physical_name(table.name, part),
            "num_embeddings": part.num_embeddings,
            "embedding_dim": part.embedding_dim,
            "feature_names": [native_key(lookup, part) for lookup in self.by_table[table.name]],
            "data_type": part.data_type,
            "init_fn": seeded_init(self.seed, part) if part.shared else part.init_fn or partial(init_like, table),
        }

    def _remapped(self, table: BaseEmbeddingConfig, part: NativePart) -> list[RemappedFeature]:
        native, planned = physical_name(table.name, part), self._planned_name(table, part)
        return [
            RemappedFeature(
                lookup.feature,
                native_key(lookup, part),
                table.num_embeddings,
                part.remap,
                table.name,
                native,
                planned,
            )
            for lookup in self.by_table[table.name]
        ]

    def _planned_name(self, table: BaseEmbeddingConfig, part: NativePart) -> str:
        """Return the table's name, and the part's where a module holds several; or the name of what is shared."""
        if part.shared is not None:
            return part.shared
        is_one_of_several = len(self.parts[table.name].bags) > 1 and isinstance(table, EmbeddingBagConfig)
        return f"{table.name}.{part.name}" if is_one_of_several else table.name


def _with_features(table: TableConfig) -> TableConfig:
    """Return a copy that is equal, its init_fn too, but for names of features where there are none."""
    table = copy.copy(table)
    table.feature_names = list(table.feature_names) or [table.name]
    return table


def physical_name(table: str, part: NativePart) -> str:
    """Return the name of the native table that stores a part."""
    return part.shared or f"{table}__{part.name}"


def native_key(lookup: Lookup, part: NativePart) -> str:
    """Return the name of a look-up of a native table, unique over the collection."""
    return f"{lookup.key}:{part.name}"


def row_group(part: NativePart) -> str:
    """Return the name of the collection that holds an unpooled part."""
    return f"{'shared' if part.shared else part.name}_{part.embedding_dim}"


def _merge(tables: dict[str, TableConfig], table: TableConfig) -> None:
    """Add a physical table, or its look-ups to the shared one of its name."""
    known = tables.setdefault(table.name, table)
    if known is not table:
        known.feature_names += table.feature_names


def _output_names(tables: Any) -> list[list[str]]:
    return get_embedding_names_by_table(tables)


def _check_names(tables: Sequence[BaseEmbeddingConfig]) -> None:
    if not tables:
        raise ValueError("compressed collection: tables must not be empty, got none")
    check_table_names([table.name for table in tables], "compressed collection: table")
    for table in tables:
        if table.num_embeddings < 1 or table.embedding_dim < 1:
            raise ValueError(
                f"compressed collection: table {table.name!r} must have rows and columns, got {table.num_embeddings} x "
                f"{table.embedding_dim}; leave it out"
            )
        if table.num_embeddings * table.embedding_dim >= 2**63:
            raise ValueError(
                f"compressed collection: table {table.name!r} must have fewer than 2**63 numbers, got "
                f"{table.num_embeddings} x {table.embedding_dim}; hash ids to fewer"
            )
        check_feature_names(table.feature_names, f"compressed collection: table {table.name!r}: feature")


def _check_made_names(tables: Sequence[BaseEmbeddingConfig], parts: Mapping[str, Parts], keys: Sequence[str]) -> None:
    """Raise ValueError where a name that is made of the user's names is another one of them."""
    names = {table.name for table in tables}
    shared = {name for stored in parts.values() for name in stored.shared}
    check_table_names(sorted(shared), "compressed collection: shared native table")
    own = {physical_name(table, part) for table, stored in parts.items() for part in stored.native if not part.shared}
    if shared & own:
        raise ValueError(
            f"compressed collection: shared native tables must not be called as others are, got {sorted(shared & own)}"
        )
    for table, stored in parts.items():
        made = {physical_name(table, part) for part in stored.native}
        if made & names:
            raise ValueError(
                f"compressed collection: table {table!r} is stored as {sorted(made)}, which must not be names of other "
                f"tables, got {sorted(made & names)}; choose another name"
            )
    twice = sorted(key for key, count in Counter(keys).items() if count > 1)
    if twice:
        raise ValueError(
            f"compressed collection: a table must look a feature up once, and 'table:feature' must be one pair, got "
            f"{twice} twice"
        )
