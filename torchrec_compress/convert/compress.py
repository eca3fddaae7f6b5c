"""Fit a compressed collection to a trained one, dense or stored otherwise, and expand it again."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from tqdm import tqdm

from torchrec_compress.compression import Compression
from torchrec_compress.convert.metrics import metrics_of
from torchrec_compress.fit.curvature import Curvature
from torchrec_compress.methods import MethodConfig, TableData, TableState
from torchrec_compress.methods.learned import RowReader, check_trained_rows
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.modules.collection import check_unsharded
from torchrec_compress.names import kind_of

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 65536
_COMPRESSED = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)
_Source: TypeAlias = (
    EmbeddingBagCollection | EmbeddingCollection | CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
)


@overload
def compress(
    source: EmbeddingBagCollection | CompressedEmbeddingBagCollection,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingBagCollection: ...


@overload
def compress(
    source: EmbeddingCollection | CompressedEmbeddingCollection,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingCollection: ...


def compress(
    source: _Source,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingBagCollection | CompressedEmbeddingCollection:
    """Fit a compressed collection to a trained one.

    Rows of a compressed source (narrow ones, trained in few bits) are read block by block: codes are learned from a
    weighted sample of them, and no table of float32 rows is made. Rows of rank r lose nothing by codes of that `width`.

    Args:
        source: trained tables; untouched.
        compression: a method for all tables, or methods by table name or pattern.
        counts: look-ups per id in training, (N,) by table name. Popularity weights and hot rows need them.
        contexts: pairs (ids, context ids), ((P,), (P,)) int64 by table name. Quantile codes need them.
        curvature: what `measure_curvature` found of the trained model, by table name: errors count as its loss feels
            them, not as their squares, where a method can (`uses_curvature`); a table of which too little is known is
            fitted to squared error, and the log says so.
        seed: of the fit.
        progress: whether to show a progress bar.

    Returns:
        A collection with the same keys and widths, its tables fitted: pooled for pooled ones, else unpooled.

    Raises:
        ValueError: `source` is neither a stock nor a compressed collection, or is sharded; a table cannot be stored or
            fitted as asked; rows, counts, contexts or curvature are not what they should be or name an unknown table,
            or the curvature is of another model; all of it before the first fit but what only reading a compressed
            source shows.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=2000, embedding_dim=16, feature_names=["user"])
        >>> compress(EmbeddingBagCollection([table]), PQConfig(num_codes=4, codebook_size=64)).footprint().ratio > 8
        True
    """
    rows, device = _rows_of(source)
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
    with torch.inference_mode(False):  # what is made in it can never be trained
        if isinstance(source, EmbeddingCollection | CompressedEmbeddingCollection):
            configs, kept = source.embedding_configs(), source.need_indices()
            collection = CompressedEmbeddingCollection(configs, device, kept, compression, seed, will_fit=True)
        else:
            bags, kept = source.embedding_bag_configs(), source.is_weighted()
            collection = CompressedEmbeddingBagCollection(bags, device, kept, compression, seed, will_fit=True)
    compress_into(collection, rows, counts=counts, contexts=contexts, curvature=curvature, seed=seed, progress=progress)
    return collection


def _rows_of(source: Any) -> tuple[dict[str, Tensor | RowReader], torch.device]:
    """Return the rows of a collection by table name, and its device, or raise ValueError for anything else."""
    if isinstance(source, EmbeddingBagCollection | EmbeddingCollection):
        stored: Any = source.embeddings if isinstance(source, EmbeddingCollection) else source.embedding_bags
        rows = {name: module.weight.detach() for name, module in stored.items()}
        if not rows:
            raise ValueError("compress: source must have tables, got none")
        empty = sorted(name for name, weight in rows.items() if weight.is_meta)
        if empty:
            raise ValueError(
                f"compress: tables must hold values, got {empty} on the meta device; load a checkpoint first"
            )
        return rows, next(iter(rows.values())).device
    if isinstance(source, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        check_whole("compress", source)
        if source.code_tables is not None:
            source.code_tables.warn_of_start_codes()
        return {table.name: row_reader(source, table.name) for table in source.table_configs()}, source.device
    got = kind_of(source, EmbeddingBagCollection, EmbeddingCollection)
    advice = "make an EmbeddingBagCollection of the trained rows"
    if isinstance(source, ShardedModule):
        advice = "gather its state dict into an unsharded collection, and compress that before DistributedModelParallel"
    elif isinstance(source, torch.fx.GraphModule | torch.jit.ScriptModule):
        advice = "compress the module that it was made from, and trace or script the result"
    elif isinstance(source, EmbeddingBagCollectionInterface | EmbeddingCollectionInterface):
        advice = "compress the floating-point collection that it was made from"
    elif isinstance(source, nn.Module):
        kinds = (EmbeddingBagCollection, EmbeddingCollection, ShardedModule)
        found = [name for name, module in source.named_modules() if isinstance(module, kinds)]
        if found:
            advice = f"pass the collections inside it, {found}, one at a time"
    raise ValueError(
        "compress: source must be an EmbeddingBagCollection or an EmbeddingCollection, stock or compressed, got "
        f"{got}; {advice}"
    )


def row_reader(collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, name: str) -> RowReader:
    """Return what reads rows of one table of a collection that holds them whole, in the host's memory.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import NarrowConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=8, feature_names=["user"])
        >>> small = CompressedEmbeddingBagCollection([table], compression=NarrowConfig(width=4))
        >>> row_reader(small, "user")(torch.tensor([3, 1])).shape
        torch.Size([2, 8])
    """

    @torch.no_grad()
    def read(ids: Tensor) -> Tensor:
        return collection.table_rows(name, ids.to(collection.device)).float().cpu()

    return read


def compress_into(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    rows: Mapping[str, Tensor | RowReader],
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> None:
    """Fit the tables of a collection in place.

    Args:
        collection: to be filled.
        rows: pre-trained tables by table name: (N, D) float32, or what reads them by ids (`row_reader`), where the
            whole is never made. A table without rows keeps its start values where its method can be trained from them,
            and is an error where it cannot (MEC, PQ, int8, int4).
        counts, contexts, curvature, progress: as for `compress`.
        seed: of the fit; the collection's own, which is the default, since its hashes were made from that.

    Raises:
        ValueError: as for `compress`; the seed is not the collection's, or this was made under
            `torch.inference_mode()`.
    """
    if not isinstance(collection, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        raise ValueError(f"compress_into: collection must be a compressed one, got {kind_of(collection, *_COMPRESSED)}")
    if seed is not None and seed != collection.seed:
        raise ValueError(
            f"compress_into: seed must be the collection's own, {collection.seed}, got {seed}; leave it out"
        )
    check_whole("compress_into", collection)
    _check_trainable("compress_into", collection)
    tables = {table.name: table for table in collection.table_configs()}
    counts = {} if counts is None else counts
    contexts = {} if contexts is None else contexts
    curvature = {} if curvature is None else curvature
    _check_names(tables, {"rows": rows, "counts": counts, "contexts": contexts, "curvature": curvature})
    _warn_of_ties(rows)
    methods, known = collection.methods(), set(rows)
    metrics = metrics_of(curvature, (table for name, table in tables.items() if name in known), methods)
    inputs = {}
    for name, table in tables.items():  # all of them before the first is fitted
        if name not in known and methods[name].needs == "rows":
            TableData(None).trained_rows(table)
        if isinstance(rows, dict) and name in known:  # another mapping may read them one at a time
            _check_rows(table, methods[name], rows[name])
            _check_known(curvature.get(name), rows[name])
        inputs[name] = TableData(
            None, counts.get(name), contexts.get(name), collection.seed, progress, curvature=metrics.get(name)
        )
        if name in known or methods[name].needs != "nothing":
            methods[name].check_fit(table, inputs[name])
    bar = tqdm(tables.items(), desc="fitting", unit="table", disable=not progress, leave=False)
    with bar, torch.inference_mode(False):
        for name, table in bar:
            bar.set_postfix_str(f"{name}: {methods[name].method}")
            if name not in known and methods[name].needs == "nothing":
                continue  # the table trains from the start values it has
            _check_known(curvature.get(name), given := rows[name] if name in known else None)
            collection.load_table(name, _fit(methods[name], table, _on_cpu(inputs[name]), given))


def _check_names(tables: Mapping[str, Any], inputs: Mapping[str, object]) -> None:
    """Raise ValueError unless every input is a mapping by names of tables."""
    for what, given in inputs.items():
        if not isinstance(given, Mapping):
            raise ValueError(f"compress: {what} must be a mapping by table name, got {type(given).__name__}")
        unknown = sorted(set(given) - set(tables), key=str)
        if unknown:
            raise ValueError(f"compress: {what} must name tables of {sorted(tables)}, got {unknown}")


def _check_known(curvature: Curvature | None, rows: Tensor | RowReader | None) -> None:
    """Raise ValueError unless a curvature was measured with these rows."""
    if curvature is not None and rows is not None:
        curvature.check_rows((lambda ids: rows[ids.to(rows.device)]) if isinstance(rows, Tensor) else rows)


def _warn_of_ties(rows: Mapping[str, Tensor | RowReader]) -> None:
    """Say which tables share one weight, where that shows before any is read; compressed, they share nothing."""
    by_place: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in rows.items() if isinstance(rows, dict) else ():  # another mapping reads them one at a time
        if isinstance(weight, Tensor) and weight.layout == torch.strided and weight.numel():
            by_place.setdefault((weight.device, weight.data_ptr(), weight.shape, weight.stride()), []).append(name)
    for names in by_place.values():
        if len(names) > 1:
            logger.warning(
                "tables %s share one weight; compressed, each is stored and trained on its own: give one table the "
                "features of all to keep the tie",
                names,
            )


def check_whole(where: str, collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
    """Raise ValueError where a collection holds no values, or not all of them."""
    check_unsharded(collection, where)
    empty = [name for name, value in [*collection.named_parameters(), *collection.named_buffers()] if value.is_meta]
    if empty:
        raise ValueError(
            f"{where}: collection must hold values, got {empty[0]!r} on the meta device; call to_empty(device=...) and "
            "reset_parameters() first"
        )


def _check_trainable(where: str, collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
    """Raise ValueError where tensors of a collection can only be read."""
    if any(value.is_inference() for value in [*collection.parameters(), *collection.buffers()]):
        raise ValueError(
            f"{where}: collection must not be made under torch.inference_mode(), whose tensors can never be trained, "
            "got inference tensors; make it outside"
        )


def _check_rows(table: BaseEmbeddingConfig, method: MethodConfig, rows: Tensor | RowReader) -> None:
    """Raise ValueError for rows that a fit cannot use, as far as that shows before they are read."""
    if callable(rows) and not isinstance(rows, Tensor):
        method.check_blocks(table)
    else:
        check_trained_rows(table, rows)


def _fit(
    method: MethodConfig, table: BaseEmbeddingConfig, data: TableData, rows: Tensor | RowReader | None
) -> TableState:
    """Return a table that is fitted to rows, or to rows that are read."""
    if rows is None or isinstance(rows, Tensor):
        return method.fit(table, dataclasses.replace(data, rows=None if rows is None else rows.detach().cpu()))
    return method.fit_blocks(table, data, rows)


def _on_cpu(data: TableData) -> TableData:
    """Return the data of a fit, all of it in the host's memory."""
    counts = None if data.counts is None else data.counts.detach().cpu()
    contexts = None if data.contexts is None else (data.contexts[0].cpu().long(), data.contexts[1].cpu().long())
    return dataclasses.replace(data, counts=counts, contexts=contexts)


