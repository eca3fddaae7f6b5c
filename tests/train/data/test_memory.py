from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.train.config import DataConfig, GeneratorConfig
from torchrec_compress.train.data.batch import Batch, Layout, Share
from torchrec_compress.train.data.open import load_data, open_data


def _columns(num_rows: int = 90) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    split = np.tile(np.array([0, 0, 1, 2], dtype=np.int8), num_rows)[:num_rows]
    return {
        "label": rng.integers(0, 2, num_rows),
        "user": rng.integers(0, 9, num_rows),
        "item": rng.integers(0, 5, num_rows),
        "rating": rng.integers(1, 6, num_rows),
        "split": split,
    }


def _write(path, columns, vocab=None):
    table = pa.table(columns)
    if vocab:
        table = table.replace_schema_metadata({"vocab": json.dumps(vocab)})
    pq.write_table(table, path)
    return DataConfig(kind="parquet", path=str(path), features=["user", "item"])


def test_parquet_is_read_whole_and_filtered(tmp_path):
    columns = _columns()
    config = _write(tmp_path / "a.parquet", columns, {"user": 50, "item": 5})
    data = load_data(config)
    assert data.features == ["user", "item"] and data.vocab == [50, 5]
    train = columns["split"] == 0
    assert np.array_equal(data.train.ids[:, 0].numpy(), columns["user"][train])
    assert np.array_equal(data.train.labels.numpy(), columns["label"][train])
    filtered = load_data(DataConfig(**{**vars(config), "row_filter": "rating != 3", "features": []}))
    assert len(filtered.train) == int((train & (columns["rating"] != 3)).sum())
    assert filtered.features == ["user", "item"]


def test_labels_by_threshold_and_drawn_split(tmp_path):
    columns = _columns()
    config = _write(tmp_path / "a.parquet", columns)
    changed = {"label": "rating", "positive_from": 4, "split": None, "fractions": [0.5, 0.2], "split_seed": 3}
    first = load_data(DataConfig(**{**vars(config), **changed}))
    again = load_data(DataConfig(**{**vars(config), **changed}))
    assert torch.equal(first.test.ids, again.test.ids)
    other = load_data(DataConfig(**{**vars(config), **changed, "split_seed": 4}))
    assert len(first.test) != len(other.test) or not torch.equal(first.test.ids, other.test.ids)
    assert [len(split) / 90 for split in (first.train, first.valid, first.test)] == pytest.approx(
        [0.5, 0.2, 0.3], abs=0.12
    )
    total = sum(float(split.labels.sum()) for split in (first.train, first.valid, first.test))
    assert total == (columns["rating"] >= 4).sum()


def test_subsample_by_a_column_keeps_ids_whole(tmp_path):
    config = _write(tmp_path / "a.parquet", _columns(900))
    data = load_data(DataConfig(**{**vars(config), "subsample": 0.5, "subsample_by": "user"}))
    whole = load_data(config)
    kept = set(data.train.ids[:, 0].tolist())
    assert 0 < len(kept) < 9
    assert len(data.train) == sum(int((whole.train.ids[:, 0] == user).sum()) for user in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "column 'label'"),
        ({"user": np.arange(90.0)}, "int type"),
        ({"user": np.arange(90) - 1}, r"\[0, .*got -1"),
        ({"item": np.arange(90)}, r"\[0, 5\), got 5 in row 5"),
        ({"label": np.arange(90)}, "0 and 1"),
        ({"split": np.zeros(90, dtype=np.int8)}, "valid split must have rows"),
        ({"split": np.full(90, 7)}, "hold 0, 1 and 2"),
        ({"user": pa.array([None, *range(89)], pa.int64())}, "missing values"),
    ],
)
def test_bad_parquet_is_refused(tmp_path, change, message):
    columns = {name: value for name, value in {**_columns(), **change}.items() if value is not None}
    config = _write(tmp_path / "a.parquet", columns, {"user": 100, "item": 5})
    with pytest.raises(ValueError, match=message):
        load_data(config)


