"""The look-up of codes in codebooks, pooled into bags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_compress.ops.checks import check_inputs
from torchrec_compress.ops.codebooks import unpack_codes
from torchrec_compress.ops.cpp.lookup import cpp_codebook_bags, is_cpp_input
from torchrec_compress.ops.dispatch import cpp_serves, fbgemm_serves, gpu_tier
from torchrec_compress.ops.fbgemm import FLOATS, fbgemm_codebook_bags
from torchrec_compress.ops.gpu.lookup import is_gpu_input, pool_on_gpu
from torchrec_compress.ops.ids import check_ids, gather_rows
from torchrec_compress.ops.lowbit import dequantize_rows, low_bit_dtype
from torchrec_compress.ops.pooling import as_factors
from torchrec_compress.ops.reference import reference_codebook_bags
from torchrec_compress.ops.types import BagLookup, IdBags, Span, Structure


def codebook_bags(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
    backend: str | None = None,
) -> Tensor:
    """Pool the rows that codes stand for, all look-ups of a collection in one call.

    Tensors may be views of any strides: a copy is made of what does not lie in one piece. Nothing of size (L, D) is
    made, forward or backward. `tiers` says what serves; the C++ kernels (uint8, int16 and int32 codes, float32,
    bfloat16 and float16 codebooks, CPU) sum in float32, with the same bits for any number of threads, and keep the
    codes that they met, (L, M), for the backward: ids are followed once per step. The kernels of a GPU sum in float32
    and follow ids again in the backward. Packed codes and low-bit hot rows are read by the C++ kernels where they lie;
    before all others the codes of the batch are unpacked, (L, M) uint8, and the hot rows of a table become floats as a
    whole.

    Args:
        lookups: what is looked up where, in the order of the output.
        spans: of every look-up, where it is in the batch.
        codes: of every look-up, (N, M) code table or (its ids, M) gathered codes; integer, in [0, K). Packed ones are
            (N, ceil(M / 2)) or (its ids, ceil(M / 2)) uint8, with K at most 16.
        codebooks: of every table, (M * K, D / M) for "product" (a row is the M codewords side by side) or (M * K, D)
            for "residual" (a row is their sum); floating point, of one dtype.
        hot_rows: of every table, (H, D) rows reached by escape codes (see `hot_row_codes`), or None. Floating point, or
            (H, bytes per row) uint8 as `quantize_rows` makes them: D + 4 bytes are int8, D / 2 + 4 are int4.
        batch: ids, bags and weights.
        backend: what is to serve, see `requested_backend`.

    Returns:
        (B, sum of D), look-ups side by side; or flat, (sum of B D,), one (B, D) after another. The dtype of
        `codebooks`; an empty bag is zeros. Differentiable in codebooks, float hot_rows and weights.

    Raises:
        ValueError: types, devices or shapes do not fit; an id is out of range, offsets decrease or do not run from 0 to
            L (CPU); or, from the kernels, a code is out of range. On a GPU such values are device-side assertions.
        RuntimeError: from FBGEMM, a code is out of range; from the reference, one points behind the last codebook; or
            `backend` cannot be had.

    Example:
        >>> table, books = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8), torch.arange(4.0).view(4, 1)
        >>> lookup = BagLookup(0, "item", "table 'item', feature 'item'")
        >>> batch = IdBags(torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3]))
        >>> codebook_bags([lookup], [Span(0, 2, 0, 3)], [table], [books], [None], batch).tolist()
        [[1.0, 5.0], [1.0, 2.0]]
    """
    batch = _with_factors(batch, codebooks)
    if is_cpp_input(codes, codebooks, hot_rows, batch) and cpp_serves(backend):
        return cpp_codebook_bags(lookups, spans, codes, codebooks, hot_rows, batch)
    check_inputs(lookups, spans, codes, codebooks, hot_rows, batch)
    lookups, spans, codes = _unpacked(lookups, spans, codes, batch.ids)
    hot_rows = _float_hot_rows(lookups, codes, codebooks, hot_rows)
    if is_gpu_input(codes, codebooks, batch) and (tier := gpu_tier(backend)) != "torch":
        return pool_on_gpu(lookups, spans, codes, codebooks, hot_rows, batch, tier)
    for_fbgemm = _is_on_cpu(codebooks) and codebooks[0].dtype in FLOATS and fbgemm_serves(backend)
    pool = fbgemm_codebook_bags if for_fbgemm else reference_codebook_bags
    return pool(lookups, spans, codes, codebooks, hot_rows, batch)


def _with_factors(batch: IdBags, codebooks: Sequence[Tensor]) -> IdBags:
    """Return the batch with weights of a type that sums in the codebooks' one dtype take."""
    dtypes = {books.dtype for books in codebooks}
    if len(dtypes) > 1:
        raise ValueError(f"codebook_bag: codebooks must be of one dtype, got {sorted(map(str, dtypes))}")
    return batch if batch.weights is None else batch._replace(weights=as_factors(batch.weights, codebooks[0].dtype))


