"""Sequences: what each split reads, what trains, and what is drawn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.train.config import DataConfig, override
from torchrec_compress.train.config_sequence import SequenceConfig
from torchrec_compress.train.data.batch import Share
from torchrec_compress.train.data.open import open_data
from torchrec_compress.train.data.sequences import SequenceData

LENGTHS = [9, 1, 4, 3, 13, 2]
ITEMS = 40


def made(max_length: int = 4, lengths: list[int] = LENGTHS, num_negatives: int = 5) -> SequenceData:
    """Return sequences of different items: those of the first are 0 to 8, and so on."""
    config = SequenceConfig(by="user", max_length=max_length, num_negatives=num_negatives)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    return SequenceData(torch.arange(int(offsets[-1]), dtype=torch.int32), offsets, ITEMS, config)


def _rows(data: SequenceData, split: str, **options) -> list[tuple[list[int], list[int], list[int]]]:
    """Return what was, what came next and what was held, by row."""
    found = []
    for batch in data.batches(split, 3, options.pop("seed", None), **options).epoch(0):
        parts = [batch.features[key].to_dense() for key in ("item", "item_next", "item_held")]
        found += [tuple(part.int().tolist() for part in row) for row in zip(*parts, strict=True)]
    return found


def test_each_split_reads_what_came_before_its_own_item():
    data = made()
    assert _rows(data, "test") == [
        ([4, 5, 6, 7], [8], [*range(8)]),
        ([10, 11, 12], [13], [10, 11, 12]),
        ([25, 26, 27, 28], [29], [*range(17, 29)]),
    ]
    assert _rows(data, "valid") == [
        ([3, 4, 5, 6], [7], [*range(7)]),
        ([10, 11], [12], [10, 11]),
        ([24, 25, 26, 27], [28], [*range(17, 28)]),
    ]


def test_each_pair_of_train_is_in_one_window_and_no_item_of_another_split_is_in_any():
    data = made()
    rows = _rows(data, "train")
    assert rows[:2] == [([2, 3, 4, 5], [3, 4, 5, 6], []), ([0, 1], [1, 2], [])]
    pairs = [pair for was, came, _ in rows for pair in zip(was, came, strict=True)]
    # the first, third and fifth sequence are split, the fourth and last train whole, and one item alone has no pair
    wanted = [*range(6), 10, *range(14, 16), *range(17, 27), 30]
    assert sorted(pairs) == [(item, item + 1) for item in wanted]
    ahead = {item for split in ("valid", "test") for _, came, _ in _rows(data, split) for item in came}
    assert len(ahead) == 6 and not ahead & {item for pair in pairs for item in pair}


def test_counts_are_of_what_trains_and_shares_of_them_add_up():
    data = made()
    counts = data.counts()["item"]
    ahead = {7, 8, 12, 13, 28, 29}
    assert counts.tolist() == [int(item not in ahead) if item < sum(LENGTHS) else 0 for item in range(ITEMS)]
    parts = [data.counts(Share(rank, 3))["item"] for rank in range(3)]
    assert torch.equal(sum(parts), counts)


def test_batches_are_the_same_on_any_number_of_ranks():
    data = made()
    whole = next(data.batches("train", 5, 7).epoch(1))
    parts = [next(data.batches("train", 5, 7, Share(rank, 2)).epoch(1)) for rank in range(2)]
    # an uneven share is filled up by a row that does not count
    assert [len(part.rows) for part in parts] == [3, 3] and float(parts[0].weights[2]) == 0.0
    rows = torch.cat([part.rows[part.weights > 0] for part in parts])
    assert torch.equal(rows, whole.rows)
    for part in parts:
        assert torch.equal(part.features["item_pool"].values(), whole.features["item_pool"].values())
    # the mean over ranks of each one's mean is the mean over all pairs
    lengths = whole.features["item"].lengths()
    torch.testing.assert_close(whole.weights, lengths / lengths.float().mean())
    mean = sum((part.weights / part.features["item"].lengths()).mean() for part in parts) / 2
    torch.testing.assert_close(mean, len(rows) / lengths.float().sum())


def test_a_batch_of_fewer_sequences_than_ranks_leaves_none_without():
    parts = [next(made().batches("train", 1, 7, Share(rank, 3)).epoch(0)) for rank in range(3)]
    assert [len(part.rows) for part in parts] == [1, 1, 1]
    assert sorted(float(part.weights) for part in parts) == [0.0, 0.0, 3.0]


def test_negatives_are_drawn_anew_by_seed_epoch_and_step_and_again_on_resuming():
    data = made(num_negatives=30)

    def pools(seed: int, epoch: int, first: int = 0) -> list[list[int]]:
        batches = data.batches("train", 4, seed).epoch(epoch, first)
        return [batch.features["item_pool"].values().tolist() for batch in batches]

    drawn = [*pools(0, 0), *pools(0, 1), *pools(1, 0)]
    assert len({tuple(pool) for pool in drawn}) == len(drawn) >= 6
    assert all(len(pool) == 30 and 0 <= min(pool) <= max(pool) < ITEMS for pool in drawn)
    assert pools(0, 0)[1:] == pools(0, 0, 1)


def test_validation_is_told_from_all_items_in_order():
    (batch,) = made().batches("valid", 9, None).epoch(0)
    assert batch.features["item_pool"].values().tolist() == [*range(ITEMS)]
    assert batch.features["item_pool"].lengths().tolist() == [ITEMS, 0, 0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lengths": [3, 3]}, "must have a sequence of 4 items, got 2 by 'user', of at most 3"),
        ({"lengths": []}, "must have a sequence of 4 items, got 0 by 'user', of at most 0"),
        ({"lengths": [41]}, r"items must be in \[0, 40\), got 0 to 40"),
        ({"num_negatives": 40}, "num_negatives: must be below the 40 items of 'item', got 40"),
    ],
)
def test_bad_sequences_are_refused(change, error):
    with pytest.raises(ValueError, match=error):
        made(**change)


def test_a_sequence_of_one_item_is_left_out_with_a_line(caplog):
    made()
    assert "1 of 6 sequences have fewer than two items and are left out" in caplog.text


@pytest.fixture
def file(tmp_path):
    """Five sessions of different lengths, shuffled together, clicks at different times."""
    rng = np.random.default_rng(0)
    sessions = rng.permutation(np.repeat(np.arange(5), [9, 4, 6, 5, 7]))
    films = np.arange(len(sessions)) * 2
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"session": sessions, "film": films, "kind": films % 3}), path, row_group_size=4)
    return path, sessions, films


def _config(path, **changes) -> DataConfig:
    sequence = {"by": "session", "item": "film", "num_negatives": 3, **changes.pop("sequence", {})}
    return override(DataConfig(kind="parquet", path=str(path)), {"sequence": sequence, **changes})


def test_rows_of_a_file_are_grouped_in_the_order_of_the_file(file):
    path, sessions, films = file
    data = open_data(_config(path))
    assert isinstance(data, SequenceData) and data.vocab == [61]
    wanted = [films[sessions == session].tolist() for session in range(5)]
    assert data.items.tolist() == [film for each in wanted for film in each]
    # a filter and a larger table
    few = open_data(_config(path, row_filter="kind != 0", vocab={"film": 100}))
    assert few.vocab == [100]
    assert few.items.tolist() == [film for each in wanted for film in each if film % 3]


def test_a_drawn_order_is_another_for_each_seed_and_keeps_sequences_together(file):
    path, sessions, films = file
    orders = [open_data(_config(path, sequence={"order": "drawn", "order_seed": seed})) for seed in (0, 0, 1)]
    assert torch.equal(orders[0].items, orders[1].items) and not torch.equal(orders[0].items, orders[2].items)
    for data in orders:
        for session, (first, last) in enumerate(zip(data.offsets[:-1], data.offsets[1:], strict=True)):
            assert sorted(data.items[first:last].tolist()) == films[sessions == session].tolist()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sequence": {"by": "user"}}, "must have the column 'user'"),
        ({"sequence": {"item": "movie"}}, "must have the column 'movie'"),
        ({"vocab": {"film": 60}}, r"ids of column 'film' must be in \[0, 60\), got 60"),
        ({"vocab": {"session": 60}}, r"data\.vocab: must name features of \['film'\], got \['session'\]"),
        ({"path": "nowhere.parquet"}, r"data\.path: must be a Parquet file"),
    ],
)
def test_bad_files_are_refused(file, changes, error):
    with pytest.raises(ValueError, match=error):
        open_data(_config(**{"path": file[0], **changes}))


def test_clicks_of_the_generator_are_sequences_too():
    generator = {"num_rows": 400, "num_users": 20, "num_items": 30, "num_clusters": 2}
    config = override(DataConfig(), {"generator": generator, "sequence": {"by": "user", "num_negatives": 3}})
    data, clicks = open_data(config), open_data(override(config, {"sequence.by": None}))
    number = sum(int(clicks.split(name).labels.sum()) for name in ("train", "valid", "test"))
    assert len(data.items) == number and data.vocab == [30]
    with pytest.raises(
        ValueError, match=r"data\.sequence\.by: must be a column of .*, got 'users'; did you mean 'user'"
    ):
        open_data(override(config, {"sequence.by": "users"}))
