"""The plain meaning of `codebook_bags` in PyTorch: what kernels are tested against, and what serves without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.ops.codebooks import Structure, num_escape_codes
from torchrec_compress.ops.ids import check_ids, gather_rows

if TYPE_CHECKING:
    from torchrec_compress.ops.bags import BagLookup, IdBags, Span


def reference_codebook_bag(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    structure: Structure = "product",
    weights: Tensor | None = None,
    hot_rows: Tensor | None = None,
) -> Tensor:
    """Sum, bag by bag, the rows that codes stand for; shapes and dtypes as in `codebook_bag`, on any device.

    Codebooks and hot rows are read as one table of short vectors, so that coded and hot ids share one lookup. Nothing
    of size (L, D) is made, but (M, L) int64 codeword numbers are.

    Raises:
        ValueError: offsets decrease or do not run from 0 to L (CPU).
        RuntimeError: a code points behind the last codebook. Other codes out of range are not looked for: each look-up
            would pay for it.

    Example:
        >>> codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
        >>> reference_codebook_bag(codes, torch.arange(4.0).view(4, 1), torch.tensor([0, 2, 3])).tolist()
        [[1.0, 5.0], [1.0, 3.0]]
    """
    num_ids, num_codes = codes.shape
    codebook_size = codebooks.shape[0] // num_codes
    # (M, L): codeword numbers in the stacked codebooks
    words = codes.t().long()
    words = words + torch.arange(num_codes, device=codes.device).unsqueeze(1) * codebook_size
    if hot_rows is not None:
        words, codebooks = _add_hot_rows(codes.long(), words, codebooks, hot_rows, structure)
    if offsets is None:
        offsets = torch.arange(num_ids + 1, device=codes.device)
    else:
        check_offsets(offsets, num_ids)
    offsets = offsets.long()
    if weights is not None:
        weights = weights.to(codebooks.dtype)
    if structure == "residual":
        # a bag of L ids is a bag of L * M codewords
        flat, bag_offsets = words.t().reshape(-1), offsets * num_codes
        factors = None if weights is None else weights.repeat_interleave(num_codes)
        return _bag_sum(flat, codebooks, bag_offsets, factors)
    starts = torch.arange(num_codes, device=codes.device).unsqueeze(1) * num_ids
    bag_offsets = torch.cat([(offsets[:-1] + starts).reshape(-1), offsets.new_full((1,), num_codes * num_ids)])
    factors = None if weights is None else weights.repeat(num_codes)
    parts = _bag_sum(words.reshape(-1), codebooks, bag_offsets, factors)
    # (M * B, D / M) -> (B, D)
    num_bags, width = offsets.shape[0] - 1, codebooks.shape[1]
    return parts.view(num_codes, num_bags, width).transpose(0, 1).reshape(num_bags, num_codes * width)


def reference_codebook_bags(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> Tensor:
    """Pool look-up after look-up; arguments and errors as in `codebook_bags`, on any device."""
    ids, offsets, weights, is_flat = batch
    pooled = []
    for lookup, span, rows in zip(lookups, spans, codes, strict=True):
        first, last = span.first_id, span.first_id + span.num_ids
        if not span.is_gathered:
            assert ids is not None
            mine = ids[first:last]
            check_ids(mine, rows.shape[0], lookup.where)
            rows = gather_rows(rows, mine)
        of_bags = None
        if offsets is not None:
            of_bags = offsets[span.first_bag : span.first_bag + span.num_bags + 1]
            of_bags = of_bags - first if span.first_bag else of_bags
        factors = None if weights is None else weights[first:last]
        books, hot = codebooks[lookup.table], hot_rows[lookup.table]
        sums = reference_codebook_bag(rows, books, of_bags, lookup.structure, factors, hot)
        if lookup.is_mean and of_bags is not None:
            sums = sums / (of_bags[1:] - of_bags[:-1]).clamp(min=1).unsqueeze(1)
        pooled.append(sums)
    return torch.cat([sums.reshape(-1) for sums in pooled]) if is_flat else torch.cat(pooled, dim=1)


def check_offsets(offsets: Tensor, num_ids: int) -> None:
    """Raise where `F.embedding_bag` would return uninitialised memory: it takes decreasing offsets (torch 2.13)."""
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    if offsets.numel() == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != num_ids:
        ends = [] if offsets.numel() == 0 else [int(offsets[0]), int(offsets[-1])]
        raise ValueError(
            f"codebook_bag: offsets must start with 0 and end with the number of ids, {num_ids}, got {ends}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"codebook_bag: offsets must not decrease, got {offsets.tolist()[:20]}")


def _hot_row_numbers(codes: Tensor, codebook_size: int, first_size: int) -> tuple[Tensor, Tensor]:
    """Return which ids are hot, (L,) bool, and the row each escape code points at, (L,) int64."""
    is_hot = codes[:, 0] >= first_size
    number = codes[:, 0] - first_size
    for m in range(1, codes.shape[1]):
        number = number * codebook_size + codes[:, m]
    return is_hot, number


def _add_hot_rows(
    codes: Tensor, words: Tensor, codebooks: Tensor, hot_rows: Tensor, structure: Structure
) -> tuple[Tensor, Tensor]:
    """Append the hot rows to the codebooks and point the escape codes at them; shapes as in `codebook_bag`."""
    num_codes = codes.shape[1]
    codebook_size = codebooks.shape[0] // num_codes
    num_hot, end = hot_rows.shape[0], codebooks.shape[0]
    first_size = codebook_size - num_escape_codes(num_hot, num_codes, codebook_size)
    is_hot, number = _hot_row_numbers(codes, codebook_size, first_size)
    chunk = torch.arange(num_codes, device=codes.device).unsqueeze(1)
    if structure == "product":
        # hot row h is cut into its M chunks, at end + h * M + m
        hot_words = end + number * num_codes + chunk
        stacked = torch.cat([codebooks, hot_rows.reshape(num_hot * num_codes, -1).to(codebooks.dtype)])
    else:
        # the first codeword is the hot row, all others are one row of zeros
        hot_words = torch.where(chunk == 0, end + number, end + num_hot)
        zero = codebooks.new_zeros(1, codebooks.shape[1])
        stacked = torch.cat([codebooks, hot_rows.to(codebooks.dtype), zero])
    return torch.where(is_hot, hot_words, words), stacked


def _bag_sum(indices: Tensor, table: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True)