@overload
def decompress(collection: CompressedEmbeddingBagCollection) -> EmbeddingBagCollection: ...


@overload
def decompress(collection: CompressedEmbeddingCollection) -> EmbeddingCollection: ...


@torch.no_grad()
def decompress(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
) -> EmbeddingBagCollection | EmbeddingCollection:
    """Expand every table of a compressed collection to its dense rows.

    Args:
        collection: any compressed collection, fitted or not.

    Returns:
        A stock collection on the same device whose rows are the ones that the compressed tables serve.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import HashConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=4, feature_names=["user"])
        >>> collection = CompressedEmbeddingBagCollection([table], compression=HashConfig(num_buckets=10))
        >>> decompress(collection).embedding_bags["user"].weight.unique(dim=0).shape[0] <= 10
        True
    """
    if not isinstance(collection, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        raise ValueError(f"decompress: collection must be a compressed one, got {kind_of(collection, *_COMPRESSED)}")
    check_whole("decompress", collection)
    if collection.code_tables is not None:
        collection.code_tables.warn_of_start_codes()
    dense: EmbeddingBagCollection | EmbeddingCollection
    if isinstance(collection, CompressedEmbeddingCollection):
        rows = copy.deepcopy(collection.embedding_configs())
        dense = EmbeddingCollection(rows, device=collection.device, need_indices=collection.need_indices())
        modules: Any = dense.embeddings
    else:
        bags = copy.deepcopy(collection.embedding_bag_configs())
        dense = EmbeddingBagCollection(bags, is_weighted=collection.is_weighted(), device=collection.device)
        modules = dense.embedding_bags
    for table in collection.table_configs():
        weight = modules[table.name].weight
        for first in range(0, table.num_embeddings, _ROWS_AT_ONCE):
            ids = torch.arange(first, min(first + _ROWS_AT_ONCE, table.num_embeddings), device=collection.device)
            weight[first : first + len(ids)] = collection.table_rows(table.name, ids)
    return dense
