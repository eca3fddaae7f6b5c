"""The embedding tables of a model, by the names that its user has for them, and others in their place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)

from torchrec_compress.compression import Compression
from torchrec_compress.compression.resolve import methods_by_key
from torchrec_compress.methods import MethodConfig
from torchrec_compress.modules import CompressedEmbedding, CompressedEmbeddingBag
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.schema import nearest
from torchrec_compress.seams import is_compiled, sharded_configs

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
PLAIN = (nn.Embedding, nn.EmbeddingBag)
_NAMES = tuple(kind.__name__ for kind in PLAIN)
_PLAIN_COMPRESSED = (CompressedEmbedding, CompressedEmbeddingBag)
_COLLECTIONS = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)


class Place(NamedTuple):
    """A module of a model that holds embedding tables.

    Attributes:
        path: in the model; "" is the model itself.
        module: a stock, compressed or sharded collection, or a plain module of one table.
        tables: their names in a collection; of a plain module the one that it has once compressed.
        others: paths that tables of other modules have, and so no other name of these.
    """

    path: str
    module: nn.Module
    tables: tuple[str, ...]
    others: frozenset[str] = frozenset()

    @property
    def is_compressed(self) -> bool:
        """Whether its tables are stored otherwise already."""
        return isinstance(self.module, CompressedParts | CompressedEmbedding | CompressedEmbeddingBag)

    def names(self, table: str) -> tuple[str, ...]:
        """Return what a user may call one of its tables: by path and name, or by name alone; a plain one by path.

        What is measured of a model calls a plain one as it is called once compressed, so that is another name of it.
        """
        own = self.path or table
        if not isinstance(self.module, (*PLAIN, *_PLAIN_COMPRESSED)) and self.path:
            own = f"{self.path}.{table}"
        return (own,) if table == own or table in self.others else (own, table)


def find_places(model: nn.Module) -> list[Place]:
    """Return where a model has embedding tables, the outermost modules first met; each module once."""
    found, seen = [], set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        tables = _tables_of(path, module)
        if tables is not None:
            found.append(Place(path, module, tables))
            return
        if isinstance(module, ShardedModule | EmbeddingBagCollectionInterface | EmbeddingCollectionInterface):
            return  # quantised ones, or of someone else: not what is compressed, nor what lies in them
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    paths = [place.names(table)[0] for place in found for table in place.tables]
    return [place._replace(others=frozenset(paths) - {place.path}) for place in found]


def _tables_of(path: str, module: Any) -> tuple[str, ...] | None:
    """Return the tables of a module that can be compressed, or is; None for other modules."""
    if (sharded := sharded_configs(module)) is not None:
        return tuple(table.name for table in sharded[0])
    if isinstance(module, CompressedParts):
        return tuple(table.name for table in module.table_configs())
    if isinstance(module, EmbeddingBagCollection) and type(module).forward is EmbeddingBagCollection.forward:
        return tuple(table.name for table in module.embedding_bag_configs())
    if isinstance(module, EmbeddingCollection) and type(module).forward is EmbeddingCollection.forward:
        return tuple(table.name for table in module.embedding_configs())
    if isinstance(module, _PLAIN_COMPRESSED):
        return (module.name,)
    if type(module) in PLAIN:
        return (table_name(path),)
    if isinstance(module, (*PLAIN, EmbeddingBagCollection, EmbeddingCollection)):
        logger.warning("%r: left as it is: %s may look its rows up in a way of its own", path, type(module))
    if getattr(module, "original_name", None) in _NAMES and isinstance(module, torch.jit.ScriptModule):
        logger.warning("%r: left as it is: its graph is scripted; compress first, and script the result", path)
    return None


def table_name(path: str) -> str:
    """Return what a plain module's table is called: its path, without dots and unlike any attribute of a module."""
    name = path.replace(".", "_") or "embedding"
    return f"{name}_" if hasattr(nn.ModuleDict, name) else name


