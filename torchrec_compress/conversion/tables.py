"""The embedding tables of a checkpoint, by the keys of a state dict, and the modules that they would stand in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.conversion.config import TableEntry
from torchrec_compress.convert.models import Place, chosen, table_name
from torchrec_compress.methods import MethodConfig
from torchrec_compress.modules import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from torchrec_compress.schema import nearest

_META = torch.device("meta")
_DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}
DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}
_STOCK = re.compile(r"(?:(?P<path>.+)\.)?(?P<kind>embedding_bags|embeddings)\.(?P<name>[^.]+)\.weight$")
_LAST = re.compile(r"(^|\.)weight$")
_TOLD = 20
_MARK = "decoder.format_version"  # what every compressed collection has
_WRAPPED = "module."  # what DistributedDataParallel puts in front of all names


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        key: of its weight in a state dict, were it dense.
        name: of the table.
        num_embeddings, embedding_dim: its sizes.
        entry: what the config says of it.
        data_type: of its config in the result.
        stored: of the config that it was compressed with in the checkpoint.
    """

    key: str
    name: str
    num_embeddings: int
    embedding_dim: int
    entry: TableEntry
    data_type: DataType
    stored: DataType = DataType.FP32

    @property
    def dtype(self) -> torch.dtype:
        """The type of its rows where they are dense."""
        return _DTYPES[self.data_type]


@dataclass(frozen=True)
class Home:
    """A module of the model that holds tables.

    Args:
        path: in the state dict, "" of the model itself.
        kind: "embedding_bags", "embeddings", or "" of a plain module.
        tables: in their order.
    """

    path: str
    kind: str
    tables: tuple[Table, ...]

    @property
    def is_pooled(self) -> bool:
        """Whether bags are looked up."""
        return self.kind == "embedding_bags" if self.kind else bool(self.tables[0].entry.pooled)

    @property
    def prefix(self) -> str:
        """What stands before its keys."""
        return f"{self.path}." if self.path else ""

    def dense_key(self, table: Table) -> str:
        """Return the key of a table that a compressed collection keeps dense."""
        return f"{self.prefix}dense.{self.kind}.{table.name}.weight"

    def stored_as(self, types: Mapping[str, DataType]) -> Home:
        """Return the same, of tables that were compressed with configs of these types, which they keep unless asked."""
        tables = [
            replace(table, stored=found, data_type=table.data_type if table.entry.data_type else found)
            for table in self.tables
            for found in [types.get(table.name, DataType.FP32)]
        ]
        return replace(self, tables=tuple(tables))

    def configs(self, is_old: bool = False) -> list[Any]:
        """Return the configs of its tables; a state dict says nothing of features and pooling.

        Args:
            is_old: whether those that the checkpoint was made with.
        """
        kind: Any = EmbeddingBagConfig if self.is_pooled else EmbeddingConfig
        return [
            kind(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[table.name],
                data_type=table.stored if is_old else table.data_type,
            )
            for table in self.tables
        ]

    def dense(self) -> nn.Module:
        """Return the module with dense tables, on the meta device."""
        if self.kind:
            kind: Any = EmbeddingBagCollection if self.is_pooled else EmbeddingCollection
            return kind(self.configs(), device=_META)
        (table,) = self.tables
        plain: Any = nn.EmbeddingBag if self.is_pooled else nn.Embedding
        return plain(table.num_embeddings, table.embedding_dim, device=_META)

    def compressed(self, methods: Mapping[str, MethodConfig], seed: int, is_old: bool = False) -> nn.Module:
        """Return the module with compressed tables, on the meta device: as the checkpoint has it, or the result."""
        configs = self.configs(is_old)
        for config in configs:
            method = methods.get(config.name)
            if config.data_type == DataType.BF16 and (method is None or not method.is_compressed):
                config.data_type = DataType.FP32  # it is copied as it is, for which TorchRec has no type
        if self.kind:
            kind: Any = CompressedEmbeddingBagCollection if self.is_pooled else CompressedEmbeddingCollection
            return kind(configs, _META, compression=dict(methods), seed=seed, will_fit=True)
        (table,), dtype = self.tables, _DTYPES[configs[0].data_type]
        given = {"compression": methods[table.name], "name": table.name, "device": _META, "seed": seed, "dtype": dtype}
        sizes = (table.num_embeddings, table.embedding_dim)
        if self.is_pooled:
            mode, padding = table.entry.mode, table.entry.padding_idx
            return CompressedEmbeddingBag(*sizes, mode, padding, will_fit=True, **given)  # type: ignore[arg-type]
        return CompressedEmbedding(*sizes, table.entry.padding_idx, will_fit=True, **given)  # type: ignore[arg-type]

    def place(self) -> Place:
        """Return where it is, as `compress` names it."""
        path = _unwrapped(self.path)
        return Place(path, self.dense(), tuple(table.name for table in self.tables))


