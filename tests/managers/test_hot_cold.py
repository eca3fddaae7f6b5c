"""CAFE's manager by itself: what is promoted, what moves, and what no step may change."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.managers.waits import NoWaits
from torchrec_compress.managers import HotCold, HotColdSizes, OwnedTable
from torchrec_compress.managers.segments import distinct

PER_BLOCK = 30
SIZES = HotColdSizes(
    hot_rows=3,
    cold_rows=5,
    medium_rows=0,
    buckets=4,
    slots=4,
    importance="frequency",
    threshold=2.0,
    medium_threshold=1.5,
    decay=1.0,
    every=1,
    salt=11,
)
MEDIUM = replace(SIZES, medium_rows=2)
BY_GRADIENT = replace(SIZES, importance="gradient", decay=0.9)


def table(num_blocks: int, sizes: HotColdSizes) -> OwnedTable:
    """Return rows that say what they are, with a state per row and one per weight."""
    number = torch.arange(num_blocks * sizes.rows, dtype=torch.float32)
    weight = number.unsqueeze(1) + torch.tensor([0.0, 0.5])
    state = {"sum": 100 + number, "moment": 200 + weight}
    return OwnedTable(0, num_blocks * PER_BLOCK, {"rows": weight}, {"rows": state})


def look_up(manager: HotCold, places: list[int], norms: list[float] | None = None) -> None:
    ids = torch.tensor(places)
    gradients = torch.tensor(norms or [1.0] * len(places)).unsqueeze(1) * torch.tensor([0.6, 0.8])
    manager.profile(ids, gradients)


def rows(manager: HotCold, places: list[int]) -> list[list[int]]:
    return manager.remap(torch.tensor(places), train=False).tolist()


def test_all_ids_start_cold_in_their_own_block():
    manager = HotCold(2, PER_BLOCK, SIZES)
    found = manager.remap(torch.arange(2 * PER_BLOCK), train=True)
    first, second = found.view(2, PER_BLOCK)
    assert set(first.tolist()) == set(range(3, 8))
    assert torch.equal(second, first + 8)  # the same places of another block


def test_a_promoted_id_takes_weight_and_state_of_where_it_was():
    manager, owned = HotCold(2, PER_BLOCK, SIZES), table(2, SIZES)
    before = table(2, SIZES)
    place = PER_BLOCK + 7
    ((cold,),) = rows(manager, [place])
    look_up(manager, [place, place, 3])
    manager.after_step(owned, 0)
    ((hot,),) = rows(manager, [place])
    assert 8 <= hot < 11
    for now, was in (
        (owned.weights["rows"], before.weights["rows"]),
        *zip(owned.optimizer_state["rows"].values(), before.optimizer_state["rows"].values(), strict=True),
    ):
        assert torch.equal(now[hot], was[cold])
        others = torch.arange(16) != hot
        assert torch.equal(now[others], was[others])
    assert rows(manager, [3])[0][0] in range(3, 8)  # one look-up is below the threshold


def test_the_ids_that_score_most_have_the_rows_and_equals_do_not_take_turns():
    manager, owned = HotCold(1, PER_BLOCK, SIZES), table(1, SIZES)
    look_up(manager, [1, 2, 3, 4] * 3)
    manager.after_step(owned, 0)
    hot = {place for place in range(PER_BLOCK) if rows(manager, [place])[0][0] < 3}
    assert hot == {1, 2, 3}
    look_up(manager, [4])  # 4 against 3: more than a tenth above
    manager.after_step(owned, 1)
    hot = {place for place in range(PER_BLOCK) if rows(manager, [place])[0][0] < 3}
    assert 4 in hot
    assert len(hot) == 3
    (lost,) = {1, 2, 3} - hot
    assert rows(manager, [lost])[0][0] >= 3
    look_up(manager, [lost])
    manager.after_step(owned, 2)  # 4 and 4 against 3 and 3: it takes the row of one of those
    assert rows(manager, [lost])[0][0] < 3


def test_a_row_changes_hands_for_more_than_a_tenth():
    manager, owned = HotCold(1, PER_BLOCK, replace(SIZES, buckets=8)), table(1, SIZES)
    look_up(manager, [1, 2, 3] * 20)
    manager.after_step(owned, 0)
    for step, (places, is_hot) in enumerate((([4] * 21, False), ([4], False), ([4], True)), start=1):
        look_up(manager, places)  # 21 and 22 of 20 are not enough, 23 are
        manager.after_step(owned, step)
        assert (rows(manager, [4])[0][0] < 3) is is_hot


def test_cold_and_medium_rows_are_shared_by_different_ids():
    sizes = replace(SIZES, cold_rows=5, medium_rows=5, medium_threshold=0.5, threshold=99.0, buckets=30)
    manager, owned = HotCold(1, PER_BLOCK, sizes), table(1, sizes)
    look_up(manager, list(range(PER_BLOCK)))
    manager.after_step(owned, 0)
    pairs = {(cold - 3, medium - 8) for cold, medium in rows(manager, list(range(PER_BLOCK))) if medium >= 0}
    assert len(pairs) > 10  # of 25; by one hash 5


def test_a_hot_id_that_loses_its_slot_frees_its_row():
    sizes = replace(SIZES, hot_rows=1, buckets=1, slots=1)
    manager, owned = HotCold(1, PER_BLOCK, sizes), table(1, sizes)
    look_up(manager, [5, 5])
    manager.after_step(owned, 0)
    assert rows(manager, [5]) == [[0]]
    look_up(manager, [9])
    manager.after_step(owned, 1)  # its score is 2 and 1
    assert rows(manager, [9]) == [[0]]
    assert rows(manager, [5])[0][0] > 0


def test_medium_ids_add_a_second_row_and_take_the_sum_along():
    manager, owned = HotCold(1, PER_BLOCK, MEDIUM), table(1, MEDIUM)
    weight = owned.weights["rows"]
    look_up(manager, [7, 8])
    manager.after_step(owned, 0)
    assert rows(manager, [7])[0][1] == -1
    found = manager.sketch.find(torch.tensor([7]))
    manager.sketch.scores[found.bucket, found.slot] = 1.5
    ((cold, medium),) = rows(manager, [7])
    assert cold in range(3, 8)
    assert medium in range(8, 10)
    served, state = weight[cold] + weight[medium], owned.optimizer_state["rows"]["sum"][cold].clone()
    look_up(manager, [7])
    manager.after_step(owned, 1)
    ((hot, none),) = rows(manager, [7])
    assert (hot < 3, none) == (True, -1)
    assert torch.equal(weight[hot], served)
    assert float(owned.optimizer_state["rows"]["sum"][hot]) == float(state)


def test_importance_is_the_gradient_over_the_running_mean():
    sizes = replace(BY_GRADIENT, decay=1.0)
    manager, owned = HotCold(2, PER_BLOCK, sizes), table(2, sizes)
    look_up(manager, [1, 1, 2, PER_BLOCK + 1], [1.0, 3.0, 2.0, 1e-6])
    manager.after_step(owned, 0)
    found = manager.sketch.find(torch.tensor([1, 2, PER_BLOCK + 1]))
    torch.testing.assert_close(found.score, torch.tensor([2.0, 1.0, 1.0]))  # means 2 and 1e-6
    look_up(manager, [2], [2.0])
    manager.after_step(owned, 1)
    torch.testing.assert_close(manager.sketch.find(torch.tensor([2])).score, torch.tensor([2.0]))


def test_the_mean_forgets_older_gradients():
    sizes = replace(BY_GRADIENT, decay=0.5)
    manager, owned = HotCold(1, PER_BLOCK, sizes), table(1, sizes)
    for step, norm in enumerate([3.0, 1.0]):
        look_up(manager, [step + 1], [norm])
        manager.after_step(owned, step)
    found = manager.sketch.find(torch.tensor([2]))
    torch.testing.assert_close(found.score, torch.tensor([0.6]))  # of a mean of (1.5 + 1) / (0.5 + 1)


def test_a_block_of_small_gradients_is_scored_as_exactly_as_others():
    sizes = replace(BY_GRADIENT, decay=1.0)
    manager, owned = HotCold(2, PER_BLOCK, sizes), table(2, sizes)
    look_up(manager, [1, PER_BLOCK + 1, PER_BLOCK + 2], [3e3, 3e-12, 1e-12])
    manager.after_step(owned, 0)
    found = manager.sketch.find(torch.tensor([1, PER_BLOCK + 1, PER_BLOCK + 2]))
    torch.testing.assert_close(found.score, torch.tensor([1.0, 1.5, 0.5]))


def test_scores_decay_and_gradients_that_are_not_finite_count_for_nothing():
    sizes = replace(BY_GRADIENT, decay=0.5)
    manager, owned = HotCold(1, PER_BLOCK, sizes), table(1, sizes)
    look_up(manager, [1], [2.0])
    manager.after_step(owned, 0)
    look_up(manager, [4, 5, 6], [float("nan"), float("inf"), 0.0])
    manager.after_step(owned, 1)
    assert manager.sketch.find(torch.tensor([1, 4, 5, 6])).score.tolist() == [0.5, 0.0, 0.0, 0.0]
    manager.after_step(owned, 2)  # a step without a look-up here
    assert manager.sketch.find(torch.tensor([1])).score.tolist() == [0.25]


def test_promotions_come_every_so_many_steps():
    sizes = replace(SIZES, every=3)
    manager, owned = HotCold(1, PER_BLOCK, sizes), table(1, sizes)
    for step in range(3):
        assert rows(manager, [1])[0][0] >= 3
        look_up(manager, [1, 1])
        manager.after_step(owned, step)
    assert rows(manager, [1])[0][0] < 3


def test_a_discarded_batch_leaves_no_trace():
    manager, owned = HotCold(1, PER_BLOCK, SIZES), table(1, SIZES)
    look_up(manager, [1, 1, 1])
    manager.discard()
    manager.after_step(owned, 0)
    assert not any(buffer.any() for buffer in manager.buffers())


def state(manager: HotCold) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in manager.named_buffers()}


PLACES = st.lists(st.lists(st.integers(0, 4 * PER_BLOCK - 1), max_size=40), min_size=1, max_size=6)


@pytest.mark.parametrize("sizes", [SIZES, MEDIUM, BY_GRADIENT])
@given(batches=PLACES, random=st.randoms(use_true_random=False))
def test_blocks_apart_and_in_another_order_end_alike(sizes, batches, random):
    """What several ranks do is what one does: to the bit."""
    whole, owned = HotCold(4, PER_BLOCK, sizes), table(4, sizes)
    halves = [HotCold(2, PER_BLOCK, sizes) for _ in range(2)]
    rows_of_half = 2 * sizes.rows
    parts = []
    for half in range(2):
        cut = slice(half * rows_of_half, (half + 1) * rows_of_half)
        part = table(4, sizes)
        moments = {name: value[cut].clone() for name, value in part.optimizer_state["rows"].items()}
        parts.append(
            part._replace(weights={"rows": part.weights["rows"][cut].clone()}, optimizer_state={"rows": moments})
        )
    for step, batch in enumerate(batches):
        norms = [0.1 + random.random() for _ in batch]
        look_up(whole, batch, norms) if batch else None
        whole.after_step(owned, step)
        pairs = list(zip(batch, norms, strict=True))
        random.shuffle(pairs)
        for half in range(2):
            mine = [(place % (2 * PER_BLOCK), norm) for place, norm in pairs if place // (2 * PER_BLOCK) == half]
            if mine:
                look_up(halves[half], *map(list, zip(*mine, strict=True)))
            halves[half].after_step(parts[half], step)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, torch.cat([dict(half.named_buffers())[name] for half in halves])), name
    assert torch.equal(owned.weights["rows"], torch.cat([part.weights["rows"] for part in parts]))
    for name, value in owned.optimizer_state["rows"].items():
        assert torch.equal(value, torch.cat([part.optimizer_state["rows"][name] for part in parts])), name


@pytest.mark.parametrize("sizes", [SIZES, MEDIUM, BY_GRADIENT])
@given(batches=PLACES)
def test_hot_rows_and_the_sketch_agree(sizes, batches):
    """No row has two ids, each is of its own block, and a look-up changes nothing."""
    manager, owned = HotCold(4, PER_BLOCK, sizes), table(4, sizes)
    for step, batch in enumerate(batches):
        look_up(manager, batch) if batch else None
        manager.after_step(owned, step)
    before = state(manager)
    for train in (True, False):
        found = manager.remap(torch.arange(4 * PER_BLOCK), train=train)
    assert all(torch.equal(before[name], buffer) for name, buffer in manager.named_buffers())
    first = found[:, 0].view(4, PER_BLOCK)
    in_block = first - torch.arange(4).unsqueeze(1) * sizes.rows
    assert int(in_block.min()) >= 0
    assert int(in_block.max()) < sizes.hot_rows + sizes.cold_rows
    hot = first[in_block < sizes.hot_rows]
    assert len(hot.unique()) == len(hot)
    assert manager.fault() is None


def busy() -> HotCold:
    """Return a manager with hot ids in both blocks, some of which lost their slots."""
    manager, owned = HotCold(2, PER_BLOCK, SIZES), table(2, SIZES)
    seeded = torch.Generator().manual_seed(0)
    for step in range(8):
        look_up(manager, torch.randint(0, 2 * PER_BLOCK, (60,), generator=seeded).tolist())
        manager.after_step(owned, step)
    assert manager.hot_ids.all()
    return manager


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("hot_ids", lambda ids: ids[1].fill_(PER_BLOCK + 1), r"hot_ids out of \[0, 30\]"),
        ("hot_ids", lambda ids: ids[1].fill_(-1), r"hot_ids out of \[0, 30\]"),
        ("hot_ids", lambda ids: ids.copy_(ids.roll(1, 0)), "sketch.rows that are not those of hot_ids"),
        ("hot_ids", lambda ids: ids.zero_(), "sketch.rows that are not those of hot_ids"),
        ("sketch.rows", lambda rows: rows[0, 0].fill_(4), r"sketch.rows out of \[0, 3\]"),
        ("sketch.rows", lambda rows: rows[0, 0].fill_(-1), r"sketch.rows out of \[0, 3\]"),
        ("sketch.rows", lambda rows: rows.fill_(2), "sketch.rows that are not those of hot_ids"),
        ("sketch.ids", lambda ids: ids[0, 0].fill_(PER_BLOCK + 1), r"sketch.ids out of \[0, 30\]"),
        ("sketch.ids", lambda ids: ids.copy_(ids.roll(1, 0)), "sketch.ids in buckets of others"),
    ],
)
def test_integers_that_no_step_leaves_are_a_fault(name, change, fault):
    manager = busy()
    assert manager.fault() is None
    change(manager.get_buffer(name))
    assert re.search(fault, manager.fault() or "")


def test_ids_of_the_sketch_without_a_hot_row_are_looked_at_too():
    for change, fault in (
        (lambda ids: ids.copy_(ids.roll(1, 0)), "sketch.ids in buckets of others"),
        (lambda ids: ids[:, 0].copy_(ids[:, 1]), "one of sketch.ids twice"),
        (lambda ids: ids[0, 0].fill_(-3), "sketch.ids out of [0, 30]"),
    ):
        manager = busy()
        manager.hot_ids.zero_()
        manager.sketch.rows.zero_()
        assert manager.sketch.ids[:, :2].all()
        change(manager.sketch.ids)
        assert manager.fault() == fault


def test_a_manager_without_blocks_has_no_fault():
    assert HotCold(0, PER_BLOCK, SIZES).fault() is None


@pytest.mark.parametrize("sizes", [SIZES, MEDIUM, BY_GRADIENT])
def test_no_step_waits_for_the_device(sizes):
    manager, owned = HotCold(2, PER_BLOCK, sizes), table(2, sizes)
    places, gradients = torch.randint(0, 2 * PER_BLOCK, (50,)), torch.randn(50, 2)
    with NoWaits():
        for step in range(3):
            manager.remap(places, train=True)
            manager.profile(places, gradients)
            manager.after_step(owned, step)
    assert manager.hot_ids.any()
    with NoWaits(), pytest.raises(AssertionError, match="waits for the device"):
        distinct(places, torch.ones_like(places)).is_valid.sum().item()


def test_counts_fill_the_hot_rows():
    manager = HotCold(2, PER_BLOCK, SIZES)
    counts = torch.zeros(2 * PER_BLOCK, dtype=torch.int64)
    counts[[4, 5, 6, 7, PER_BLOCK + 3]] = torch.tensor([10, 40, 30, 20, 5])
    manager.fill(counts)
    assert sorted(rows(manager, [5, 6, 7])) == [[0], [1], [2]]
    assert rows(manager, [PER_BLOCK + 3])[0][0] in range(8, 11)
    assert rows(manager, [4])[0][0] in range(3, 8)


@pytest.mark.parametrize(
    "counts",
    [
        2 + torch.rand(PER_BLOCK, dtype=torch.float64),  # differ in fractions alone
        2.0 + torch.arange(PER_BLOCK, dtype=torch.float16) / 64,
        2**44 * torch.randperm(PER_BLOCK).add(2),  # in units of a score, past int64
        2**53 - torch.randperm(PER_BLOCK),  # past what float32 tells apart
        torch.randperm(PER_BLOCK).to(torch.uint8) + 2,
        torch.full((PER_BLOCK,), 3),
    ],
)
def test_hot_rows_are_of_the_largest_counts_whatever_their_size(counts):
    sizes = replace(SIZES, buckets=1, slots=4)
    manager = HotCold(1, PER_BLOCK, sizes)
    manager.fill(counts)
    expected = counts.double().argsort(descending=True, stable=True)[:3]
    assert [rows(manager, [place]) for place in expected.tolist()] == [[[0]], [[1]], [[2]]]
    found = manager.sketch.find(expected)
    torch.testing.assert_close(found.score, counts[expected].float())


@pytest.mark.parametrize("num_blocks", [1, 2, 16, 40])
def test_many_blocks_are_filled_as_each_is_by_itself(num_blocks):
    """In steps of several blocks, which is no part of the result."""
    seeded = torch.Generator().manual_seed(num_blocks)
    counts = (20 * torch.rand(num_blocks * PER_BLOCK, generator=seeded, dtype=torch.float64)).float()
    whole = HotCold(num_blocks, PER_BLOCK, MEDIUM)
    whole.fill(counts)
    parts = [HotCold(1, PER_BLOCK, MEDIUM) for _ in range(num_blocks)]
    for part, mine in zip(parts, counts.split(PER_BLOCK), strict=True):
        part.fill(mine)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, torch.cat([part.get_buffer(name) for part in parts])), name
    assert whole.hot_ids.any()


def test_a_cast_leaves_scores_alone():
    manager = HotCold(1, PER_BLOCK, BY_GRADIENT)
    before = {name: buffer.dtype for name, buffer in manager.named_buffers()}
    manager.half()
    assert {name: buffer.dtype for name, buffer in manager.named_buffers()} == before
    assert manager.to("meta").norms.is_meta
