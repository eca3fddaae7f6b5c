"""Compress and expand one embedding collection, in the host's memory or on one device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)

from torchrec_compress.compression import Compression
from torchrec_compress.convert.into import check_whole, row_reader
from torchrec_compress.convert.models import Place, errors_of
from torchrec_compress.methods import DenseConfig
from torchrec_compress.methods.learned import RowReader
from torchrec_compress.modules import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.names import kind_of
from torchrec_compress.ops import first_infinite
from torchrec_compress.seams import backward_optimizer, is_frozen

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 65536
Stock: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
Compressed: TypeAlias = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
STOCK = (EmbeddingBagCollection, EmbeddingCollection)
COMPRESSED = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)
# on a collection: which tables were frozen in what it was made of; integers, as of int8, have no flag that says it
_FROZEN = "_frozen_in_source"


def rows_of(source: Any) -> tuple[dict[str, Tensor | RowReader], torch.device]:
    """Return the rows of a collection by table name, and its device, or raise ValueError for anything else."""
    if isinstance(source, EmbeddingBagCollection | EmbeddingCollection):
        weights = stock_weights(source)
        rows: dict[str, Tensor | RowReader] = {name: weight.detach() for name, weight in weights.items()}
        if not rows:
            raise ValueError("compress: source must have tables, got none")
        empty = sorted(name for name, weight in weights.items() if weight.is_meta)
        if empty:
            raise ValueError(
                f"compress: tables must hold values, got {empty} on the meta device; load a checkpoint first"
            )
        narrow = sorted(n for n, w in weights.items() if w.dtype not in (torch.float32, torch.float16))
        narrow += sorted(n for n, w in weights.items() if w.dtype == torch.float16 and n not in _half_tables(source))
        if narrow:
            logger.warning("tables %s: are in another dtype than their configs say; read in float32", narrow)
        return rows, next(iter(weights.values())).device
    if isinstance(source, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        check_whole("compress", source)
        if source.code_tables is not None:
            source.code_tables.warn_of_start_codes()
        return {table.name: row_reader(source, table.name) for table in source.table_configs()}, source.device
    got = kind_of(source, *STOCK)
    advice = "make an EmbeddingBagCollection of the trained rows"
    if isinstance(source, ShardedModule):
        advice = "compress the DistributedModelParallel that it is in"
    elif isinstance(source, torch.fx.GraphModule | torch.jit.ScriptModule):
        advice = "compress the module that it was made from, and trace or script the result"
    elif isinstance(source, EmbeddingBagCollectionInterface | EmbeddingCollectionInterface):
        advice = "compress the floating-point collection that it was made from"
    raise ValueError(
        "compress: source must be an EmbeddingBagCollection or an EmbeddingCollection, stock or compressed, a plain "
        f"nn.Embedding or nn.EmbeddingBag, or a model that holds some, got {got}; {advice}"
    )


def collection_of(module: Any) -> Compressed:
    """Return the collection that a compressed module is, or has."""
    is_plain = isinstance(module, CompressedEmbedding | CompressedEmbeddingBag)
    return module.collection if is_plain else module  # type: ignore[return-value]


def _half_tables(source: Stock) -> set[str]:
    """Return the tables whose configs say float16."""
    is_pooled = isinstance(source, EmbeddingBagCollection)
    configs: Any = source.embedding_bag_configs() if is_pooled else source.embedding_configs()
    return {table.name for table in configs if table.data_type == DataType.FP16}


def generators(device: torch.device) -> list[torch.device]:
    """Return the devices, beside the CPU, whose global generators draw on one."""
    return [] if device.type in ("cpu", "meta") else [device]


def stock_weights(source: Stock) -> dict[str, nn.Parameter]:
    """Return the weights of a stock collection by table name."""
    stored: Any = source.embeddings if isinstance(source, EmbeddingCollection) else source.embedding_bags
    return {name: module.weight for name, module in stored.items()}


def empty_like(source: Stock | Compressed, device: torch.device, compression: Compression, seed: int) -> Compressed:
    """Return a compressed collection of the same tables and kind, to be fitted."""
    # what is made in inference mode can never be trained; start values are not what a user's seed is for
    with torch.inference_mode(False), torch.random.fork_rng(generators(device)):
        if isinstance(source, EmbeddingCollection | CompressedEmbeddingCollection):
            configs, kept = source.embedding_configs(), source.need_indices()
            return CompressedEmbeddingCollection(configs, device, kept, compression, seed, will_fit=True)
        bags, kept = source.embedding_bag_configs(), source.is_weighted()
        return CompressedEmbeddingBagCollection(bags, device, kept, compression, seed, will_fit=True)


def frozen_tables(place: Place) -> set[str]:
    """Return the tables of a module of which nothing is trained, as far as this rank holds them."""
    if place.is_compressed:
        collection = collection_of(place.module)
        return {table.name for table in collection.table_configs() if is_frozen_table(collection, table.name)}
    return {name for name, parameters in parameters_by_table(place).items() if all(map(is_frozen, parameters))}


def take_frozen(frozen: Collection[str], collection: Compressed) -> None:
    """Freeze what a collection stores of tables that were frozen, and note which, where it stores nothing to freeze.

    Args:
        frozen: tables of the source, of `frozen_tables`.
        collection: of these tables.
    """
    for name in frozen:
        for parameter in parameters_of(collection, name):
            parameter.requires_grad_(False)
    note_frozen(frozen, collection)


def note_frozen(frozen: Collection[str], collection: Compressed) -> None:
    """Note which tables were frozen, for those that store nothing that could tell."""
    setattr(collection, _FROZEN, frozenset(frozen))


def warn_of_optimizers(before: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Say which tables have optimizers in the backward that their successors will not have."""
    gone = [name for name, parameters in before.items() if any(map(backward_optimizer, parameters))]
    if gone:
        logger.warning(
            "tables %s: the optimizer that trains them in the backward stays with the source; call "
            "apply_optimizer_in_backward() on native_parameters() of the compressed model",
            gone,
        )


