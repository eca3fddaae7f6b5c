"""Admission: by frequency, without decay, an id has a row of its own from its k-th look-up on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.managers.training import ROWS, draw, run, shard
from torchrec_compress.managers import HotCold, HotColdSizes, OwnedTable
from torchrec_compress.methods import CafeConfig
from torchrec_compress.modules.after_step import managed_owners

PER_BLOCK, STEPS = 20, 5
# a row for every id, and a slot
SIZES = HotColdSizes(
    hot_rows=PER_BLOCK,
    cold_rows=5,
    medium_rows=0,
    buckets=1,
    slots=PER_BLOCK,
    importance="frequency",
    threshold=3.0,
    medium_threshold=1.5,
    decay=1.0,
    every=1,
    salt=11,
)
# one bucket of a block, with a slot for each of its ids
ADMISSION = CafeConfig(
    num_hot_rows=40,
    num_cold_rows=4,
    num_blocks=4,
    num_sketch_slots=160,
    slots_per_bucket=40,
    importance="frequency",
    threshold=3.0,
    decay=1.0,
    width=4,
)
BAGS = st.lists(st.lists(st.integers(0, 2 * PER_BLOCK - 1), max_size=30), min_size=1, max_size=6)


def owned(sizes: HotColdSizes, num_blocks: int) -> OwnedTable:
    return OwnedTable(0, num_blocks * PER_BLOCK, {"rows": torch.zeros(num_blocks * sizes.rows, 4)}, {"rows": {}})


def step_of(manager: HotCold, table: OwnedTable, places: list[int], step: int) -> set[int]:
    """Look ids up, end the step, and return who has a row of its own."""
    for part in torch.tensor(places, dtype=torch.int64).chunk(2) if places else ():  # of two features, or batches
        manager.profile(part, torch.zeros(len(part), 4))  # gradients count for nothing
    manager.after_step(table, step)
    rows = manager.remap(torch.arange(table.num_places), train=False)[:, 0]
    return set((rows % (len(table.weights["rows"]) // 2) < manager.layout[0]).nonzero().view(-1).tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@given(batches=BAGS)
def test_an_id_is_admitted_in_the_step_of_its_kth_look_up_and_stays(k, batches):
    sizes = replace(SIZES, threshold=float(k))
    manager, table, seen = HotCold(2, PER_BLOCK, sizes), owned(sizes, 2), Counter()
    for step, places in enumerate(batches):
        seen.update(places)
        assert step_of(manager, table, places, step) == {place for place, number in seen.items() if number >= k}


def test_with_rounds_of_promotions_it_waits_for_a_look_up_in_one():
    sizes = replace(SIZES, every=3)
    manager, table = HotCold(2, PER_BLOCK, sizes), owned(sizes, 2)
    found = [step_of(manager, table, places, step) for step, places in enumerate([[5] * 4, [7] * 3, [7], [], [], [5]])]
    assert found == [set(), set(), {7}, {7}, {7}, {5, 7}]


def test_with_decay_look_ups_far_apart_do_not_add_up():
    sizes = replace(SIZES, decay=0.9)
    manager, table = HotCold(2, PER_BLOCK, sizes), owned(sizes, 2)
    assert [step_of(manager, table, [5], step) for step in range(4)] == [set(), set(), set(), {5}]


def test_without_a_free_row_it_must_have_a_tenth_more_than_the_least_that_has_one():
    sizes = replace(SIZES, hot_rows=1)
    manager, table = HotCold(2, PER_BLOCK, sizes), owned(sizes, 2)
    batches = [[5] * 3, [7] * 3, [7], [5], [5]]  # 3 of 3, 4 of 3; then 4 and 5 of 4
    assert [step_of(manager, table, places, step) for step, places in enumerate(batches)] == [{5}, {5}, {7}, {7}, {5}]


def test_of_more_ids_than_slots_some_are_admitted_early_and_none_that_has_a_slot_late():
    sizes = replace(SIZES, slots=4)  # of six ids
    manager, table, seen = HotCold(2, PER_BLOCK, sizes), owned(sizes, 2), Counter()
    early = without = 0
    for step in range(12):
        places = torch.randint(0, 6, (2,), generator=torch.Generator().manual_seed(step))
        seen.update(places.tolist())
        hot = step_of(manager, table, places.tolist(), step)
        has_slot = set(places[manager.sketch.find(places).is_held].tolist())
        assert {place for place in has_slot if seen[place] >= 3} <= hot
        early += len({place for place in hot if seen[place] < 3})
        without += len({place for place in seen if seen[place] >= 3 and place not in hot})
    assert early > 0 and without > 0


def admitted(how: str) -> list[dict[str, set[int]]]:
    """Return after every step the ids that have rows of their own on this rank, by table."""
    model, optimizers = shard(ADMISSION, how)
    (owner,), found = managed_owners(model), []
    for step in range(STEPS):
        run(model, optimizers, range(step, step + 1), pipelined=False)
        found.append({})
        for name, manager in owner.managers.items():
            table = owner.owned(name, None)
            if table is None:
                continue
            per_block = -(-{"item": ROWS["a"], "user": ROWS["u"]}[name] // 4)
            place = table.first_place + torch.arange(table.num_places)
            rows = manager.remap(torch.arange(table.num_places), train=False)[:, 0]
            hot = place[rows % 11 < 10]
            found[-1][name] = set((hot % per_block * 4 + hot // per_block).tolist())
    assert dist.get_world_size() == 2
    return found


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_look_ups_of_all_ranks_and_features_count(two_ranks, how):
    results, seen = two_ranks.run(admitted, how), {"item": Counter(), "user": Counter()}
    repeated = 0
    for step in range(STEPS):
        for key, jagged in draw(step).features.to_dict().items():
            seen["user" if key == "u" else "item"].update(jagged.values().tolist())
            repeated += sum(len(bag) - len(bag.unique()) for bag in jagged.to_dense())
        for name, mine in seen.items():
            got = set().union(*(result[step].get(name, set()) for result in results))
            assert got == {number for number, count in mine.items() if count >= 3}
    assert repeated > 3 and all(max(mine.values()) > 3 for mine in seen.values())
