"""Bags that are summed where their rows lie: of every bag one row comes back from each rank that holds rows of it.

Ids travel as they would without, twice as large, and the lowest bit says where the part of another bag begins; so
nothing else travels, and TorchRec's exchange of sequences serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BagParts(NamedTuple):
    """The parts of one table's bags: of a bag, the ids that one rank holds, in the order of the bag.

    Args:
        offsets: (bags + 1,) int64: the parts of bag b are [offsets[b], offsets[b + 1]).
        owners: (parts,) int64 ranks that hold them.
    """

    offsets: Tensor
    owners: Tensor


def marked(ids: Tensor, offsets: Tensor, owners: Tensor, num_ranks: int) -> tuple[Tensor, BagParts]:
    """Return ids as they travel, (L,) int64, and the parts of their bags; the ids of a part need not lie side by side.

    Args:
        ids: (L,) integer.
        offsets: (bags + 1,) integer, of the ids.
        owners: (L,) int64 in [0, num_ranks), of the ids.
        num_ranks: over which the table is spread.

    Example:
        >>> ids, ranks = torch.tensor([1, 7, 2, 9]), torch.tensor([0, 1, 0, 1])
        >>> asked, parts = marked(ids, torch.tensor([0, 3, 4]), ranks, num_ranks=2)
        >>> asked.tolist(), parts.offsets.tolist(), parts.owners.tolist()
        ([3, 15, 4, 19], [0, 2, 3], [0, 1, 1])
    """
    lengths, places = offsets.diff().long(), torch.arange(len(ids), device=ids.device)
    bags = torch.repeat_interleave(lengths, output_size=len(ids))
    # where a bag first meets each rank
    firsts = places.new_full((len(lengths) * num_ranks,), len(ids))
    keys = bags * num_ranks + owners
    begins = firsts.scatter_reduce(0, keys, places, "amin").index_select(0, keys) == places
    counts = torch.zeros_like(lengths).index_add_(0, bags, begins.long())
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ids.long() * 2 + begins, BagParts(bounds, owners[begins])


def opened(asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of marked ones, (L,) integer as they are, and the offsets of their parts, (parts + 1,) int64.

    Example:
        >>> ids, offsets = opened(torch.tensor([3, 4, 15]))
        >>> ids.tolist(), offsets.tolist()
        ([1, 2, 7], [0, 2, 3])
    """
    begins = (asked & 1).nonzero().squeeze(1)
    return asked >> 1, torch.cat([begins, begins.new_full((1,), len(asked))])


def num_parts(asked: Tensor, lengths: Tensor) -> Tensor:
    """Return how many parts begin in each piece of a list of marked ids: (L,), (pieces,) lengths -> (pieces,) int64.

    Example:
        >>> num_parts(torch.tensor([3, 4, 15]), torch.tensor([2, 0, 1])).tolist()
        [1, 0, 1]
    """
    begun = torch.cat([asked.new_zeros(1, dtype=torch.int64), (asked & 1).cumsum(0, dtype=torch.int64)])
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
    return begun.index_select(0, bounds).diff()


def places_of_arrival(owners: Tensor) -> Tensor:
    """Return where the rows of parts are among those that arrive rank by rank: (parts,) int64 -> (parts,) int64.

    Example:
        >>> places_of_arrival(torch.tensor([1, 0, 1])).tolist()
        [1, 0, 2]
    """
    arrival = owners.argsort(stable=True)
    return torch.empty_like(arrival).scatter_(0, arrival, torch.arange(len(owners), device=owners.device))
