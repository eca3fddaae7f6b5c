"""The sketch against an exact counter."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_compress.managers.segments import distinct, ranked
from torchrec_compress.managers.sketch import UNIT, Sketch

PER_BLOCK, BUCKETS, SLOTS, BLOCKS = 40, 3, 4, 2
IDS = st.integers(0, BLOCKS * PER_BLOCK - 1)
LOOKUPS = st.lists(st.lists(st.tuples(IDS, st.integers(0, 5)), min_size=1, max_size=60), min_size=1, max_size=8)


def made() -> Sketch:
    return Sketch(BLOCKS, PER_BLOCK, BUCKETS, SLOTS, salt=3)


def add(sketch: Sketch, lookups: list[tuple[int, int]]) -> None:
    places, amounts = torch.tensor(lookups).unbind(1)
    sketch.add(distinct(places, amounts * UNIT))


def bucket_of(sketch: Sketch, place: int) -> int:
    return int(sketch._buckets(torch.tensor([place]))[0])


def held(sketch: Sketch) -> dict[int, float]:
    """Return the score of every place that has a slot; none has two."""
    found: dict[int, float] = {}
    for bucket, (ids, scores) in enumerate(zip(sketch.ids.tolist(), sketch.scores.tolist(), strict=True)):
        for name, score in zip(ids, scores, strict=True):
            if name:
                place = bucket // BUCKETS * PER_BLOCK + name - 1
                assert place not in found
                assert bucket_of(sketch, place) == bucket
                found[place] = score
            else:
                assert score == 0
    return found


@given(LOOKUPS)
def test_scores_are_bounded_by_an_exact_count(batches):
    sketch, exact = made(), Counter()
    for lookups in batches:
        add(sketch, lookups)
        exact.update({place: 0 for place, _ in lookups})
        for place, amount in lookups:
            exact[place] += amount
    mass = Counter()
    for place, count in exact.items():
        mass[bucket_of(sketch, place)] += count
    scores = held(sketch)
    smallest = sketch.scores.amin(1).tolist()
    assert all(float(total) <= mass[bucket] + 1e-3 for bucket, total in enumerate(sketch.scores.sum(1)))
    for place, count in exact.items():
        bucket = bucket_of(sketch, place)
        if place in scores:
            assert count <= scores[place] <= count + smallest[bucket]
        else:
            assert count <= smallest[bucket] <= mass[bucket] / SLOTS  # so what has a larger share has a slot


@given(LOOKUPS, st.randoms())
def test_the_order_of_a_batch_does_not_matter(batches, random):
    one, other = made(), made()
    for lookups in batches:
        add(one, lookups)
        random.shuffle(lookups)
        add(other, lookups)
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name]), name


@given(LOOKUPS)
def test_find_agrees_with_what_is_held(batches):
    sketch = made()
    for lookups in batches:
        add(sketch, lookups)
    places = torch.arange(BLOCKS * PER_BLOCK)
    found, scores = sketch.find(places), held(sketch)
    assert found.is_held.tolist() == [place in scores for place in places.tolist()]
    assert found.score.tolist() == [scores.get(place, 0.0) for place in places.tolist()]
    assert found.row.tolist() == [-1] * len(places)


def test_a_newcomer_takes_the_smallest_slot_and_its_row_is_lost():
    sketch = Sketch(1, 40, 1, 2, salt=0)
    add(sketch, [(1, 5), (2, 3)])
    found = sketch.find(torch.tensor([1, 2]))
    sketch.change_rows(found.bucket, found.slot, torch.tensor([7, 9]))
    assert sketch.find(torch.tensor([1, 2])).row.tolist() == [6, 8]
    add(sketch, [(3, 1)])
    found = sketch.find(torch.tensor([1, 2, 3]))
    assert found.is_held.tolist() == [True, False, True]
    assert found.score.tolist() == [5, 0, 4]  # the smallest, 3, and its own 1
    assert found.row.tolist() == [6, -1, -1]


def test_equals_do_not_take_a_slot_from_each_other():
    sketch = Sketch(1, 40, 1, 2, salt=0)
    add(sketch, [(9, 2), (4, 2), (6, 2)])  # of equals in one batch the first ids
    assert sorted(held_names(sketch)) == [4, 6]
    add(sketch, [(11, 0)])  # no more than the smallest
    assert sorted(held_names(sketch)) == [4, 6]


def test_a_batch_without_newcomers_leaves_all_slots_where_they_are():
    """Where they are decides between equals, so that it may not hang on which buckets a rank holds."""
    sketch = made()
    add(sketch, [(place, 1) for place in range(BLOCKS * PER_BLOCK)])
    before = sketch.ids.clone()
    add(sketch, [(int(sketch.ids[0, 3]) - 1, 9)])
    for bucket in range(BLOCKS * BUCKETS):
        last = int(sketch.ids[bucket, 3]) - 1 + bucket // BUCKETS * PER_BLOCK
        add(sketch, [(last, 9)])  # now the largest of its bucket, in the last slot
    assert torch.equal(sketch.ids, before)


def held_names(sketch: Sketch) -> list[int]:
    return [name - 1 for name in sketch.ids.view(-1).tolist() if name]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=30))
def test_ranked_orders_by_key_then_size_then_place(pairs):
    keys, sizes = torch.tensor(pairs).unbind(1)
    found = ranked(keys, sizes)
    expected = sorted(range(len(pairs)), key=lambda n: (pairs[n][0], -pairs[n][1], n))
    assert found.order.tolist() == expected
    by_key = Counter()
    for place, number in enumerate(expected):
        key = pairs[number][0]
        assert int(found.rank[place]) == by_key[key]
        by_key[key] += 1
        assert int(found.group[place]) == len(by_key) - 1
        assert int(found.key[place]) == key


@pytest.mark.parametrize("ids_per_block", [10, 2**31])
def test_ids_take_four_bytes_where_they_fit(ids_per_block):
    sketch = Sketch(1, ids_per_block, 2, 4, salt=0)
    assert sketch.ids.dtype == (torch.int32 if ids_per_block < 2**31 else torch.int64)
    last = torch.tensor([ids_per_block - 1])
    sketch.add(distinct(last, torch.tensor([UNIT])))
    assert sketch.find(last).score.tolist() == [1.0]
