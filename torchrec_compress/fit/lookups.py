"""Which ids are looked up most often, found in blocks: tables of 10^8 ids have no room for copies of all counts.

Counts are finite and >= 0, of any real dtype; of ids with equal counts the first come first, on every machine.
"""

import torch
from torch import Tensor

BLOCK_IDS = 2**18  # counts that are looked at together
_DIGIT = 16  # bits of a key that one walk over all counts settles


def is_hottest(counts: Tensor, num_ids: int) -> Tensor:
    """Return whether each id is among the `num_ids` that are looked up most often.

    Args:
        counts: [N].
        num_ids: in [1, N].

    Returns:
        [N] bool.

    Example:
        >>> is_hottest(torch.tensor([2, 0, 5, 2]), 2)
        tensor([ True, False,  True, False])
    """
    least, left = _key_of_last(counts, num_ids)
    found = torch.empty(len(counts), dtype=torch.bool)
    for block, mine in zip(counts.split(BLOCK_IDS), found.split(BLOCK_IDS), strict=True):
        keys = _keys(block)
        torch.gt(keys, least, out=mine)
        equal = (keys == least).nonzero().flatten()[:left]
        mine[equal] = True
        left -= len(equal)
    return found


def by_lookups(counts: Tensor, num_ids: int) -> Tensor:
    """Return the `num_ids` ids that are looked up most often, the most often first.

    Args:
        counts: [N].
        num_ids: in [0, N].

    Returns:
        [num_ids] int64.

    Example:
        >>> by_lookups(torch.tensor([2, 0, 5, 2]), 3)
        tensor([2, 0, 3])
    """
    if not num_ids:
        return torch.empty(0, dtype=torch.int64)
    ids = is_hottest(counts, num_ids).nonzero().flatten()
    return ids[torch.argsort(counts[ids], descending=True, stable=True)]


def ranks_by_lookups(counts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many ids of a table come before each of some, in the order of `by_lookups`.

    Args:
        counts: [N].
        ids: [S] int64 distinct ones.

    Returns:
        [S] int64, ascending, and which of `ids` each is of, [S] int64.

    Example:
        >>> ranks_by_lookups(torch.tensor([2, 0, 5, 2]), torch.tensor([1, 3]))
        (tensor([2, 3]), tensor([1, 0]))
    """
    levels = _keys(counts[ids]).unique()

    def places(some: Tensor, keys: Tensor) -> Tensor:
        """Return numbers in that order: by the levels above, at a level before between two, then by id."""
        level = torch.searchsorted(levels, keys)
        is_at = levels[level.clamp(max=len(levels) - 1)] == keys
        return (2 * (len(levels) - level) - is_at.long()) * len(counts) + some

    mine, order = places(ids, _keys(counts[ids])).sort()
    before = torch.zeros(len(ids) + 1, dtype=torch.int64)
    for first in range(0, len(counts), BLOCK_IDS):
        keys = _keys(counts[first : first + BLOCK_IDS])
        found = places(torch.arange(first, first + len(keys)), keys)
        before += torch.bincount(torch.searchsorted(mine, found, right=True), minlength=len(before))
    return before.cumsum(0)[:-1], order


def _key_of_last(counts: Tensor, num_ids: int) -> tuple[int, int]:
    """Return the key of the last of the `num_ids` largest counts, and how many of those have it.

    A selection by radix: its digits one after another, by how many counts have each; a walk over all for a digit.
    """
    largest = int(_keys(counts.max().unsqueeze(0)))
    prefix, left = 0, num_ids
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        if not largest >> shift:
            continue  # a zero of all of them
        found = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for block in counts.split(BLOCK_IDS):
            keys = _keys(block)
            if largest >> shift + _DIGIT:
                keys = keys[keys >> shift + _DIGIT == prefix]
            found += torch.bincount(keys >> shift & 2**_DIGIT - 1, minlength=len(found))
        at_least = found.flip(0).cumsum(0)  # how many have the largest digit, it or the one below, and so on
        place = int(torch.searchsorted(at_least, left))
        digit = len(found) - 1 - place
        left -= int(at_least[place] - found[digit])
        prefix = prefix << _DIGIT | digit
    return prefix, left


def _keys(counts: Tensor) -> Tensor:
    """Return int64 that are ordered as counts are; the bits of a float that is not negative are."""
    if not counts.dtype.is_floating_point:
        return counts.long()
    return (counts.double() + 0.0).view(torch.int64)  # -0.0 + 0.0 is 0.0