def parameters_by_table(place: Place) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each table of a module, of this rank's shards where it is sharded."""
    module = place.module
    if isinstance(module, CompressedParts):
        return {table.name: parameters_of(module, table.name) for table in module.table_configs()}  # type: ignore[arg-type]
    found: dict[str, list[nn.Parameter]] = {}
    for path, parameter in module.named_parameters():  # embedding_bags.<table>.weight; that of a plain one is "weight"
        found.setdefault(path.split(".")[-2] if "." in path else place.tables[0], []).append(parameter)
    return found


def parameters_of(collection: Compressed, name: str) -> list[nn.Parameter]:
    """Return the parameters of one table, of this rank's shards where it is sharded; of shared ones, only its own."""
    # a sharded one has parts of other kinds, by the same names
    names = empty_like(collection, torch.device("meta"), collection.methods(), collection.seed).state_names(name)
    common, parts = collection.blueprint.common(name), collection.blueprint.parts[name]
    others = {("native", part.name) for part in parts.native if part.shared in common}
    if collection.blueprint.banks[name] != name:
        others |= {key for key in names if key[0] == "decoder"}
    found = dict(collection.named_parameters())
    mine = [found[path] for key, path in names.items() if key not in others and path in found]
    if collection.trained is not None and name in collection.trained.banks:
        mine += collection.trained.banks[name].parameters()
    return mine


def stock_like(collection: Compressed, device: torch.device) -> Stock:
    """Return a stock collection of the same tables and kind, to be filled.

    Raises:
        ValueError: a table is of a data type that TorchRec would change without a word.
    """
    for table in collection.table_configs():
        with errors_of("decompress"):
            DenseConfig().check(table)
    with torch.random.fork_rng(generators(device)):
        if isinstance(collection, CompressedEmbeddingCollection):
            rows = copy.deepcopy(collection.embedding_configs())
            return EmbeddingCollection(rows, device=device, need_indices=collection.need_indices())
        bags = copy.deepcopy(collection.embedding_bag_configs())
        return EmbeddingBagCollection(bags, is_weighted=collection.is_weighted(), device=device)


@torch.no_grad()
def expand(collection: Compressed) -> Stock:
    """Return a stock collection of the rows that a compressed one serves."""
    check_whole("decompress", collection)
    if collection.code_tables is not None:
        collection.code_tables.warn_of_start_codes()
    dense = stock_like(collection, collection.device)
    weights = stock_weights(dense)
    for name, weight in weights.items():
        fill(weight, collection, name)
    return dense


def check_range(name: str, rows: Tensor, dtype: torch.dtype, ids: Tensor | None = None) -> None:
    """Raise ValueError where finite values of served rows, (L, D) float32, would be infinite in a table's dtype.

    It names the first row where their `ids`, (L,) integer, are given.
    """
    if (found := first_infinite(rows, dtype)) is not None:
        raise ValueError(
            f"decompress: table {name!r}: rows must be in +-{torch.finfo(dtype).max:.0f} to be stored as {dtype}, got "
            f"up to {found[1]:g}; give the table data_type FP32"
            + ("" if ids is None else f"; the first is that of id {int(ids[found[0]])}")
        )


@torch.no_grad()
def fill(weight: nn.Parameter, collection: Compressed, name: str) -> None:
    """Write the rows that one table serves, block by block, into a weight, (N, D); it is frozen if they are."""
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        ids = torch.arange(first, min(first + _ROWS_AT_ONCE, len(weight)), device=collection.device)
        rows = collection.table_rows(name, ids)
        check_range(name, rows, weight.dtype, ids)
        weight[first : first + len(ids)] = rows
    weight.requires_grad_(not is_frozen_table(collection, name))


def is_frozen_table(collection: Compressed, name: str) -> bool:
    """Return whether nothing of a table is trained; where it has nothing that could be, whether its source was so."""
    found = [is_frozen(parameter) for parameter in parameters_of(collection, name)]
    if collection.trained is not None and name in collection.trained.banks:
        found.append(not collection.trained.trains(name))
    return all(found) if found else name in getattr(collection, _FROZEN, ())
