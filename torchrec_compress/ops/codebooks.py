"""The lookup of codes in codebooks, pooled into bags."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Structure = Literal["product", "residual"]


def code_dtype(codebook_size: int) -> torch.dtype:
    """Return the smallest integer dtype that holds codes in [0, codebook_size).

    Example:
        >>> code_dtype(256), code_dtype(1024)
        (torch.uint8, torch.int16)
    """
    if codebook_size <= 256:
        return torch.uint8
    return torch.int16 if codebook_size <= 32768 else torch.int32


def hot_row_codes(num_hot_rows: int, num_codes: int, codebook_size: int) -> Tensor:
    """Return the codes that stand for hot rows: escape codes of the first codebook, then the row number in base K.

    A first code of `first_size` or more is an escape, where `first_size = K - ceil(num_hot_rows / K**(M-1))`.

    Args:
        num_hot_rows: rows stored apart, H.
        num_codes: codes per row, M.
        codebook_size: codewords per codebook, K.

    Returns:
        (H, M) int64.

    Example:
        >>> hot_row_codes(300, num_codes=2, codebook_size=256)[[0, 255, 256]].tolist()
        [[254, 0], [254, 255], [255, 0]]
    """
    digits, number = [], torch.arange(num_hot_rows)
    for _ in range(num_codes - 1):
        digits.append(number % codebook_size)
        number = number // codebook_size
    first = codebook_size - num_escape_codes(num_hot_rows, num_codes, codebook_size) + number
    return torch.stack([first, *reversed(digits)], dim=1)


def num_escape_codes(num_hot_rows: int, num_codes: int, codebook_size: int) -> int:
    """Return how many codes of the first codebook are escapes: ceil(H / K**(M-1)).

    Example:
        >>> num_escape_codes(1500, num_codes=2, codebook_size=256)
        6
    """
    return math.ceil(num_hot_rows / codebook_size ** (num_codes - 1))


def _hot_row_numbers(codes: Tensor, codebook_size: int, first_size: int) -> tuple[Tensor, Tensor]:
    """Return which ids are hot, (L,) bool, and the row each escape code points at, (L,) int64."""
    is_hot = codes[:, 0] >= first_size
    number = codes[:, 0] - first_size
    for m in range(1, codes.shape[1]):
        number = number * codebook_size + codes[:, m]
    return is_hot, number


def codebook_bag(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    *,
    structure: Structure = "product",
    weights: Tensor | None = None,
    hot_rows: Tensor | None = None,
) -> Tensor:
    """Sum, bag by bag, the rows that codes stand for.

    Codebooks and hot rows are read as one table of short vectors, so that coded and hot ids share one lookup. Nothing
    of size (L, D) is made.

    Args:
        codes: (L, M) integer, each in [0, K).
        codebooks: (M * K, D / M) for "product" (a row is the M codewords side by side) or (M * K, D) for "residual"
            (a row is their sum); floating point.
        offsets: (B + 1,) integer; bag b is codes[offsets[b]:offsets[b+1]]. None: every id is a bag of its own.
        structure: "product" or "residual".
        weights: (L,) per-id factors, or None.
        hot_rows: (H, D) rows reached by escape codes (see `hot_row_codes`), or None.

    Returns:
        (B, D), dtype of `codebooks`; an empty bag is zeros. Differentiable in codebooks, hot_rows and weights.

    Raises:
        RuntimeError: a code points behind the last codebook. Other codes out of range are not looked for: each look-up
            would pay for it.

    Example:
        >>> codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
        >>> codebook_bag(codes, torch.arange(4.0).view(4, 1), torch.tensor([0, 2, 3])).tolist()
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
