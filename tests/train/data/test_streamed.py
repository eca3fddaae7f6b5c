"""Streamed readers: what a global batch holds, who reads it, and where a reader continues."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import Batch, Layout, Share
from torchrec_compress.train.data.memory import Split
from torchrec_compress.train.data.prefetch import prefetch, read_ahead
from torchrec_compress.train.data.streamed import Chunks, StreamedData

_LAYOUT = Layout(["user", "tags"], (1, 2), ragged=True)


class _Memory(Chunks):
    """Chunks of numbered rows, which write down what is read."""

    whole = False
    where = "memory"

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.read_rows, self.threads = sizes, [], set()

    def read(self, chunk: int, first: int, last: int) -> Split:
        start = sum(self.sizes[:chunk])
        rows = torch.arange(start + first, start + last)
        self.read_rows += rows.tolist()
        self.threads.add(threading.current_thread().name)
        ids = torch.stack([rows % 7, rows % 5, torch.where(rows % 2 == 0, -1, rows % 3)], dim=1).int()
        return Split(ids, (rows % 2).float(), rows[:, None].float(), (rows % 3).to(torch.int8))


def _data(sizes: list[int], **config) -> StreamedData:
    settings = DataConfig(**{"lanes": 4, "window": 2, "num_workers": 0, **config})
    splits: dict[str, Chunks] = {name: _Memory(sizes) for name in ("train", "valid", "test")}
    return StreamedData(settings, [7, 5], 1, _LAYOUT, splits)


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("labels", "dense", "rows", "kinds", "weights")]
    pairs += [(one.features.values(), other.features.values()), (one.features.lengths(), other.features.lengths())]
    return all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    per_lane=st.integers(1, 4),
    window=st.integers(1, 3),
    world=st.sampled_from([1, 2, 4]),
    seed=st.sampled_from([None, 0, 3]),
)
def test_shares_make_up_the_batches_of_one_rank(sizes, per_lane, window, world, seed):
    sizes = [*sizes, 4]  # a row for every rank
    data, batch_size = _data(sizes, window=window), 4 * per_lane
    whole = data.batches("train", batch_size, seed)
    shares = [data.batches("train", batch_size, seed, Share(rank, world)) for rank in range(world)]
    seen = []
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole.epoch(2), *(share.epoch(2) for share in shares), strict=True):
        assert len({len(part.rows) for part in parts}) == 1
        real = [part.rows[part.weights > 0] for part in parts]
        assert torch.equal(torch.cat(real), batch.rows) and torch.equal(batch.weights, torch.ones(len(batch.rows)))
        loss = sum(float((part.dense[:, 0] * part.weights).mean()) for part in parts) / world
        assert loss == pytest.approx(float(batch.dense.mean()), rel=1e-5, abs=1e-5)
        assert torch.equal(batch.dense[:, 0].long(), batch.rows) and torch.equal(batch.labels, (batch.rows % 2).float())
        assert torch.equal(batch.features["user"].values(), (batch.rows % 7).int())
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(sum(sizes)))
    assert all(len(batch.rows) == batch_size for batch in list(whole.epoch(0))[:-1])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_step_can_be_resumed(world, num_workers):
    data = _data([5, 9, 3, 8, 7, 2, 6, 5], num_workers=num_workers)
    for rank in range(world):
        batches = data.batches("train", 8, 5, Share(rank, world))
        whole = list(batches.epoch(1))
        for first in range(len(whole) + 1):
            later = list(batches.epoch(1, first))
            assert len(later) == len(whole) - first
            assert all(_equal(one, other) for one, other in zip(whole[first:], later, strict=True))


def test_a_rank_reads_its_own_part_once_and_a_resumed_one_skips_the_rest():
    sizes = [10] * 16
    read = []
    for rank in range(2):
        data = _data(sizes, window=1)
        list(data.batches("train", 8, 0, Share(rank, 2)).epoch(0))
        read.append(data.chunks("train").read_rows)
        assert len(read[-1]) == 80 == len(set(read[-1]))
    assert sorted(read[0] + read[1]) == list(range(160))
    data = _data(sizes, window=1)  # step 13 of 20: of each lane's four windows two are over
    list(data.batches("train", 8, 0, Share(1, 2)).epoch(0, 13))
    assert len(data.chunks("train").read_rows) == 2 * 20


@pytest.mark.parametrize("change", [{}, {"sizes": [160], "window": 1}])
def test_epochs_and_seeds_differ_and_the_order_is_mixed(change):
    """Of chunks, and within the only chunk of a lane."""
    data = _data(**{"sizes": [10] * 16, **change})
    rows = [
        torch.cat([batch.rows for batch in data.batches("train", 8, seed).epoch(epoch)])
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    lanes = [rows[0].view(-1, 4, 2)[:, lane].reshape(-1) for lane in range(4)]
    assert float((lanes[0][1:] == lanes[0][:-1] + 1).float().mean()) < 0.2
    assert not torch.equal(lanes[0] - lanes[0].min(), lanes[1] - lanes[1].min())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_of_shares_add_up(num_workers):
    sizes = [5, 9, 3, 8, 7, 2, 6, 5]
    data = _data(sizes, num_workers=num_workers)
    rows = torch.arange(sum(sizes))
    total = data.counts()
    assert torch.equal(total["user"], torch.bincount(rows % 7, minlength=7))
    assert int(total["tags"].sum()) == len(rows) + int((rows % 2).sum())
    parts = [data.counts(Share(rank, 4)) for rank in range(4)]
    assert all(torch.equal(sum(part[name] for part in parts), total[name]) for name in total)


@pytest.mark.parametrize(
    ("change", "batch_size", "share", "message"),
    [
        ({}, 6, Share(), "must divide the batch size, got 4 lanes for 6 rows"),
        ({}, 0, Share(), "must divide the batch size"),
        ({}, 8, Share(0, 3), "multiple of the 3 ranks, got 4"),
        ({"lanes": 8}, 8, Share(0, 8), "row for each of 8 ranks, got 6"),
        ({"lanes": 0}, 8, Share(), r"data\.lanes: must be positive"),
        ({"window": 0}, 8, Share(), r"data\.window: must be positive"),
        ({"num_workers": -1}, 8, Share(), r"data\.num_workers: must not be negative"),
    ],
)
def test_bad_settings_name_their_key(change, batch_size, share, message):
    with pytest.raises(ValueError, match=message):
        _data([3, 3], **change).batches("train", batch_size, 0, share)


def test_an_unknown_split_and_an_empty_one_are_refused():
    with pytest.raises(ValueError, match="split: must be one of"):
        _data([5]).num_rows("tests")
    with pytest.raises(ValueError, match="train split must have rows"):
        _data([])
    data = _data([5, 5])
    data.chunks("train").whole = True
    with pytest.raises(ValueError, match="at least as many row groups"):
        data.batches("train", 4, 0)
    assert len(data.batches("train", 4, None)) == 3


def test_rows_are_read_once_in_order_with_any_batch_size():
    data = _data([5, 4, 6], lanes=6)
    for batch_size in (4, 5, 6, 100):
        batches = [batch.rows for batch in data.batches("valid", batch_size, None).epoch(0)]
        assert sorted(torch.cat(batches).tolist()) == list(range(15)) and len(batches) == -(-15 // batch_size)
    with pytest.raises(ValueError, match="multiple of the 2 ranks"):
        data.batches("valid", 5, None, Share(0, 2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_pinned_for_a_gpu(monkeypatch, num_workers):
    pinned = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    splits: dict[str, Chunks] = {name: _Memory([8, 8]) for name in ("train", "valid", "test")}
    data = StreamedData(DataConfig(lanes=2, num_workers=num_workers), [7, 5], 1, _LAYOUT, splits, pin_memory=True)
    assert len(list(data.batches("train", 4, 0).epoch(0))) == 4 == len(pinned)


class _Broken(_Memory):
    def read(self, chunk: int, first: int, last: int) -> Split:
        if chunk == 6:
            raise ValueError("file 6: row 3 is bad")
        return super().read(chunk, first, last)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_errors_of_workers_reach_the_caller_and_threads_end(num_workers):
    before = threading.active_count()
    splits: dict[str, Chunks] = {name: _Broken([4] * 8) for name in ("train", "valid", "test")}
    data = StreamedData(DataConfig(lanes=2, window=1, num_workers=num_workers), [7, 5], 1, _LAYOUT, splits)
    good = []
    with pytest.raises(ValueError, match="file 6: row 3 is bad"):
        for batch in data.batches("train", 4, None).epoch(0):
            good.append(batch)
    assert 1 <= len(good) <= 4
    with pytest.raises(ValueError, match="file 6"):
        data.counts()
    assert threading.active_count() == before
    if num_workers:
        assert all(name.startswith("reader") for name in splits["train"].threads)


def test_a_reader_that_is_left_early_leaves_no_thread():
    before = threading.active_count()
    epoch = _data([9] * 20, num_workers=2).batches("train", 8, 0).epoch(0)
    next(epoch)
    epoch.close()
    assert threading.active_count() == before


def test_prefetch_keeps_the_order_and_is_ahead():
    drawn = threading.Semaphore(0)
    data = _data([8] * 4)

    def source():
        for batch in data.batches("train", 8, None).epoch(0):
            yield batch
            drawn.release()

    ahead = prefetch(source(), depth=2)
    first = next(ahead)
    assert drawn.acquire(timeout=20) and drawn.acquire(timeout=20)  # drawn though nobody asked for the second
    rows = torch.cat([first.rows, *(batch.rows for batch in ahead)])
    assert torch.equal(rows, torch.cat([batch.rows for batch in data.batches("train", 8, None).epoch(0)]))
    assert list(read_ahead(None, [lambda: 1])) == [1]


def test_a_window_shuffles_only_its_own_chunks():
    data = _data([10] * 8, lanes=1, window=2)
    rows = torch.cat([batch.rows for batch in data.batches("train", 20, 0).epoch(0)]).view(4, 20)
    for window in rows:
        assert len(set((window // 10).tolist())) == 2 and not torch.equal(window.sort().values, window)


def test_batches_are_views_of_nothing_that_changes():
    data = _data([6] * 6)
    kept = list(data.batches("train", 8, 0).epoch(0))
    copies = [replace(batch, rows=batch.rows.clone()) for batch in kept]
    list(data.batches("train", 8, 0).epoch(1))
    assert all(torch.equal(one.rows, other.rows) for one, other in zip(kept, copies, strict=True))
    assert np.array_equal(kept[0].weights.numpy(), np.ones(8, dtype=np.float32))