def _frame(path, streamed: bool = False, metadata=None, change=None, **more) -> DataConfig:
    """Write what pandas would, with a column for its index, and return a config that names no features."""
    columns = {**_columns(), "split": np.sort(_columns()["split"]), **more}
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    splits = columns["split"]
    with pq.ParquetWriter(path, table.schema) as writer:
        for split in range(3):
            writer.write_table(table.filter(splits == split))
    start = {"kind": "parquet", "path": str(path), "drop": ["rating"], "streaming": streamed, "lanes": 1}
    return DataConfig(**{**start, **(change or {})})


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("__index_level_0__", None),
        ("__index_level_12__", []),
        ("row", ["row"]),
        ("row", ["row", {"kind": "range", "name": None, "start": 0, "stop": 90, "step": 1}]),
    ],
)
def test_an_index_of_pandas_is_no_feature(tmp_path, caplog, streamed, name, noted):
    metadata = None if noted is None else {"pandas": json.dumps({"index_columns": noted, "columns": []})}
    index = np.arange(90) + 1000
    config = _frame(tmp_path / "a.parquet", streamed, metadata, **{name: index})
    assert open_data(config).features == ["user", "item"]
    [said] = caplog.messages
    assert f"['{name}'] is an index that pandas wrote" in said
    asked = replace(config, features=["user", name])
    assert open_data(asked).features == ["user", name], "what is asked for by name is read"
    assert f"column '{name}' has an id of its own in every row" in caplog.messages[-1]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_range_of_pandas_hides_no_column(tmp_path, caplog, streamed):
    noted = {"index_columns": [{"kind": "range", "name": None, "start": 0, "stop": 90, "step": 1}], "columns": []}
    config = _frame(tmp_path / "a.parquet", streamed, {"pandas": json.dumps(noted)})
    assert open_data(config).features == ["user", "item"] and not caplog.messages


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_that_number_the_rows_are_warned_of(tmp_path, caplog, streamed):
    numbers = np.random.default_rng(0).permutation(90)
    config = _frame(tmp_path / "a.parquet", streamed, impression=numbers)
    assert open_data(config).features == ["user", "item", "impression"]
    [said] = caplog.messages
    assert "column 'impression' has an id of its own in every row" in said and "data.drop" in said


@pytest.mark.parametrize("streamed", [False, True])
def test_the_metadata_names_the_features_where_it_is_there(tmp_path, caplog, streamed):
    metadata = {"vocab": json.dumps({"item": 5, "user": 9}), "pandas": json.dumps({"index_columns": ["user"]})}
    config = _frame(tmp_path / "a.parquet", streamed, metadata, impression=np.arange(90))
    assert open_data(config).features == ["item", "user"] and not caplog.messages


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["type", "keys", "pop", "a.b", "", "a@b", "a\nb"])
def test_columns_that_cannot_be_tables_are_named(tmp_path, streamed, name):
    config = _frame(tmp_path / "a.parquet", streamed, **{name: np.arange(90) % 5})
    with pytest.raises(ValueError, match=rf"a\.parquet: column {re.escape(repr(name))}: must"):
        open_data(config)
    assert open_data(replace(config, drop=["rating", name])).features == ["user", "item"]
    assert open_data(replace(config, features=["user"])).features == ["user"]


@pytest.mark.parametrize("streamed", [False, True])
def test_odd_columns_are_read_as_plain_ones(tmp_path, streamed):
    odd = ["a b", "a/b", "*", "größe", "-a", "1", "x.user", "z.b"]
    others = {name: np.arange(90) % 5 for name in odd}
    config = _frame(tmp_path / "a.parquet", streamed, **others, z=np.arange(90) % 3)
    names = [name for name in odd if "." not in name]
    config = replace(config, features=["user", "z", *names], drop=[])
    data = open_data(config)
    assert data.features == config.features and data.vocab == [9, 3, *[5] * len(names)], "z is not the column z.b"
    assert len(next(open_data(config).batches("train", 4, None).epoch(0)).labels) == 4


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({"drop": ["ratng"]}, None, r"data\.drop: must name columns of .*did you mean 'rating'"),
        ({"features": ["user", "label"]}, None, r"data\.features: must not hold the column 'label'"),
        ({}, {"vocab": "{'user': '9'}"}, r"the schema metadata 'vocab' must map columns to sizes, got {'user': '9'}"),
        ({}, {"vocab": "{'user': 0}"}, "must map columns to sizes"),
        ({}, {"vocab": "[1, 2]"}, "must map columns to sizes, got"),
        ({}, {"vocab": "__import__('os')"}, "'vocab' must be a mapping"),
        ({}, {"vocab": "{[]: 1}"}, "'vocab' must be a mapping"),
        ({}, {"pandas": "{"}, "'pandas' must be a JSON mapping"),
        ({}, {"pandas": "[1]"}, "'pandas' must be a JSON mapping"),
    ],
)
def test_bad_metadata_and_keys_of_columns_are_refused(tmp_path, streamed, change, metadata, message):
    with pytest.raises(ValueError, match=message):
        open_data(_frame(tmp_path / "a.parquet", streamed, metadata, change))