def chosen(places: Sequence[Place], compression: Compression) -> list[tuple[Place, dict[str, MethodConfig]]]:
    """Return the places that are to be compressed, with the method of each table that has one.

    A table is asked for by its name, its path and name, or a pattern for either; exact names first. What is compressed
    already is stored anew only where a key is its exact name.

    Raises:
        ValueError: no method or mapping of methods, there is no table, or a key fits none; of a compressed collection
            some tables are named, and others are not.
    """
    by_key = methods_by_key(compression)
    if not by_key:
        raise ValueError("compression: must name a table, got an empty mapping; nothing would be compressed")
    unused, found = dict.fromkeys(by_key), []
    for place in places:
        methods = {}
        for table in place.tables:
            names = place.names(table)
            exact = [name for name in names if name in by_key]
            fitting = [key for key in by_key if any(fnmatchcase(name, key) for name in names)]
            for key in {*exact, *fitting}:
                unused.pop(key, None)
            keys = exact if place.is_compressed else exact + fitting
            if keys:
                methods[table] = by_key[keys[0]]
        if methods:
            found.append((place, methods))
    known = [name for place in places for table in place.tables for name in place.names(table)]
    first = [place.names(table)[0] for place in places for table in place.tables]
    if not known:
        raise ValueError(
            "compress: the model must hold embedding tables, got none; TorchRec's or PyTorch's own are seen"
        )
    if unused and isinstance(compression, Mapping):
        raise ValueError(
            f"compression: every key must fit a table, got {sorted(unused)}{nearest(next(iter(unused)), known)}; the "
            f"tables are {first}"
        )
    if not found:
        raise ValueError(f"compress: a table must be left to compress, got only compressed ones, {first}; name one")
    for place, methods in found:
        _check_all_named(place, methods)
    return found


def _check_all_named(place: Place, methods: Mapping[str, MethodConfig]) -> None:
    """Raise ValueError where some tables of a compressed collection, which is stored anew whole, have no method."""
    if isinstance(place.module, CompressedParts):
        now = place.module.methods()
        missing = {place.names(table)[0]: now[table] for table in place.tables if table not in methods}
        if missing:
            raise ValueError(
                f"compress: {place.path!r} is compressed already, so each of its tables must be named exactly, which "
                f"no pattern does, got no name of {list(missing)}; as they are stored now, add {missing}"
            )


def shared_out(what: str, given: Mapping[str, Given] | None, places: Sequence[Place]) -> dict[str, dict[str, Given]]:
    """Return what was given by the user's names of tables: by path of the place, then by table.

    Raises:
        ValueError: it is no mapping; a name is of no table, or of several.
    """
    found: dict[str, dict[str, Given]] = {place.path: {} for place in places}
    if given is None:
        return found
    if not isinstance(given, Mapping):
        raise ValueError(f"compress: {what} must be a mapping by table name, got {type(given).__name__}")
    owners: dict[str, list[tuple[Place, str]]] = {}
    for place in places:
        for table in place.tables:
            for name in place.names(table):
                owners.setdefault(name, []).append((place, table))
    for name in given:
        mine = owners.get(name, [])
        if not mine:
            raise ValueError(
                f"compress: {what} must name tables, got {name!r}{nearest(str(name), owners)}; they are "
                f"{sorted(owners)}"
            )
        if len(mine) > 1:
            paths = [place.names(table)[0] for place, table in mine]
            raise ValueError(f"compress: {what} must name one table each, got {name!r}; write one of {paths}")
        ((place, table),) = mine
        if table in found[place.path]:
            raise ValueError(f"compress: {what} must name a table once, got {list(place.names(table))}")
        found[place.path][table] = given[name]
    return found


def with_modules(where: str, model: Any, new: Mapping[int, nn.Module], inplace: bool) -> Any:
    """Return a model with other modules in place of some, wherever they stand: itself, or a copy of all else.

    Args:
        where: names the caller.
        model: holds them; as before where one cannot be put in its place.
        new: by the `id` of the old one.
        inplace: whether to change the model.

    Raises:
        ValueError: the model cannot be copied.
    """
    if not inplace:
        compiled = [path or "the model" for path, each in model.named_modules() if is_compiled([each])]
        if compiled:
            logger.warning("%s: %s are compiled no more in the copy; call compile() again", where, compiled)
        return _copied(where, model, dict(new))
    if id(model) in new:  # which has no place to be put in
        return new[id(model)]
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if id(module) in new:
                parent, _, name = path.rpartition(".")
                owner = model.get_submodule(parent)
                replaced.append((owner, name, module))
                setattr(owner, name, new[id(module)])
    except BaseException:
        for owner, name, module in replaced:
            owner._modules[name] = module  # past what refused the new one
        raise
    return model


def check_copied(where: str, model: nn.Module) -> None:
    """Raise ValueError unless a model can be copied, as it shows without a copy of its parameters and buffers."""
    _copied(where, model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def _copied(where: str, model: Any, new: dict[int, Any]) -> Any:
    """Return a copy of a model, in which others stand in place of some objects, by the `id` of the old ones."""
    try:
        return copy.deepcopy(model, new)  # what deepcopy takes for copied already
    except Exception as error:  # of a lock, a generator, or whatever parts of a model raise
        raise ValueError(
            f"{where}: the model must be one that can be copied, got {error}; pass inplace=True to change itself"
        ) from error


@contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Have errors name the module that they are about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"{path}: {error}" if path else str(error)) from error
