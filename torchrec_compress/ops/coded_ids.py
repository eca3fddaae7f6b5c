"""Which ids have a row of codes of their own, in 1.25 bits an id, and the number of that row.

A bit an id and, every 128 ids, how many bits are set before them: a rank index (Jacobson, "Space-efficient static trees
and graphs", 1989).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrec_compress.ops.checks import INDICES
from torchrec_compress.ops.cpp.coded_ids import cpp_coded_rows
from torchrec_compress.ops.dispatch import cpp_serves

_BLOCK, _WORDS, _BITS = 128, 4, 32  # ids of a block, in words of so many bits; a fifth word counts
_WORD_BYTES = 4
_AT_ONCE = 2**11  # blocks of which an index is made together: bits are int64 meanwhile


def coded_ids_shape(num_ids: int) -> tuple[int, int]:
    """Return the shape of the index of so many ids.

    Example:
        >>> coded_ids_shape(1000)
        (8, 20)
    """
    return -(-num_ids // _BLOCK), (_WORDS + 1) * _WORD_BYTES


def coded_ids_bytes(num_ids: int) -> int:
    """Return the bytes of the index of so many ids.

    Example:
        >>> coded_ids_bytes(1024)
        160
    """
    return math.prod(coded_ids_shape(num_ids))


def index_coded_ids(is_coded: Tensor) -> Tensor:
    """Return the index of the ids that have a row of their own.

    Args:
        is_coded: (N,) bool.

    Returns:
        (N / 128, 20) uint8: of each 128 ids four words of 32 bits, the lowest first, and how many are set before them.

    Raises:
        ValueError: 2**31 ids or more have a row.

    Example:
        >>> index_coded_ids(torch.tensor([True, False, True])).view(torch.int32)
        tensor([[5, 0, 0, 0, 0]], dtype=torch.int32)
    """
    total = int(is_coded.count_nonzero())  # a sum would make int64 of all
    if total >= 2**31:
        raise ValueError(f"coded ids: must be fewer than 2**31, got {total}; code all ids, or fewer")
    found = torch.empty(coded_ids_shape(len(is_coded)), dtype=torch.uint8, device=is_coded.device)
    before = 0
    for some, mine in zip(is_coded.split(_BLOCK * _AT_ONCE), found.split(_AT_ONCE), strict=True):
        blocks = len(mine)
        bits = torch.zeros(blocks * _BLOCK, dtype=torch.int64, device=some.device)
        bits[: len(some)] = some
        words = (bits.view(blocks, _WORDS, _BITS) << torch.arange(_BITS, device=bits.device)).sum(dim=2)
        counts = bits.view(blocks, _BLOCK).sum(dim=1)
        starts = (before + counts.cumsum(0) - counts).unsqueeze(1)
        signed = torch.where(words < 2**31, words, words - 2**32)  # the same bits
        mine.copy_(torch.cat([signed, starts], dim=1).to(torch.int32).view(torch.uint8))
        before += int(counts.sum())
    return found


def coded_rows(index: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of codes that ids have: 0, which they share, or one of their own from 1 on, in their order.

    Args:
        index: (N / 128, 20) uint8, of `index_coded_ids`.
        ids: (L,) int32 or int64 in [0, N).

    Returns:
        (L,) int64.

    Raises:
        ValueError: an id is beyond the index (C++); index or ids are of another type.

    Example:
        >>> coded_rows(index_coded_ids(torch.tensor([True, False, True])), torch.tensor([0, 1, 2]))
        tensor([1, 0, 2])
    """
    if index.device.type == "cpu" and ids.dtype in INDICES and cpp_serves():
        return cpp_coded_rows(index, ids)
    block = torch.div(ids, _BLOCK, rounding_mode="floor")
    place = (ids - block * _BLOCK).long()
    found = index.index_select(0, block).view(torch.int32).long()
    words = found[:, :_WORDS] & 0xFFFFFFFF
    starts = torch.arange(0, _BLOCK, _BITS, device=ids.device)
    seen = (place.unsqueeze(1) - starts).clamp(0, _BITS)  # bits of each word that come before the id
    rank = found[:, _WORDS] + _set_bits(words & ((1 << seen) - 1)).sum(dim=1)
    own = (words.gather(1, (place // _BITS).unsqueeze(1)).squeeze(1) >> (place % _BITS)) & 1
    return (rank + 1) * own


def _set_bits(words: Tensor) -> Tensor:
    """Return how many bits are set of each word of 32 bits, given as int64."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF
