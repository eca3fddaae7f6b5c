"""The look-up of codes: in whole code tables, or gathered by the exchange between ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchrec.modules.embedding_modules import process_pooled_embeddings, reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.tables import CodeTable
from torchrec_compress.ops import BagLookup, IdBags, Span, check_filled, codebook_bag, codebook_bags, lookup_codes
from torchrec_compress.ops.codebooks import Structure

Codes = CodeTable | Tensor


def feature_spans(features: KeyedJaggedTensor) -> dict[str, Span]:
    """Return where the bags and ids of every feature are in a batch."""
    strides = features.stride_per_key()
    if features.lengths().numel() == 0:  # TorchRec cannot count the ids of no bags
        return dict.fromkeys(features.keys(), Span(0, 0, 0, 0))
    counts = features.length_per_key()
    spans, bag, first = {}, 0, 0
    for key, num_bags, num_ids in zip(features.keys(), strides, counts, strict=True):
        spans[key] = Span(bag, num_bags, first, num_ids)
        bag, first = bag + num_bags, first + num_ids
    return spans


def pool_codes(
    features: KeyedJaggedTensor,
    lookups: Sequence[BagLookup],
    codes: Sequence[Codes],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    is_weighted: bool,
) -> Tensor:
    """Pool all look-ups of codes in one call.

    Args:
        features: the batch.
        lookups: in the order of the output.
        codes: of every look-up, a whole code table, or (L, M) codes of its ids.
        codebooks: of every table that `lookups` name.
        hot_rows: of every table, (H, D) or None.
        is_weighted: whether the batch's weights are factors.

    Returns:
        (B, sum of widths), float32; with variable batch sizes the batch's inverse indices are applied.

    Raises:
        ValueError: as `ops.codebook_bags`.
        RuntimeError: a code table was never filled.
    """
    by_feature = feature_spans(features)
    spans, tables = [], []
    for found, lookup in zip(codes, lookups, strict=True):
        is_whole = isinstance(found, CodeTable)
        if is_whole:
            check_filled(found.is_set, lookup.where)
        tables.append(found.codes if is_whole else found)
        spans.append(by_feature[lookup.feature]._replace(is_gathered=not is_whole))
    weights = features.weights() if is_weighted else None
    is_flat = features.variable_stride_per_key()
    batch = IdBags(features.values(), features.offsets(), weights, is_flat)
    pooled = codebook_bags(lookups, spans, tables, codebooks, hot_rows, batch)
    inverse = features.inverse_indices_or_none()
    if not is_flat and inverse is None:
        return pooled
    widths = [
        codebooks[lookup.table].shape[1] * (1 if lookup.structure == "residual" else table.shape[1])
        for lookup, table in zip(lookups, tables, strict=True)
    ]
    if is_flat:
        sizes = [width * span.num_bags for width, span in zip(widths, spans, strict=True)]
        parts = [part.view(-1, width) for part, width in zip(pooled.split(sizes), widths, strict=True)]
    else:
        parts = list(pooled.split(widths, dim=1))
    order = reorder_inverse_indices(inverse_indices=inverse, feature_names=[lookup.feature for lookup in lookups])
    return process_pooled_embeddings(pooled_embeddings=parts, inverse_indices=order)


def row_codes(codes: Codes, ids: Tensor, where: str) -> Tensor:
    """Return the codes of ids, (L, row_size); those that were gathered before are handed through.

    Raises:
        ValueError: an id is out of range.
        RuntimeError: the code table was never filled.
    """
    return lookup_codes(codes.codes, codes.is_set, ids, where) if isinstance(codes, CodeTable) else codes


def coded_rows(
    codes: Codes, ids: Tensor, codebooks: Tensor, hot_rows: Tensor | None, structure: Structure, where: str
) -> Tensor:
    """Return the rows of ids, (L, D); arguments as in `pool_codes`, of one look-up.

    Raises:
        ValueError: as `ops.codebook_bag`.
        RuntimeError: the code table was never filled.
    """
    if not isinstance(codes, CodeTable):
        return codebook_bag(codes, codebooks, None, structure=structure, hot_rows=hot_rows, where=where)
    check_filled(codes.is_set, where)
    return codebook_bag(codes.codes, codebooks, None, structure=structure, hot_rows=hot_rows, ids=ids, where=where)
