"""The plain meaning of `codebook_bags` in PyTorch: what kernels are tested against, and what serves without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.ops.codebooks import num_escape_codes
from torchrec_compress.ops.ids import check_ids, gather_rows
from torchrec_compress.ops.pooling import check_offsets, repeat_offsets
from torchrec_compress.ops.types import BagLookup, IdBags, Span, Structure

# sums codewords bag by bag: words (M, L) and their table, see `codewords`, offsets, weights, structure -> (B, D)
SumCodewords: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Structure], Tensor]"


def reference_codebook_bag(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    structure: Structure = "product",
    weights: Tensor | None = None,
    hot_rows: Tensor | None = None,
) -> Tensor:
    """Sum, bag by bag, the rows that codes stand for; shapes and dtypes as in `codebook_bag`, on any device.

    Nothing of size (L, D) is made, but (M, L) codeword numbers are.

    Raises:
        ValueError: offsets decrease or do not run from 0 to L (CPU).
        RuntimeError: a code points behind the last codebook. Other codes out of range are not looked for: each look-up
            would pay for it.

    Example:
        >>> codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
        >>> reference_codebook_bag(codes, torch.arange(4.0).view(4, 1), torch.tensor([0, 2, 3])).tolist()
        [[1.0, 5.0], [1.0, 3.0]]
    """
    words, table = codewords(codes, codebooks, hot_rows, structure)
    return _sum_codewords(words, table, offsets, weights, structure)


def reference_codebook_bags(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> Tensor:
    """Pool look-up after look-up; arguments and errors as in `codebook_bags`, on any device."""
    return pool_each(_sum_codewords, lookups, spans, codes, codebooks, hot_rows, batch)


def pool_each(
    sum_codewords: SumCodewords,
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> Tensor:
    """Pool look-up after look-up by a given sum; the other arguments, and errors, as in `codebook_bags`."""
    ids, offsets, weights, is_flat = batch
    pooled = []
    for lookup, span, rows in zip(lookups, spans, codes, strict=True):
        first, last = span.first_id, span.first_id + span.num_ids
        if not span.is_gathered:
            assert ids is not None  # see check_inputs
            mine = ids[first:last]
            check_ids(mine, rows.shape[0], lookup.where)
            rows = gather_rows(rows, mine)
        of_bags = None
        if offsets is not None:
            of_bags = offsets[span.first_bag : span.first_bag + span.num_bags + 1]
            of_bags = of_bags - first if span.first_bag else of_bags
        factors = None if weights is None else weights[first:last]
        words, table = codewords(rows, codebooks[lookup.table], hot_rows[lookup.table], lookup.structure)
        sums = sum_codewords(words, table, of_bags, factors, lookup.structure)
        if lookup.is_mean and of_bags is not None:
            sums = sums / (of_bags[1:] - of_bags[:-1]).clamp(min=1).unsqueeze(1)
        pooled.append(sums)
    return torch.cat([sums.reshape(-1) for sums in pooled]) if is_flat else torch.cat(pooled, dim=1)


def codewords(codes: Tensor, codebooks: Tensor, hot_rows: Tensor | None, structure: Structure) -> tuple[Tensor, Tensor]:
    """Return the codewords that ids are made of; arguments as in `codebook_bag`.

    Codebooks and hot rows become one table of short vectors, so that coded and hot ids share one look-up. For
    "product" it is M tables of equal size, one after another: codebook m, then the m-th chunks of the hot rows.

    Returns:
        (M, L) int32 or int64 numbers of codewords, for "product" within table m, for "residual" in the one table; and
        the table, (M * (K + H), D / M) for "product", (M * K, D), with hot rows (M * K + H + 1, D), for "residual".
    """
    num_codes = codes.shape[1]
    codebook_size = codebooks.shape[0] // num_codes
    # (M, L); "residual" is read id by id, and stays in that order in memory
    words = codes.to(_number_dtype(codes, codebooks, hot_rows)).t()
    words = words.contiguous() if structure == "product" else words
    if hot_rows is None:
        return (words, codebooks) if structure == "product" else (words + _starts(words, codebook_size), codebooks)
    num_hot, width = hot_rows.shape[0], codebooks.shape[1]
    is_hot, number = _hot_row_numbers(words, codebook_size, num_hot)
    hot_rows = hot_rows.to(codebooks.dtype)
    if structure == "product":
        chunks = hot_rows.reshape(num_hot, num_codes, width).transpose(0, 1)
        table = torch.cat([codebooks.reshape(num_codes, codebook_size, width), chunks], dim=1)
        return torch.where(is_hot, codebook_size + number, words), table.view(-1, width)
    # the first codeword is the hot row, all others are one row of zeros
    end = codebooks.shape[0]
    hot_words = torch.where(_starts(words, 1) == 0, end + number, end + num_hot)
    table = torch.cat([codebooks, hot_rows, codebooks.new_zeros(1, width)])
    return torch.where(is_hot, hot_words, words + _starts(words, codebook_size)), table


def _number_dtype(codes: Tensor, codebooks: Tensor, hot_rows: Tensor | None) -> torch.dtype:
    """Return int32 where every number and position fits: half the memory, and faster than int64 on a CPU."""
    # in a compiled graph the comparison would become a bound on the batch
    if torch.compiler.is_compiling() or codes.device.type != "cpu" or codes.element_size() > 4:
        return torch.int64
    num_hot = 0 if hot_rows is None else hot_rows.shape[0]
    num_codes = codes.shape[1]
    largest = max(codebooks.shape[0] + num_codes * num_hot, codes.numel())
    return torch.int32 if largest < 2**31 else torch.int64


def _starts(words: Tensor, size: int) -> Tensor:
    """Return where each of M tables of one size starts, (M, 1), to be added to (M, L) numbers."""
    return torch.arange(words.shape[0], dtype=words.dtype, device=words.device).unsqueeze(1) * size


def _sum_codewords(
    words: Tensor, table: Tensor, offsets: Tensor | None, weights: Tensor | None, structure: Structure
) -> Tensor:
    num_codes, num_ids = words.shape
    if offsets is None:
        offsets = torch.arange(num_ids + 1, device=words.device)
    else:
        check_offsets(offsets, num_ids)
    offsets = offsets.to(words.dtype)
    weights = None if weights is None else weights.to(table.dtype)
    if structure == "residual":
        # a bag of L ids is a bag of L * M codewords
        factors = None if weights is None else weights.repeat_interleave(num_codes)
        return _bag_sum(words.t().reshape(-1), table, offsets * num_codes, factors)
    words = words + _starts(words, table.shape[0] // num_codes)
    factors = None if weights is None else weights.repeat(num_codes)
    parts = _bag_sum(words.reshape(-1), table, repeat_offsets(offsets, num_codes, num_ids), factors)
    # (M * B, D / M) -> (B, D)
    num_bags, width = offsets.shape[0] - 1, table.shape[1]
    return parts.view(num_codes, num_bags, width).transpose(0, 1).reshape(num_bags, num_codes * width)


def _hot_row_numbers(codes: Tensor, codebook_size: int, num_hot: int) -> tuple[Tensor, Tensor]:
    """Return which ids are hot, (L,) bool, and the row each escape code points at, (L,), of (M, L) codes."""
    first_size = codebook_size - num_escape_codes(num_hot, codes.shape[0], codebook_size)
    number = codes[0] - first_size
    for digit in codes[1:]:
        # may overflow where the id is not hot; nobody reads it there
        number = number * codebook_size + digit
    return codes[0] >= first_size, number


def _bag_sum(indices: Tensor, table: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True)
