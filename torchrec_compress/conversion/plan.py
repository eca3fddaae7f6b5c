"""What becomes of every tensor of a checkpoint: where tables come from, where they go, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import DataType

from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.conversion.config import ConversionConfig
from torchrec_compress.conversion.entries import span_of
from torchrec_compress.conversion.tables import DATA_TYPES, Home, Table, choose, collection_of, find_homes
from torchrec_compress.methods import MethodConfig
from torchrec_compress.schema import nearest

_WEIGHT = ("native", "")  # of a table that is stored as it is
_MARK = ("codes", "is_set")


@dataclass(frozen=True)
class Change:
    """A module of the model whose tables are stored otherwise afterwards.

    Args:
        home: where it is.
        old: the compressed module that the checkpoint is of, on the meta device; None: a dense one.
        new: the one that the result is of; None: a dense one.
        old_seed, new_seed: of these.
    """

    home: Home
    old: nn.Module | None
    new: nn.Module | None
    old_seed: int
    new_seed: int

    def old_keys(self) -> list[str]:
        """Return what the checkpoint has of it."""
        return _keys_of(self.home, self.old)

    def new_keys(self) -> list[str]:
        """Return what the result has of it."""
        return _keys_of(self.home, self.new)

    def keys_of(self, table: Table, is_new: bool) -> dict[tuple[str, str], str]:
        """Return the keys of one table, by field and name of its state."""
        module = self.new if is_new else self.old
        if module is None:
            return {_WEIGHT: table.key}
        names, prefix = collection_of(module).state_names(table.name), prefix_of(self.home, module)
        found = {part: prefix + key for part, key in names.items()}
        if ("codes", "") in found:
            found[_MARK] = found["codes", ""].removesuffix("codes") + "is_set"
        return found

    def method(self, table: Table, is_new: bool) -> MethodConfig | None:
        """Return how one table is stored, None: as the user's own."""
        module = self.new if is_new else self.old
        found = None if module is None else collection_of(module).methods()[table.name]
        return None if found is None or not found.is_compressed else found

    def stays(self, table: Table) -> bool:
        """Return whether one table is stored as before, perhaps by another name."""
        old, new = self.method(table, False), self.method(table, True)
        if old is None or new is None:
            return old is new
        same_keys = self.keys_of(table, False).keys() == self.keys_of(table, True).keys()
        same_types = self.native_types(table, False) == self.native_types(table, True)
        return old == new and self.old_seed == self.new_seed and same_keys and same_types

    def native_types(self, table: Table, is_new: bool) -> list[DataType]:
        """Return the types of a compressed table's rows that lie in tables of TorchRec's, part by part."""
        module = self.new if is_new else self.old
        parts = None if module is None else collection_of(module).blueprint.parts[table.name]
        return [] if parts is None else [part.data_type for part in parts.native]


def prefix_of(home: Home, module: nn.Module) -> str:
    """Return what stands before the keys of the collection that a module is, or holds."""
    return home.prefix + ("collection." if collection_of(module) is not module else "")


def _keys_of(home: Home, module: nn.Module | None) -> list[str]:
    if module is None:
        return [table.key for table in home.tables]
    return [home.prefix + key for key in module.state_dict()]


