"""The vocabulary of codes: their types, and the escape codes that stand for hot rows."""

from __future__ import annotations

import torch
from torch import Tensor


def code_dtype(codebook_size: int) -> torch.dtype:
    """Return the smallest integer dtype that holds codes in [0, codebook_size).

    Example:
        >>> code_dtype(256), code_dtype(1024)
        (torch.uint8, torch.int16)
    """
    if codebook_size <= 256:
        return torch.uint8
    return torch.int16 if codebook_size <= 32768 else torch.int32


def is_packed(codebook_size: int) -> bool:
    """Return whether two codes share a byte: where there are at most 16 codewords.

    Example:
        >>> is_packed(16), is_packed(17)
        (True, False)
    """
    return codebook_size <= 16


def packed_width(num_codes: int) -> int:
    """Return the bytes that a row of packed codes takes.

    Example:
        >>> packed_width(4), packed_width(5)
        (2, 3)
    """
    return -(-num_codes // 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Put two codes into a byte, the first into its low half; behind an odd number of codes a half stays zero.

    Args:
        codes: (L, M) integer, each in [0, 16).

    Returns:
        (L, ceil(M / 2)) uint8.

    Raises:
        ValueError: a code is out of range.

    Example:
        >>> pack_codes(torch.tensor([[1, 2, 3]])).tolist()
        [[33, 3]]
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 16:
        raise ValueError(
            f"pack_codes: every code must be in [0, 16), got {int(codes.min())} to {int(codes.max())}; give them as "
            "the fit made them, one code per integer"
        )
    low, high = codes[:, ::2].to(torch.uint8, copy=True), codes[:, 1::2].to(torch.uint8)
    low[:, : high.shape[1]] |= high << 4
    return low


def unpack_codes(packed: Tensor, num_codes: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: (L, ceil(M / 2)) uint8.
        num_codes: codes per row, M.

    Returns:
        (L, M) uint8.

    Example:
        >>> unpack_codes(torch.tensor([[33, 3]], dtype=torch.uint8), 3).tolist()
        [[1, 2, 3]]
    """
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :num_codes]


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
    return -(-num_hot_rows // codebook_size ** (num_codes - 1))