def collection_of(module: nn.Module) -> Any:
    """Return the compressed collection that a module is, or holds."""
    return module.collection if isinstance(module, CompressedEmbedding | CompressedEmbeddingBag) else module


def find_homes(checkpoint: Checkpoint, entries: Mapping[str, TableEntry], has_source: bool) -> tuple[list[Home], ...]:
    """Return the modules of dense tables of a checkpoint, and those of compressed ones.

    Args:
        checkpoint: holds them.
        entries: what the config says, by key or pattern.
        has_source: whether it says how compressed ones are stored.

    Raises:
        ValueError: an entry fits no table, two fit one, sizes are missing or wrong, or there is no table at all.
    """
    where = f"{checkpoint.path}"
    compressed = _compressed(checkpoint)
    tensors = {
        key: entry.shape
        for key, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2 and entry.dtype.is_floating_point and not _is_within(key, compressed)
    }
    said, exact = _entries_by_key(where, tensors, entries, compressed)
    dense: dict[str, Table] = {}
    for key in [key for key in exact if key in tensors] + [key for key in tensors if key not in exact]:
        entry = said.get(key)
        if entry is None and not _STOCK.match(key):
            continue
        rows, width = tensors[key]
        if entry is None and not rows * width and _is_alone(key, tensors):
            continue  # nobody asked for it
        if not rows or not width:
            raise ValueError(f"{where}: {key!r} must have rows and columns, got {rows} x {width}")
        dense[key] = _table(where, checkpoint, key, rows, width, entry or TableEntry())
    packed = {
        key: _table(where, checkpoint, key, entry.num_embeddings, entry.embedding_dim, entry)
        for key, entry in entries.items()
        if entry.num_embeddings is not None and entry.embedding_dim is not None
    }
    if compressed and not has_source and not dense:
        raise ValueError(f"{where}: must hold dense tables, got compressed ones{_how(compressed)}")
    return _homes(where, dense), _homes(where, packed)


def _is_alone(key: str, tensors: Mapping[str, Any]) -> bool:
    """Return whether a collection of TorchRec's has this table alone."""
    stock = _STOCK.match(key)
    assert stock is not None
    above = key.removesuffix(f"{stock['name']}.weight")
    return sum(each.startswith(above) for each in tensors) == 1


