"""Groups of equal numbers in a list, in tensors of the list's own length: no device waits for the host to count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Distinct(NamedTuple):
    """The distinct numbers of a list, in some order, padded to its length.

    Args:
        values: (L,); behind the last valid one, zeros.
        totals: (L,) what was counted of each; int64 where they were summed.
        is_valid: (L,) bool.
    """

    values: Tensor
    totals: Tensor
    is_valid: Tensor


def distinct(values: Tensor, amounts: Tensor) -> Distinct:
    """Return the distinct values of a list and the sums of their amounts.

    Args:
        values: (L,) integer, L > 0.
        amounts: (L,) int64: integers add up to the same in any order.

    Example:
        >>> distinct(torch.tensor([7, 3, 7]), torch.tensor([1, 2, 4]))
        Distinct(values=tensor([3, 7, 0]), totals=tensor([2, 5, 0]), is_valid=tensor([ True,  True, False]))
    """
    values, order = values.sort()
    number = _starts(values).cumsum(0) - 1
    found = torch.zeros_like(values).scatter_(0, number, values)
    totals = torch.zeros_like(amounts).index_add_(0, number, amounts.index_select(0, order))
    return Distinct(found, totals, torch.arange(len(values), device=values.device) <= number[-1])


class Ranked(NamedTuple):
    """Elements by group, and in a group the largest first.

    Args:
        order: (L,) int64 elements.
        group: (L,) int64 number of the group, from 0, of each of `order`.
        rank: (L,) int64 place in its group of each of `order`, from 0.
        key: (L,) the group's key of each of `order`.
    """

    order: Tensor
    group: Tensor
    rank: Tensor
    key: Tensor


def ranked(keys: Tensor, sizes: Tensor) -> Ranked:
    """Order elements by key, then by size, the largest first, then as they came.

    Example:
        >>> found = ranked(torch.tensor([5, 2, 5]), torch.tensor([1, 1, 9]))
        >>> found.order.tolist(), found.group.tolist(), found.rank.tolist()
        ([1, 2, 0], [0, 1, 1], [0, 0, 1])
    """
    by_size = sizes.argsort(descending=True, stable=True)
    key, order = keys.index_select(0, by_size).sort(stable=True)
    number = torch.arange(len(keys), device=keys.device)
    starts = _starts(key)
    first = torch.where(starts, number, torch.zeros_like(number)).cummax(0).values
    return Ranked(by_size.index_select(0, order), starts.cumsum(0) - 1, number - first, key)


def _starts(values: Tensor) -> Tensor:
    """Return whether each of sorted values is the first of its kind."""
    return torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