def test_columns_of_one_name_are_refused(tmp_path):
    columns = _columns()
    table = pa.Table.from_arrays([pa.array(value) for value in columns.values()] * 2, [*columns, *columns])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="columns must have different names, got 'label' twice"):
        load_data(DataConfig(kind="parquet", path=str(tmp_path / "a.parquet")))


def test_files_that_are_no_parquet_are_refused(tmp_path):
    empty = tmp_path / "empty.parquet"
    empty.touch()
    for path, message in ((empty, "must be a Parquet file, got 0 bytes"), (tmp_path / "none", "does not exist")):
        with pytest.raises(ValueError, match=message):
            load_data(DataConfig(kind="parquet", path=str(path)))
    with pytest.raises(ValueError, match="must have rows"):
        load_data(_write(tmp_path / "b.parquet", {name: value[:0] for name, value in _columns().items()}))
    with pytest.raises(ValueError, match=r"data\.path"):
        load_data(DataConfig(kind="parquet"))


@pytest.mark.parametrize("option", [{"row_filter": "rating ~ 3"}, {"subsample": 0.0}, {"vocab": {"usr": 3}}])
def test_bad_options_name_their_key(tmp_path, option):
    config = _write(tmp_path / "a.parquet", _columns())
    with pytest.raises(ValueError, match=f"data.{next(iter(option))}"):
        load_data(DataConfig(**{**vars(config), **option}))


def _criteo(folder, num_rows=60, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "dense": rng.random((num_rows, 13), dtype=np.float32),
        "sparse": rng.integers(-(2**31), 2**31 - 1, (num_rows, 26)).astype(np.int32),
        "labels": rng.integers(0, 2, (num_rows, 1)).astype(np.int32),
    }
    for kind, array in {**arrays, **change}.items():
        np.save(folder / f"day_0_{kind}.npy", array)
    return DataConfig(kind="criteo", path=str(folder), hash_size=100)


def test_criteo_files_are_read_as_torchrec_reads_them(tmp_path):
    data = load_data(_criteo(tmp_path))
    assert len(data.train) + len(data.valid) + len(data.test) == 60
    assert data.num_dense == 13 and data.vocab == [100] * 26
    assert int(data.train.ids.min()) >= 0 and int(data.train.ids.max()) < 100


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchrec's reader leaves its file open
def test_criteo_tsv_is_converted_once(tmp_path):
    row = "\t".join(["1", *["5"] * 13, *["68fd1e64"] * 26])
    path = tmp_path / "train.txt"
    path.write_text((row + "\n") * 40)
    config = DataConfig(kind="criteo", path=str(path), hash_size=10)
    assert torch.equal(load_data(config).train.ids, load_data(config).train.ids)
    assert int(load_data(config).train.ids[0, 0]) == np.int64(0x68FD1E64).astype(np.int32) % 10


def test_bad_criteo_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold as many"):
        load_data(DataConfig(kind="criteo", path=str(tmp_path)))
    nan = np.full((60, 13), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="NaN"):
        load_data(_criteo(tmp_path, dense=nan))
    with pytest.raises(ValueError, match="hash_size"):
        load_data(DataConfig(**{**vars(_criteo(tmp_path)), "hash_size": None}))


def test_generator_is_a_function_of_its_seed():
    config = GeneratorConfig(num_rows=500, num_users=40, num_items=20)
    first, again = (load_data(DataConfig(generator=config)) for _ in range(2))
    other = load_data(DataConfig(generator=GeneratorConfig(num_rows=500, num_users=40, num_items=20, seed=8)))
    assert torch.equal(first.train.ids, again.train.ids) and not torch.equal(first.train.ids, other.train.ids)
    with pytest.raises(ValueError, match=r"data\.generator"):
        load_data(DataConfig(generator=GeneratorConfig(num_rows=3)))


def test_the_default_generator_has_a_table_over_100_000_rows():
    assert GeneratorConfig().num_users > 100_000


