"""Codebooks and hot rows in few bits, while they train: in float32, and rounded once more when they are stored."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.convert.rebuild import Compressed, Stored, check_source, rebuilt
from torchrec_compress.methods import MethodConfig, dense_bytes

logger = logging.getLogger(__name__)


def dequantized(method: MethodConfig, table: BaseEmbeddingConfig) -> MethodConfig:
    """Return how `dequantize_codebooks` stores a table: as before, where float32 would take as much as dense."""
    other = method.dequantized()
    return method if other == method or other.stored_bytes(table) >= dense_bytes(table) else other


@torch.no_grad()
def dequantize_codebooks(collection: Compressed) -> Compressed:
    """Make codebooks and hot rows of few bits float32 parameters, so that they train.

    Codes stay bit for bit, and so does what is served. A table that would take as many bytes as dense stays as it is,
    which is logged. `quantize_codebooks` undoes it, up to a rounding: rows that vary little beside their mean may move
    by a fraction of a step.

    Args:
        collection: unsharded; untouched, and nothing of it is shared with the result.

    Returns:
        A collection of the same kind, keys and widths.

    Raises:
        ValueError: `collection` is no compressed collection of values in float32, or is sharded.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec_compress import compress
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=2000, embedding_dim=16, feature_names=["user"])
        >>> method = PQConfig(num_codes=4, codebook_size=64, codebook_dtype="int8")
        >>> served = compress(EmbeddingBagCollection([table]), method)
        >>> trained = dequantize_codebooks(served)
        >>> len(list(served.parameters())), len(list(trained.parameters()))
        (0, 1)
        >>> quantize_codebooks(trained, served.methods()).methods() == served.methods()
        True
    """
    check_source("dequantize_codebooks", collection)
    methods, tables = collection.methods(), collection.table_configs()
    chosen = {table.name: dequantized(methods[table.name], table) for table in tables}
    left = [name for name, method in chosen.items() if method.dequantized() != method]
    if left:
        logger.warning("tables %s stay in few bits: in float32 they would take as much as dense", left)
    return stored_by(collection, {name: method for name, method in chosen.items() if method != methods[name]})


@torch.no_grad()
def quantize_codebooks(collection: Compressed, methods: Mapping[str, MethodConfig]) -> Compressed:
    """Store codebooks and hot rows in few bits again, each rounded to the nearest; codes stay bit for bit.

    Args:
        collection: what `dequantize_codebooks` gave, trained since; unsharded, untouched, and nothing of it is shared
            with the result.
        methods: of the collection before, by table name; those of tables that are stored so already change nothing.

    Returns:
        A collection of the same kind, keys and widths.

    Raises:
        ValueError: `collection` is no compressed collection of values in float32, or is sharded; `methods` name an
            unknown table, or a method that differs in more than the dtypes of codebooks and hot rows; rows have no
            float16 scale. Table and row are named.
    """
    where = "quantize_codebooks"
    check_source(where, collection)
    mine = collection.methods()
    if not isinstance(methods, Mapping):
        raise ValueError(f"{where}: methods must be a mapping by table name, got {type(methods).__name__}")
    unknown = sorted(set(methods) - set(mine), key=str)
    if unknown:
        raise ValueError(f"{where}: methods must be of tables {sorted(mine)}, got {unknown}")
    changed = {name: method for name, method in methods.items() if method != mine[name]}
    for name, method in changed.items():
        if not isinstance(method, MethodConfig) or method.dequantized() != mine[name]:
            raise ValueError(
                f"{where}: table {name!r}: its method must differ from {mine[name]} in the dtypes of codebooks and hot "
                f"rows alone, got {method!r}; pass methods() of what was dequantized"
            )
    for table in collection.table_configs():
        if table.name in changed:
            changed[table.name].check(table)
    return stored_by(collection, changed)


def stored_by(collection: Compressed, methods: Mapping[str, MethodConfig]) -> Compressed:
    """Return a copy of a collection with some tables stored by other methods."""
    changed, before = {}, collection.methods()
    for table in collection.table_configs():
        if table.name in methods:
            other = methods[table.name]
            state = before[table.name].stored_as(table, collection.table_state(table.name), other)
            changed[table.name] = Stored(table, other, state)
    return rebuilt(collection, changed)
