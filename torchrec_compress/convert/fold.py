"""Serve without projections: multiply them into codebooks, or into the linear layer that reads the embeddings."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_compress.convert.rebuild import Compressed, Stored, check_compressed, check_source, rebuilt
from torchrec_compress.methods.base import NO_PROJECTION
from torchrec_compress.methods.width import narrowed
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.names import kind_of

logger = logging.getLogger(__name__)


def why_unfolded(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, *, in_float32: bool = False
) -> dict[str, str]:
    """Return why `fold_projections` would leave tables as they are, by name; those that it folds are not in it.

    Args:
        collection: any compressed collection, sharded too.
        in_float32: as for `fold_projections`.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import Int8Config
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=8, feature_names=["user"])
        >>> why_unfolded(CompressedEmbeddingBagCollection([table], compression=Int8Config()))
        {'user': 'it has no projection'}
    """
    check_compressed("why_unfolded", collection)
    reasons = {
        table.name: collection.methods()[table.name].why_unfolded(table, in_float32)
        for table in collection.table_configs()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


@torch.no_grad()
def fold_projections(
    collection: Compressed, tables: Collection[str] | None = None, *, in_float32: bool = False
) -> Compressed:
    """Multiply the projections of codes of a `width` into their codebooks and float hot rows.

    Codes stay bit for bit. Codewords become D numbers that add up to a row, also where they lay side by side, so a
    product code of a width is served as a residual one (of `mec`: by the name `pq`). Nothing follows the pooling, but
    it sums D numbers in place of r, and codebooks take D / r times the bytes (M D / r, where they lay side by side).

    Args:
        collection: unsharded; untouched, and nothing of it is shared with the result.
        tables: to fold; None: all that can be, and what keeps its projection is logged with the reason
            (`convert.why_unfolded`).
        in_float32: whether codebooks and hot rows in int8 or int4, which would be rounded once more, become float32.

    Returns:
        A collection of the same kind, keys and widths, whose outputs are the same up to the rounding of float32.

    Raises:
        ValueError: `collection` is no compressed collection of values in float32, or is sharded; `tables` name an
            unknown table or one that cannot be folded; there is none that can.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import RandomCodesConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=9000, embedding_dim=16, feature_names=["user"])
        >>> narrow = RandomCodesConfig(num_codes=2, codebook_size=16, width=4)
        >>> served = fold_projections(CompressedEmbeddingBagCollection([table], compression=narrow))
        >>> served.methods()["user"].width is None, served.methods()["user"].structure
        (True, 'residual')
    """
    where = "fold_projections"
    check_source(where, collection)
    reasons = why_unfolded(collection, in_float32=in_float32)
    names = _chosen(where, collection, tables, reasons)
    if tables is None:
        for table in collection.table_configs():
            if table.name in reasons and collection.methods()[table.name].projected_width(table) is not None:
                logger.warning("table %r keeps its projection: %s", table.name, reasons[table.name])
    changed = {}
    for table in collection.table_configs():
        if table.name in names:
            state = collection.table_state(table.name)
            changed[table.name] = Stored(table, *collection.methods()[table.name].folded(table, state))
    return rebuilt(collection, changed)


@torch.no_grad()
def fold_into_linear(
    collection: CompressedEmbeddingBagCollection,
    linear: nn.Linear,
    inputs: Sequence[str | int] | None = None,
    *,
    tables: Collection[str] | None = None,
) -> tuple[CompressedEmbeddingBagCollection, nn.Linear]:
    """Multiply projections into the linear layer that reads the embeddings side by side.

    W [x, z P] = W_x x + (W_z P^T) z, so a table that projects r numbers (`narrow`, codes or rows of a `width`) returns
    just these, and the layer has r columns for each of its keys in place of D. Rows, codes and codebooks stay bit for
    bit.
    Only for embeddings that nothing but this layer reads: a dot product or a cross layer wants all D numbers.

    Args:
        collection: pooled, unsharded; untouched, and nothing of it is shared with the result.
        linear: a plain `nn.Linear`, of any floating-point dtype; untouched.
        inputs: what it reads, in order: keys of the collection's output, and numbers of other columns, such as dense
            features. None: the output as it is, `collection(batch).values()`.
        tables: whose projections to fold; None: all that have one. Each of their keys must be read.

    Returns:
        The collection, where those tables have `embedding_dim` r, and the layer that reads it in the same order. Its
        output is the same up to rounding. `footprint()` compares with dense tables of r numbers from then on.

    Raises:
        ValueError: `collection` is no pooled compressed collection of values in float32, or is sharded; `linear` is
            another module, or has other in_features than the inputs make; `inputs` name an unknown key, or lack one of
            a folded table; `tables` name an unknown table or one without a projection; there is none with one.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import NarrowConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=64, feature_names=["user"])
        >>> embeddings = CompressedEmbeddingBagCollection([table], compression=NarrowConfig(width=8))
        >>> served, first = fold_into_linear(embeddings, nn.Linear(13 + 64, 32), inputs=[13, "user"])
        >>> served.embedding_bag_configs()[0].embedding_dim, first.in_features
        (8, 21)
    """
    where = "fold_into_linear"
    check_source(where, collection)
    if not isinstance(collection, CompressedEmbeddingBagCollection):
        raise ValueError(f"{where}: collection must be pooled, got {kind_of(collection)}")
    configs, methods = {table.name: table for table in collection.table_configs()}, collection.methods()
    widths = {name: methods[name].projected_width(table) for name, table in configs.items()}
    names = _chosen(where, collection, tables, {name: NO_PROJECTION for name in widths if not widths[name]})
    read = _read(collection, inputs, names)
    _check_linear(linear, read)
    states = {name: collection.table_state(name) for name in names}
    layer = _folded_layer(linear, read, {name: states[name].decoder["projection"] for name in names})
    changed = {}
    for name in names:
        method, state = methods[name].unprojected(configs[name], states[name])
        changed[name] = Stored(narrowed(configs[name], widths[name] or 0), method, state)
    return rebuilt(collection, changed), layer


def _chosen(
    where: str,
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    tables: Collection[str] | None,
    reasons: dict[str, str],
) -> list[str]:
    """Return the names of the tables to fold, in the collection's order.

    Args:
        where: the caller.
        collection: whose tables they are.
        tables: asked for, or None.
        reasons: why a table cannot be folded.
    """
    known = [table.name for table in collection.table_configs()]
    if tables is not None:
        if isinstance(tables, str) or not set(tables) <= set(known):
            raise ValueError(f"{where}: tables must be a list of names of {known}, got {tables!r}")
        for name in tables:
            if name in reasons:
                raise ValueError(f"{where}: table {name!r} cannot be folded: {reasons[name]}; leave it out of tables")
    found = [name for name in known if name not in reasons and (tables is None or name in tables)]
    if not found:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items()) if tables is None else "tables=[]"
        raise ValueError(f"{where}: at least one table must have a projection to fold, got none ({told})")
    return found


class _Read(NamedTuple):
    """Columns that the layer reads: of an output of the collection, or of something else, whose table is None."""

    width: int
    table: str | None


def _read(
    collection: CompressedEmbeddingBagCollection, inputs: Sequence[str | int] | None, names: Collection[str]
) -> list[_Read]:
    """Return what the layer reads, or raise ValueError where that is unknown, or lacks a key of the tables `names`."""
    where, owners = "fold_into_linear", {lookup.output: lookup.table for lookup in collection.blueprint.lookups}
    wanted = [*owners] if inputs is None else list(inputs)
    found = []
    for item in wanted:
        if isinstance(item, str) and item in owners:
            found.append(_Read(owners[item].embedding_dim, owners[item].name))
        elif isinstance(item, int) and not isinstance(item, bool) and item > 0:
            found.append(_Read(item, None))
        else:
            raise ValueError(
                f"{where}: inputs must be keys of {[*owners]} and numbers of other columns, above 0, got {item!r}"
            )
    unread = [key for key, table in owners.items() if table.name in names and key not in wanted]
    if unread:
        raise ValueError(
            f"{where}: inputs must have every key of a table that is folded, got none of {unread}; what else reads "
            "them wants the whole embedding: leave their tables out of tables=[...]"
        )
    return found


def _check_linear(linear: nn.Linear, read: list[_Read]) -> None:
    """Raise ValueError for anything but a plain linear layer of these inputs."""
    where, widths = "fold_into_linear", [item.width for item in read]
    if type(linear) is not nn.Linear or "weight" not in dict(linear.named_parameters()):
        raise ValueError(
            f"{where}: linear must be a plain torch.nn.Linear, got {kind_of(linear, nn.Linear)}; fold before it is "
            "parametrised, quantised or wrapped"
        )
    if linear.weight.is_meta:
        raise ValueError(f"{where}: linear must hold values, got it on the meta device; load a checkpoint first")
    if linear.in_features != sum(widths):
        raise ValueError(
            f"{where}: linear must have in_features {sum(widths)}, of inputs of the widths {widths}, got "
            f"{linear.in_features}; name what it reads by inputs=[...]"
        )


def _folded_layer(linear: nn.Linear, read: list[_Read], projections: dict[str, Tensor]) -> nn.Linear:
    """Return the layer that reads what is left of the tables in `projections`, (r, D) by table name."""
    columns, old = [], linear.weight.detach()
    for item, block in zip(read, old.double().split([item.width for item in read], dim=1), strict=True):
        projection = None if item.table is None else projections.get(item.table)
        columns.append(block if projection is None else block @ projection.detach().to(block).T)
    weight, has_bias = torch.cat(columns, dim=1), linear.bias is not None
    with torch.inference_mode(False), torch.no_grad():
        layer = nn.Linear(weight.shape[1], linear.out_features, has_bias, device=old.device, dtype=old.dtype)
        layer.weight.copy_(weight)
        if has_bias:
            layer.bias.copy_(linear.bias)
    return layer.train(linear.training)