def test_batches_cover_an_epoch_and_resume_in_the_middle(data):
    batches = data.batches("train", 300, seed=5)
    whole = list(batches.epoch(2))
    assert len(whole) == len(batches) == 11
    assert torch.cat([batch.rows for batch in whole]).sort().values.equal(torch.arange(len(data.train)))
    later = list(batches.epoch(2, first=7))
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(whole[7:], later, strict=True))
    assert not torch.equal(next(batches.epoch(0)).rows, next(batches.epoch(1)).rows)
    batch = whole[-1]
    assert len(batch.labels) == 200
    assert torch.equal(batch.features["item"].values(), data.train.ids[batch.rows, 1])
    assert batch.features["item"].lengths().tolist() == [1] * 200


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_shares_are_a_partition_of_the_global_batch(data, world, split):
    seed = 5 if split == "train" else None
    whole = data.batches(split, 300, seed)
    shares = [data.batches(split, 300, seed, Share(rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole.epoch(1), *(share.epoch(1) for share in shares), strict=True):
        assert torch.equal(batch.weights, torch.ones(len(batch.rows)))
        assert torch.equal(torch.cat([part.rows[part.weights > 0] for part in parts]), batch.rows)
        assert len({len(part.rows) for part in parts}) == 1
        loss = sum(float((part.labels * part.weights).mean()) for part in parts) / world
        assert loss == pytest.approx(float(batch.labels.mean()), abs=1e-6)


def test_shares_of_an_epoch_resume_and_count(data):
    share = Share(1, 3)
    whole, later = (list(data.batches("train", 300, 5, share).epoch(2, first)) for first in (0, 7))
    for one, other in zip(whole[7:], later, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.features.values(), other.features.values())
    parts = [data.counts(Share(rank, 3)) for rank in range(3)]
    for name, total in data.counts().items():
        assert torch.equal(sum(part[name] for part in parts), total) and int(total.sum()) == len(data.train)


def test_batches_can_be_moved(data):
    batch = next(data.batches("train", 4, 0).epoch(0))
    moved = batch.to(torch.device("meta"))
    assert moved.labels.is_meta and moved.features.values().is_meta and moved.weights.is_meta and moved.kinds is None


def test_rows_with_several_ids_become_jagged_features():
    ids = torch.tensor([[1, 5, 6, -1], [2, -1, -1, -1], [3, 7, 8, 9]], dtype=torch.int32)
    found = Layout(["user", "tags"], (1, 3), ragged=True).to_features(ids)
    assert found["user"].values().tolist() == [1, 2, 3] and found["tags"].values().tolist() == [5, 6, 7, 8, 9]
    assert found["tags"].lengths().tolist() == [2, 0, 3] and found.offsets().tolist() == [0, 1, 2, 3, 5, 5, 8]
    fixed = Layout(["user", "tags"], (1, 2)).to_features(ids[[0, 2], :3])
    assert fixed["tags"].values().tolist() == [5, 6, 7, 8] and fixed["tags"].lengths().tolist() == [2, 2]
    with pytest.raises(ValueError, match="rank must be"):
        Share(2, 2)


def test_batches_in_memory_are_pinned_for_a_gpu(data, monkeypatch):
    pinned = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    rows = [batch.rows for batch in replace(data, pin_memory=True).batches("train", 300, 5).epoch(0)]
    assert len(pinned) == len(rows) == 11
    assert torch.equal(torch.cat(rows), torch.cat([b.rows for b in data.batches("train", 300, 5).epoch(0)]))
    assert open_data(DataConfig(generator=GeneratorConfig(num_rows=99, num_users=9, num_items=9)), True).pin_memory


def test_a_subsample_by_a_column_of_bools_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"user": np.arange(90) % 9, "label": np.arange(90) % 2, "split": np.repeat([0, 1, 2], 30)}
    pq.write_table(pa.table({**columns, "is_new": np.arange(90) % 2 == 0}), path)
    with pytest.raises(ValueError, match=r"data.subsample_by: column 'is_new' must hold ids, got bools"):
        load_data(DataConfig(kind="parquet", path=str(path), drop=["is_new"], subsample=0.5, subsample_by="is_new"))


def test_a_file_of_no_ids_is_refused_with_what_its_columns_are_used_for(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"user": np.arange(90) % 9, "label": np.arange(90) % 2, "split": np.repeat([0, 1, 2], 30)}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=r"besides those of other use, \['label', 'split', 'user'\], got"):
        load_data(DataConfig(kind="parquet", path=str(path), row_filter="user < 5"))
