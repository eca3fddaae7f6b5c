"""The look-up of codes: in whole code tables, or gathered by the exchange between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import process_pooled_embeddings, reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.code_tables import CodeTable
from torchrec_compress.ops import BagLookup, IdBags, Span, check_filled, codebook_bags, lookup_codes, low_bit_bag

Codes = CodeTable | Tensor

# unpooled rows of one call, 8 MiB: the backward puts the gradients of a call's look-ups together in one tensor, which
# costs more than a call where they are large
_CALL_VALUES = 2**21


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
        codes: of every look-up, a whole code table, or (L, row_size) codes of its ids.
        codebooks: of every table that `lookups` name.
        hot_rows: of every table, (H, D) floats or (H, bytes per row) low-bit rows, or None.
        is_weighted: whether the batch's weights are factors.

    Returns:
        (B, sum of widths), float32; with variable batch sizes the batch's inverse indices are applied.

    Raises:
        ValueError: as `ops.codebook_bags`.
        RuntimeError: a code table was never filled.
    """
    spans, tables = _find(features, lookups, codes)
    weights = features.weights() if is_weighted else None
    is_flat = features.variable_stride_per_key()
    batch = IdBags(features.values(), features.offsets(), weights, is_flat)
    pooled = codebook_bags(lookups, spans, tables, codebooks, hot_rows, batch)
    inverse = features.inverse_indices_or_none()
    if not is_flat and inverse is None:
        return pooled
    widths = _widths(lookups, tables, codebooks)
    parts = _unflatten(pooled, widths, spans) if is_flat else list(pooled.split(widths, dim=1))
    order = reorder_inverse_indices(inverse_indices=inverse, feature_names=[lookup.feature for lookup in lookups])
    return process_pooled_embeddings(pooled_embeddings=parts, inverse_indices=order)


def unpooled_codes(
    features: KeyedJaggedTensor,
    lookups: Sequence[BagLookup],
    codes: Sequence[Codes],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return the rows of the ids of every look-up of codes, (L, D) each, as many look-ups in a call as pay.

    They are cast to `dtype`, if any, behind each call: gradients of codewords are added up in the codewords' own type.
    The other arguments, and errors, are as in `pool_codes`.
    """
    found, tables = _find(features, lookups, codes)
    # a bag per id
    spans = [span._replace(first_bag=span.first_id, num_bags=span.num_ids) for span in found]
    widths = _widths(lookups, tables, codebooks)
    calls = _calls(spans, widths)
    if len(calls) == 1:
        flat = codebook_bags(lookups, spans, tables, codebooks, hot_rows, IdBags(features.values(), is_flat=True))
        return _unflatten(flat.to(dtype or flat.dtype), widths, spans)
    rows = []
    for call in calls:
        used = sorted({lookup.table for lookup in lookups[call]})
        first = min(span.first_id for span in spans[call])
        last = max(span.first_id + span.num_ids for span in spans[call])
        flat = codebook_bags(
            [lookup._replace(table=used.index(lookup.table)) for lookup in lookups[call]],
            [span._replace(first_bag=span.first_bag - first, first_id=span.first_id - first) for span in spans[call]],
            tables[call],
            [codebooks[table] for table in used],
            [hot_rows[table] for table in used],
            IdBags(features.values()[first:last], is_flat=True),
        )
        rows += _unflatten(flat.to(dtype or flat.dtype), widths[call], spans[call])
    return rows


def _calls(spans: Sequence[Span], widths: Sequence[int]) -> list[slice]:
    """Return which look-ups share a call: neighbours up to `_CALL_VALUES` values, but always at least one."""
    if torch.compiler.is_compiling():  # a graph shall not depend on sizes
        return [slice(0, len(spans))]
    calls, first, values = [], 0, 0
    for number, (span, width) in enumerate(zip(spans, widths, strict=True)):
        mine = span.num_ids * width
        if number > first and values + mine > _CALL_VALUES:
            calls.append(slice(first, number))
            first, values = number, 0
        values += mine
    return [*calls, slice(first, len(spans))]


def _find(
    features: KeyedJaggedTensor, lookups: Sequence[BagLookup], codes: Sequence[Codes]
) -> tuple[list[Span], list[Tensor]]:
    """Return where each look-up is in the batch, and its codes: a whole table, or those of its ids."""
    by_feature = feature_spans(features)
    spans, tables = [], []
    for found, lookup in zip(codes, lookups, strict=True):
        span = by_feature[lookup.feature]
        if isinstance(found, CodeTable):
            check_filled(found.is_set, lookup.where)
            tables.append(found.codes)
            spans.append(span)
        else:
            tables.append(found)
            spans.append(span._replace(is_gathered=True))
    return spans, tables


def _widths(lookups: Sequence[BagLookup], tables: Sequence[Tensor], codebooks: Sequence[Tensor]) -> list[int]:
    """Return the columns of every look-up."""
    return [
        codebooks[lookup.table].shape[1]
        * (1 if lookup.structure == "residual" else lookup.num_packed or table.shape[1])
        for lookup, table in zip(lookups, tables, strict=True)
    ]


def _unflatten(flat: Tensor, widths: Sequence[int], spans: Sequence[Span]) -> list[Tensor]:
    """Return the (B, D) of every look-up in a flat output."""
    if len(widths) == 1:  # not a part of it, whose gradient would be copied
        return [flat.view(-1, widths[0])]
    sizes = [width * span.num_bags for width, span in zip(widths, spans, strict=True)]
    return [part.view(-1, width) for part, width in zip(flat.split(sizes), widths, strict=True)]


def row_codes(codes: Codes, ids: Tensor, where: str) -> Tensor:
    """Return the codes of ids, (L, row_size); those that were gathered before are handed through.

    Raises:
        ValueError: an id is out of range.
        RuntimeError: the code table was never filled.
    """
    return lookup_codes(codes.codes, codes.is_set, ids, where) if isinstance(codes, CodeTable) else codes


def pool_low_bit(
    codes: Codes,
    dtype: Literal["int8", "int4"],
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    where: str,
) -> Tensor:
    """Return the sums of low-bit rows over bags, (B, D) float32; arguments as in `ops.low_bit_bag`.

    Raises:
        ValueError: as `ops.low_bit_bag`.
        RuntimeError: the code table was never filled.
    """
    if not isinstance(codes, CodeTable):
        return low_bit_bag(codes, dtype, offsets, weights=weights, where=where)
    check_filled(codes.is_set, where)
    return low_bit_bag(codes.codes, dtype, offsets, weights=weights, ids=ids, where=where)