def _is_on_cpu(codebooks: Sequence[Tensor]) -> bool:
    return all(books.is_cpu for books in codebooks)


def _unpacked(
    lookups: Sequence[BagLookup], spans: Sequence[Span], codes: Sequence[Tensor], ids: Tensor | None
) -> tuple[list[BagLookup], list[Span], list[Tensor]]:
    """Return the look-ups with one code per integer: where codes are packed, those of the batch are gathered."""
    found = ([], [], [])
    for lookup, span, rows in zip(lookups, spans, codes, strict=True):
        if lookup.num_packed:
            if not span.is_gathered:
                assert ids is not None
                mine = check_ids(ids[span.first_id : span.first_id + span.num_ids], rows.shape[0], lookup.where)
                rows, span = gather_rows(rows, mine), span._replace(is_gathered=True)
            rows, lookup = unpack_codes(rows, lookup.num_packed), lookup._replace(num_packed=0)
        for part, value in zip(found, (lookup, span, rows), strict=True):
            part.append(value)
    return found


def _float_hot_rows(
    lookups: Sequence[BagLookup],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the hot rows of every table as floats, (H, D); `codes` have one code per integer."""
    found = list(hot_rows)
    for lookup, table in zip(lookups, codes, strict=True):
        rows, width = found[lookup.table], codebooks[lookup.table].shape[1]
        if rows is not None and rows.dtype == torch.uint8:
            dim = width * (table.shape[1] if lookup.structure == "product" else 1)
            found[lookup.table] = dequantize_rows(rows, low_bit_dtype(rows.shape[1], dim))
    return found


def codebook_bag(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    *,
    structure: Structure = "product",
    weights: Tensor | None = None,
    hot_rows: Tensor | None = None,
    ids: Tensor | None = None,
    where: str = "codebook_bag",
    num_packed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Sum, bag by bag, the rows of one table; everything not named here is as in `codebook_bags`.

    Args:
        codes: (L, M) of the ids, or with `ids` the (N, M) code table; integer, each in [0, K).
        codebooks: (M * K, D / M) for "product" or (M * K, D) for "residual"; floating point.
        offsets: (B + 1,) int32 or int64, from 0 up to L; bag b is the ids [offsets[b], offsets[b + 1]). None: every id
            is a bag of its own.
        structure: "product" or "residual".
        weights: (L,) per-id factors, or None.
        hot_rows: (H, D) or low-bit rows reached by escape codes, or None.
        ids: (L,) int32 or int64 rows of the code table, or None.
        where: names the look-up in errors.
        num_packed: M, where a byte of `codes` holds two codes; see `BagLookup`.
        backend: see `codebook_bags`.

    Returns:
        (B, D), dtype of `codebooks`; an empty bag is zeros. Differentiable in codebooks, float hot_rows and weights.

    Raises:
        ValueError: as `codebook_bags`.
        RuntimeError: as `codebook_bags`.

    Example:
        >>> codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
        >>> codebook_bag(codes, torch.arange(4.0).view(4, 1), torch.tensor([0, 2, 3])).tolist()
        [[1.0, 5.0], [1.0, 3.0]]
    """
    num_ids = (codes if ids is None else ids).shape[0]
    num_bags = num_ids if offsets is None else offsets.shape[0] - 1
    lookup, span = (
        BagLookup(0, "", where, structure, num_packed=num_packed),
        Span(0, num_bags, 0, num_ids, is_gathered=ids is None),
    )
    return codebook_bags([lookup], [span], [codes], [codebooks], [hot_rows], IdBags(ids, offsets, weights), backend)