def find_changes(checkpoint: Checkpoint, config: ConversionConfig) -> tuple[list[Change], list[Home]]:
    """Return what is to change, all of it looked over, and all modules that hold tables.

    Raises:
        ValueError: keys fit no table, a method does not fit one, the checkpoint is not what `from` says, or a table is
            tied to another tensor.
    """
    dense, packed = find_homes(checkpoint, config.tables, config.source is not None)
    stored: dict[str, dict[str, MethodConfig]] = {}
    has_source = config.source is not None
    if config.source is not None:
        if not packed:
            raise ValueError(
                f"{checkpoint.path}: 'from' must come with the sizes of its tables, got none; set num_embeddings and "
                "embedding_dim in tables, by the key that the dense weight would have"
            )
        stored = {home.path: methods for home, methods in choose(checkpoint, packed, config.source, has_source)}
        left = [home.path for home in packed if home.path not in stored]
        if left:
            raise ValueError(f"{checkpoint.path}: 'from' must fit every table with sizes, got none for {left[:3]}")
        packed = [_as_stored(checkpoint, home, stored[home.path], config.source_seed) for home in packed]
    changes = []
    for home, methods in choose(checkpoint, [*dense, *packed], config.compression, has_source):
        old = home.compressed(stored[home.path], config.source_seed, is_old=True) if home.path in stored else None
        new: nn.Module | None = _made(checkpoint, home, methods, config.seed)
        if not any(each.is_compressed for each in collection_of(new).methods().values()):
            if old is None and not home.kind:
                continue  # it would not get smaller
            new = new if old is None else None
        change = Change(home, old, new, config.source_seed, config.seed)
        _check_old(checkpoint, change)
        _check_shared(change)
        changes.append(change)
    if not changes:
        raise ValueError(f"{checkpoint.path}: a table must be left to convert, got none that would be stored otherwise")
    _check_types(checkpoint, changes, [*dense, *packed])
    _check_ties(checkpoint, changes)
    _check_new(checkpoint, changes)
    return changes, [*dense, *packed]


def _made(checkpoint: Checkpoint, home: Home, methods: Mapping[str, MethodConfig], seed: int) -> nn.Module:
    """Return the module with compressed tables, or raise ValueError with what the config can say of their types."""
    try:
        return home.compressed(methods, seed)
    except ValueError as error:
        if all(table.data_type == DataType.FP32 for table in home.tables):
            raise
        told = {table.key: table.data_type.name for table in home.tables}
        raise ValueError(
            f"{checkpoint.path}: {error}; the tables are {told}, of which data_type in 'tables' may say otherwise"
        ) from None


def _as_stored(checkpoint: Checkpoint, home: Home, methods: Mapping[str, MethodConfig], seed: int) -> Home:
    """Return a compressed home of which tables know their types: those of rows in tables of TorchRec's, of padding.

    Codes do not show of which type a table was; of FP32 they are the same.
    """
    kept = {table.name: checkpoint.tensors.get(home.dense_key(table)) for table in home.tables}
    types = {name: DATA_TYPES.get(entry.dtype, DataType.FP32) for name, entry in kept.items() if entry is not None}
    module = home.stored_as(types).compressed(methods, seed, is_old=True)
    collection = collection_of(module)
    prefix = prefix_of(home, module)
    for table in home.tables:
        names = collection.state_names(table.name)
        found = {checkpoint.tensors.get(prefix + key) for (field, _), key in names.items() if field == "native"}
        if table.name not in types and any(entry and entry.dtype == torch.float16 for entry in found):
            types[table.name] = DataType.FP16
    padding = None if home.kind else checkpoint.tensors.get(f"{home.prefix}padding_row")
    if padding is not None:
        types[home.tables[0].name] = DATA_TYPES.get(padding.dtype, DataType.FP32)
    return home.stored_as(types)


def _check_types(checkpoint: Checkpoint, changes: Sequence[Change], homes: Sequence[Home]) -> None:
    """Raise ValueError where a dense table that stays would have to be of another type."""
    anew = {table.key for change in changes for table in change.home.tables if not change.stays(table)}
    for home in homes:
        for table in home.tables:
            found = checkpoint.tensors.get(table.key) or checkpoint.tensors.get(home.dense_key(table))
            if table.entry.data_type and table.key not in anew and found and found.dtype != table.dtype:
                raise ValueError(
                    f"{checkpoint.path}: tables.{table.key}: data_type must be that of a table that stays as it is, "
                    f"{found.dtype}, got {table.entry.data_type}; leave it out, or compress the table"
                )


