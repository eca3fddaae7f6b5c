"""One line swaps, in every script: each kind trains as one process does, to the last value of every table."""

import pytest

from tests.sharding.swaps import METHODS, PLANS, all_swaps

POOLED = pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])


def wrong(ranks, methods: list[str], pooled: bool, plans: tuple[str, ...]) -> dict:
    """Return the scripts in which the swap does not work, by rank, with what is wrong."""
    results = ranks.run(all_swaps, methods, pooled, plans)
    return {(rank, *how): what for rank, found in enumerate(results) for how, what in found.items() if what}


@POOLED
def test_every_method_in_every_script(two_ranks, pooled):
    """All methods side by side: TorchRec's sharders, fewer, or ours; plain or pipelined; built on the CPU or meta."""
    assert wrong(two_ranks, list(METHODS), pooled, PLANS) == {}


@POOLED
@pytest.mark.parametrize("method", ["dense", "hash", "memcom", "pq"])
def test_collections_of_one_kind_of_part(two_ranks, pooled, method):
    assert wrong(two_ranks, [method], pooled, PLANS[:1]) == {}
