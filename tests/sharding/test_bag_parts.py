"""Parts of bags add up to the bags, over any number of ranks, and are as few as can be."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_compress.sharding.bag_parts import marked, num_parts, opened, places_of_arrival

BLOCK = 4  # rows of a rank


@st.composite
def tables(draw, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the ids of a table's bags, and their offsets."""
    bags = draw(st.lists(st.lists(st.integers(0, BLOCK * num_ranks - 1), max_size=6), max_size=6))
    offsets = torch.tensor([0, *[len(bag) for bag in bags]]).cumsum(0)
    return torch.tensor([number for bag in bags for number in bag], dtype=torch.int64), offsets


def pool(rows: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([rows[first:last].sum(0) for first, last in pairwise(offsets.tolist())] or [rows[:0]])


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_parts_of_every_rank_add_up_to_the_bags(data, num_ranks, num_tables):
    """Two tables and more share one exchange: rows arrive rank by rank, and of a rank table by table."""
    made = [data.draw(tables(num_ranks)) for _ in range(num_tables)]
    weight = torch.arange(BLOCK * num_ranks * 2, dtype=torch.float64).view(-1, 2)
    asked = [marked(ids, offsets, ids // BLOCK, num_ranks) for ids, offsets in made]
    arrived = []
    for rank in range(num_ranks):
        for (ids, _), (sent, _) in zip(made, asked, strict=True):
            received = sent[ids // BLOCK == rank] - 2 * BLOCK * rank  # as the exchange sends them
            mine, offsets = opened(received)
            assert num_parts(received, torch.tensor([len(received)])).item() == len(offsets) - 1
            assert offsets[0] == 0 or not len(received)
            if len(mine):
                arrived.append(pool(weight[BLOCK * rank :][mine], offsets))
    owners = torch.cat([parts.owners for _, parts in asked])
    rows = torch.cat([weight[:0], *arrived])
    assert len(rows) == len(owners)
    rows = rows[places_of_arrival(owners)]
    for (ids, offsets), (_, parts) in zip(made, asked, strict=True):
        mine, rows = rows[: len(parts.owners)], rows[len(parts.owners) :]
        assert torch.equal(pool(mine, parts.offsets), pool(weight[ids], offsets))
        bags = torch.repeat_interleave(offsets.diff())
        assert len(parts.owners) == len(set(zip(bags.tolist(), (ids // BLOCK).tolist(), strict=True)))


def test_parts_are_counted_piece_by_piece():
    sent = torch.tensor([1, 0, 3, 5, 2, 4], dtype=torch.int32)
    assert num_parts(sent, torch.tensor([0, 3, 0, 1, 2])).tolist() == [0, 2, 0, 1, 0]
    assert num_parts(sent[:0], torch.tensor([0, 0])).tolist() == [0, 0]
