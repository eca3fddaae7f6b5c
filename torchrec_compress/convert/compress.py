"""Fit a compressed collection to a trained dense one, and expand it again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from tqdm import tqdm

from torchrec_compress.compression import Compression
from torchrec_compress.methods import TableData
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection

_ROWS_AT_ONCE = 65536


@overload
def compress(
    dense: EmbeddingBagCollection,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingBagCollection: ...


@overload
def compress(
    dense: EmbeddingCollection,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingCollection: ...


def compress(
    dense: EmbeddingBagCollection | EmbeddingCollection,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressedEmbeddingBagCollection | CompressedEmbeddingCollection:
    """Fit a compressed collection to a trained one.

    Args:
        dense: trained tables; untouched.
        compression: a method for all tables, or methods by table name or pattern.
        counts: look-ups per id in training, (N,) by table name. Popularity weights and hot rows need them.
        contexts: pairs (ids, context ids), ((P,), (P,)) int64 by table name. Quantile codes need them.
        seed: of the fit.
        progress: whether to show a progress bar.

    Returns:
        A collection with the same keys and widths, its tables fitted: pooled for pooled ones, else unpooled.

    Raises:
        ValueError: a table cannot be stored or fitted as asked, or counts or contexts name an unknown table.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=2000, embedding_dim=16, feature_names=["user"])
        >>> compress(EmbeddingBagCollection([table]), PQConfig(num_codes=4, codebook_size=64)).footprint().ratio > 8
        True
    """
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
    if isinstance(dense, EmbeddingCollection):
        configs, kept, stored = dense.embedding_configs(), dense.need_indices(), dense.embeddings
        collection = CompressedEmbeddingCollection(configs, dense.device, kept, compression, seed, will_fit=True)
    else:
        bags, kept, stored = dense.embedding_bag_configs(), dense.is_weighted(), dense.embedding_bags
        collection = CompressedEmbeddingBagCollection(bags, dense.device, kept, compression, seed, will_fit=True)
    modules: Any = stored.items()
    rows = {name: module.weight.detach().float().cpu() for name, module in modules}
    compress_into(collection, rows, counts=counts, contexts=contexts, seed=seed, progress=progress)
    return collection


def compress_into(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    rows: Mapping[str, Tensor],
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> None:
    """Fit the tables of a collection in place.

    Args:
        collection: to be filled.
        rows: pre-trained tables, (N, D) float32 by table name. A table without rows keeps its start values where its
            method can be trained from them, and is an error where it cannot (MEC, PQ, int8, int4).
        counts, contexts, progress: as for `compress`.
        seed: of the fit; the collection's own, which is the default, since its hashes were made from that.

    Raises:
        ValueError: as for `compress`; the seed is not the collection's.
    """
    if seed is not None and seed != collection.seed:
        raise ValueError(
            f"compress_into: seed must be the collection's own, {collection.seed}, got {seed}; leave it out"
        )
    counts, contexts = counts or {}, contexts or {}
    methods = collection.methods()
    for what, given in (("rows", rows), ("counts", counts), ("contexts", contexts)):
        unknown = sorted(set(given) - set(methods))
        if unknown:
            raise ValueError(f"compress: {what} must name tables of {sorted(methods)}, got {unknown}")
    tables = {table.name: table for table in collection.table_configs()}
    with tqdm(tables.items(), desc="fitting", unit="table", disable=not progress, leave=False) as bar:
        for name, table in bar:
            bar.set_postfix_str(f"{name}: {methods[name].method}")
            data = TableData(rows.get(name), counts.get(name), contexts.get(name), collection.seed, progress)
            if data.rows is None and methods[name].needs == "nothing":
                continue  # the table trains from the start values it has
            collection.load_table(name, methods[name].fit(table, data))


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