def _check_old(checkpoint: Checkpoint, change: Change) -> None:
    """Raise ValueError where the checkpoint lacks what it must have of a compressed module."""
    if change.old is None:
        return
    mine, prefix = set(change.old_keys()), change.home.prefix
    if others := [name for name in checkpoint.tensors if prefix and name.startswith(prefix) and name not in mine]:
        raise ValueError(
            f"{checkpoint.path}: must hold at {prefix!r} what 'from' and 'tables' say alone, got {others[:3]} as well"
            + ("; set padding_idx" if f"{prefix}padding_row" in others else "; name all of its tables")
        )
    dense = [table for table in change.home.tables if change.method(table, False) is None]
    copied = {key for table in dense for key in change.keys_of(table, False).values()}
    for key, value in change.old.state_dict().items():
        name = change.home.prefix + key
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise ValueError(
                f"{checkpoint.path}: must hold {name!r}, as 'from' says, got none{nearest(name, checkpoint.tensors)}"
            )
        if entry.shape != tuple(value.shape):
            raise ValueError(
                f"{checkpoint.path}: {name!r} must be {tuple(value.shape)}, as 'from' and the sizes say, got "
                f"{entry.shape}"
            )
        halves = (torch.float16, torch.bfloat16)
        if (entry.dtype in halves) != (value.dtype in halves) and value.is_floating_point() and name not in copied:
            raise ValueError(
                f"{checkpoint.path}: {name!r} must be {value.dtype}, as 'from' says, got {entry.dtype}, of a model "
                "that was cast; save it as it was made"
            )


def _check_shared(change: Change) -> None:
    if change.new is None:
        return
    collection = collection_of(change.new)
    for table in change.home.tables:
        blueprint = collection.blueprint
        if blueprint.common(table.name) or blueprint.banks[table.name] != table.name:
            raise ValueError(
                f"table {table.name!r}: must share nothing with other tables, which a fit of one would overwrite, got "
                f"{collection.methods()[table.name]}; train from the start values"
            )


def _check_ties(checkpoint: Checkpoint, changes: Sequence[Change]) -> None:
    """Raise ValueError where a table that is stored otherwise shares bytes with anything else."""
    spans = [(key, entry.span) for key, entry in checkpoint.tensors.items() if entry.span is not None]
    spans += [(key, span_of(each)) for key, value in checkpoint.plain.items() for each in _tensors_in(value)]
    for change in changes:
        for table in change.home.tables:
            entry = checkpoint.tensors.get(table.key)
            if entry is None or entry.span is None or change.stays(table):
                continue
            first, last = entry.span
            names = [key for key, (start, end) in spans if start < last and first < end]
            if len(names) > 1:
                raise ValueError(
                    f"{checkpoint.path}: a table must not share its weight with other modules, got {names} tied; untie "
                    "them, or leave the table out"
                )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that lie in lists of plain data."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def _check_new(checkpoint: Checkpoint, changes: Sequence[Change]) -> None:
    gone = {key for change in changes for key in change.old_keys()}
    seen: set[str] = set()
    for key in (key for change in changes for key in change.new_keys()):
        if key in seen or (key in checkpoint.places and key not in gone):
            raise ValueError(f"{checkpoint.path}: {key!r} must be free for a table, got something there")
        seen.add(key)


def moved_place(checkpoint: Checkpoint, old: str, new: str) -> tuple[Any, ...]:
    """Return the keys that lead to a new name, in the same mapping as an old one."""
    container = checkpoint.places[old][:-1]
    above = ".".join(map(str, container))
    return (*container, new.removeprefix(f"{above}.") if above else new)


def first_old(checkpoint: Checkpoint, change: Change) -> str:
    """Return the key of a change that comes first in the checkpoint, where all new ones shall come."""
    mine = set(change.old_keys())
    return next(key for key in checkpoint.places if key in mine)


def renamed_weights(checkpoint: Checkpoint, changes: Sequence[Change]) -> tuple[dict[str, str], set[str]]:
    """Return the names that an optimizer has for tensors that stay, with their new ones, and for such as are gone."""
    kept: dict[str, str] = {}
    gone: set[str] = set()
    for change in changes:
        first = first_old(checkpoint, change)
        mine: Mapping[str, str] = {}
        for table in change.home.tables:
            if change.stays(table):
                before, after = change.keys_of(table, False), change.keys_of(table, True)
                mine = {**mine, **{before[part]: after[part] for part in before}}
        for key in change.old_keys():
            name = str(checkpoint.places[key][-1])
            if key in mine:
                kept[name] = str(moved_place(checkpoint, first, mine[key])[-1])
            else:
                gone.add(name)
    return kept, gone