def _compressed(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what stands before the keys of every compressed collection."""
    return tuple(key.removesuffix(_MARK) for key in checkpoint.tensors if key.endswith(_MARK))


def _how(compressed: Sequence[str]) -> str:
    """Return what to do about tables that are compressed already, or nothing where there are none."""
    if not compressed:
        return ""
    return (
        f"; what is compressed, at {sorted(compressed)[:3]}, is expanded by the report of its conversion, as in --to "
        "OUT.report.json; else 'from' and 'tables' must say how it is stored and how large it is"
    )


def _is_within(key: str, prefixes: Sequence[str]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)


def _entries_by_key(
    where: str, tensors: Mapping[str, Any], entries: Mapping[str, TableEntry], compressed: Sequence[str]
) -> tuple[dict[str, TableEntry], list[str]]:
    """Return what is said of each weight, and the keys that are named exactly, in their order."""
    by_pattern: dict[str, list[str]] = {}
    for pattern, entry in entries.items():
        if entry.num_embeddings is not None:
            if pattern in tensors:
                raise ValueError(
                    f"{where}: {pattern!r} must be compressed where num_embeddings is given, got a dense weight of "
                    f"{tensors[pattern]}; leave the sizes out"
                )
            continue
        weights = [key for key in tensors if _LAST.search(key)]  # state of an optimizer is none
        fitting = [pattern] if pattern in tensors else [key for key in weights if fnmatchcase(key, pattern)]
        if not fitting:
            told = f"{sorted(weights)[:_TOLD]}" + (f" and {len(weights) - _TOLD} more" if len(weights) > _TOLD else "")
            raise ValueError(
                f"{where}: tables.{pattern} must fit the weight of a table, got none{nearest(pattern, weights)}; they "
                f"are {told}{_how(compressed)}"
            )
        for key in fitting:
            by_pattern.setdefault(key, []).append(pattern)
    for key, patterns in by_pattern.items():
        if len(patterns) > 1 and key not in patterns:
            raise ValueError(f"{where}: {key!r} must fit one entry of tables, got {patterns}; name it by itself")
    said = {key: entries[key if key in patterns else patterns[0]] for key, patterns in by_pattern.items()}
    return said, [key for key in entries if key in said]


def _table(where: str, checkpoint: Checkpoint, key: str, rows: int, width: int, entry: TableEntry) -> Table:
    found = checkpoint.tensors.get(key)  # of a dense one
    as_it_is = DataType.FP32 if found is None else DATA_TYPES.get(found.dtype, DataType.FP32)
    data_type = DataType[entry.data_type] if entry.data_type else as_it_is
    stock = None if entry.plain else _STOCK.match(key)
    if stock is not None:
        is_pooled = stock["kind"] == "embedding_bags"
        if entry.pooled not in (None, is_pooled) or entry.padding_idx is not None or entry.name is not None:
            raise ValueError(
                f"{where}: tables.{key} must not set pooled to {entry.pooled}, padding_idx or name of a table of "
                f"TorchRec's {stock['kind']}; set plain: true where it is a module of its own"
            )
        if hasattr(nn.ModuleDict, stock["name"]):
            raise ValueError(
                f"{where}: {key!r}: TorchRec must be able to hold a table of the name, got {stock['name']!r}, which is "
                "an attribute of its modules; set plain: true where it is a module of its own"
            )
        if entry.mode != TableEntry().mode:
            raise ValueError(f"{where}: tables.{key} must not set mode, which its config in the model says")
        return Table(key, stock["name"], rows, width, entry, data_type)
    if not key.endswith(".weight") and key != "weight":
        raise ValueError(
            f"{where}: tables.{key} must name the weight of a module, as 'item_emb.weight', got another name"
        )
    if entry.mode != TableEntry().mode and not entry.pooled:
        raise ValueError(f"{where}: tables.{key}: mode must come with pooled: true, got {entry.mode!r} alone")
    place = checkpoint.places.get(key, (key,))
    own = str(place[-1]) if place else key
    path = _unwrapped(own.removesuffix("weight").removesuffix("."))
    return Table(key, entry.name or table_name(path), rows, width, entry, data_type)


def _unwrapped(path: str) -> str:
    """Return a path without what DistributedDataParallel puts in front."""
    return path.removeprefix(_WRAPPED)


def _homes(where: str, tables: Mapping[str, Table]) -> list[Home]:
    found: dict[tuple[str, str], list[Table]] = {}
    for key, table in tables.items():
        stock = None if table.entry.plain else _STOCK.match(key)
        place = (stock["path"] or "", stock["kind"]) if stock else (key.removesuffix("weight").removesuffix("."), "")
        found.setdefault(place, []).append(table)
    paths = [path for path, _ in found]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            f"{where}: {twice[0] or 'the model'!r} must hold tables of one kind, got 'embedding_bags' and 'embeddings'"
        )
    return [Home(path, kind, tuple(mine)) for (path, kind), mine in found.items()]


def choose(
    checkpoint: Checkpoint, homes: Sequence[Home], compression: Any, has_source: bool
) -> list[tuple[Home, dict[str, MethodConfig]]]:
    """Return the homes of which a table fits a key, with the method of each such table; others stay as they are.

    Raises:
        ValueError: as `compress` of a model: a key fits no table.
    """
    if not homes:
        raise ValueError(
            "tables: must name the weights of tables, got none, and no key of the checkpoint is one of TorchRec's "
            "collections; write tables: {user.weight: {pooled: true}} for a module of PyTorch's own"
        )
    places = [home.place() for home in homes]
    by_place = {id(place): home for place, home in zip(places, homes, strict=True)}
    try:
        return [(by_place[id(place)], methods) for place, methods in chosen(places, compression)]
    except ValueError as error:
        mine = {table.key for home in homes for table in home.tables}
        others = [
            key for key, each in checkpoint.tensors.items()
            if key not in mine and len(each.shape) == 2 and _LAST.search(key)
        ]  # fmt: skip
        is_key = "every key must fit" in str(error) and others
        plain = f"; modules of PyTorch's own must be named in 'tables', as {others[:3]}" if is_key else ""
        raise ValueError(f"{error}{plain}{'' if has_source else _how(_compressed(checkpoint))}") from None
