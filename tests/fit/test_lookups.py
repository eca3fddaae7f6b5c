"""Which ids are looked up most often, in blocks, is what a sort of all of them says."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_compress.fit import checks, lookups, popularity
from torchrec_compress.fit.checks import check_counts, check_weights, first_wrong
from torchrec_compress.fit.kmeans import sample_points
from torchrec_compress.fit.lookups import by_lookups, is_hottest, ranks_by_lookups
from torchrec_compress.fit.popularity import popularity_weights

NUM_IDS = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "BLOCK_IDS", 64)
    monkeypatch.setattr(popularity, "_BLOCK", 64)
    monkeypatch.setattr(checks, "_BLOCK", 64)
    monkeypatch.setattr(import_module("torchrec_compress.fit.kmeans"), "CHUNK_ROWS", 64)


def zipf() -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    return (1e6 / torch.arange(1, NUM_IDS + 1) ** 1.1)[torch.randperm(NUM_IDS, generator=seeded)].double()


COUNTS = {
    "many": zipf().long(),
    "few": (zipf() / 1e4).to(torch.uint8),
    "float64": zipf(),
    "float32": zipf().float(),
    "float16": (zipf() / 1e3).half(),
    "equal": torch.ones(NUM_IDS, dtype=torch.int32),
    "zeros": torch.zeros(NUM_IDS),
    "both zeros": torch.tensor([0.0, -0.0, 1e-300, 1e-3]).double().repeat(NUM_IDS // 4),
    "large": 2**60 + torch.arange(NUM_IDS) % 7,
    "rising": torch.arange(NUM_IDS).double(),
    "strided": zipf().long().repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_most_often_looked_up_are_those_of_a_stable_sort(counts):
    order = torch.argsort(counts, descending=True, stable=True)
    for size in (0, 1, 2, 63, 64, 65, 500, NUM_IDS - 1, NUM_IDS):
        assert torch.equal(by_lookups(counts, size), order[:size])
        if size:
            expected = torch.zeros(NUM_IDS, dtype=torch.bool).index_fill(0, order[:size], True)
            assert torch.equal(is_hottest(counts, size), expected)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("size", [1, 100, NUM_IDS])
def test_ranks_are_places_in_a_stable_sort(counts, size):
    ids = torch.randperm(NUM_IDS, generator=torch.Generator().manual_seed(1))[:size].sort().values
    whole = torch.empty(NUM_IDS, dtype=torch.int64)
    whole[torch.argsort(counts, descending=True, stable=True)] = torch.arange(NUM_IDS)
    expected = whole[ids].sort()
    ranks, order = ranks_by_lookups(counts, ids)
    assert torch.equal(ranks, expected.values) and torch.equal(order, expected.indices)


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=300), st.data())
def test_any_counts(values, data):
    counts, size = torch.tensor(values), data.draw(st.integers(1, len(values)))
    assert torch.equal(by_lookups(counts, size), torch.argsort(counts, descending=True, stable=True)[:size])


WEIGHTS = {
    "skewed": zipf().float(),
    "rising": zipf().float().sort().values,
    "falling": zipf().float().sort(descending=True).values,
    "equal": torch.ones(NUM_IDS),
    "mostly none": zipf().float().where(torch.arange(NUM_IDS) % 97 == 5, 0.0),
    "none": torch.zeros(NUM_IDS),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("size", [1, 5, 40, 200, NUM_IDS - 1])
def test_a_sample_in_blocks_is_that_of_all_at_once(weights, size):
    """The formula that a table of any size was drawn by; and what is drawn next is the same, too."""
    seeded, again = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    priority = weights.double() / (1 - torch.rand(NUM_IDS, dtype=torch.float64, generator=seeded))
    threshold = priority.kthvalue(NUM_IDS - size).values
    kept = priority > threshold
    kept[(priority == threshold).nonzero().flatten()[: size - int(kept.sum())]] = True
    index, stands_for = sample_points(weights, size, again)
    assert torch.equal(index, kept.nonzero().flatten())
    assert torch.equal(stands_for, weights[index].clamp(min=float(threshold)))
    assert torch.equal(seeded.get_state(), again.get_state())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weights_in_blocks_are_those_of_all_at_once(counts):
    exact = counts.double()
    for kind, weights in (("count", exact), ("log2", exact.clamp(min=2).log2().floor())):
        expected = torch.where(exact > 0, weights, 1e-3).float()
        assert torch.equal(popularity_weights(counts, kind, NUM_IDS), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("place", [0, 63, 64, NUM_IDS - 1])
def test_what_is_wrong_is_found_in_any_block_and_the_first_is_named(place, wrong):
    values = zipf()
    assert first_wrong(values) is None
    values[[place, -1]] = wrong
    assert first_wrong(values) == place
    message = f"got {wrong} for"
    with pytest.raises(ValueError, match=f"{message} id {place}"):
        check_counts("here", values, NUM_IDS)
    with pytest.raises(ValueError, match=f"{message} row {place}"):
        check_weights("here", values, NUM_IDS, values.device)
    with pytest.raises(ValueError, match=f"{message} row {place}"):
        popularity_weights(values, "count", NUM_IDS)
