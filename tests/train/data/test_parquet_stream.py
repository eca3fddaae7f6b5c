from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import Share
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.open import load_data, open_data
from torchrec_compress.train.data.parquet_schema import parquet_files


def _columns(num_rows: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, num_rows)
    labels = rng.integers(0, 2, num_rows)
    return {
        "label": labels,
        "user": rng.integers(0, 9, num_rows),
        "tags": pa.array([rng.integers(0, 6, length).tolist() for length in lengths], pa.list_(pa.int64())),
        "price": rng.random(num_rows).astype(np.float32),
        "split": np.sort(rng.integers(0, 3, num_rows)),
        "kind": np.where(labels == 1, 0, rng.integers(1, 3, num_rows)),
    }


def _write(path, columns, vocab=None, rows=10):
    table = pa.table(columns)
    if vocab:
        table = table.replace_schema_metadata({"vocab": json.dumps(vocab)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema) as writer:  # a group ends where the split changes
        splits = table["split"].to_numpy() if "split" in table.column_names else np.zeros(len(table))
        for split in np.unique(splits):
            writer.write_table(table.filter(splits == split), row_group_size=rows)


def _config(path, **change) -> DataConfig:
    start = {"kind": "parquet", "path": str(path), "streaming": True, "lanes": 4, "window": 2, "num_workers": 0}
    features = {"features": ["user", "tags"], "dense": ["price"], "pooling": {"tags": 3}, "kind_column": "kind"}
    return DataConfig(**{**start, **features, **change})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_rows_are_those_in_memory(tmp_path, num_workers):
    for number in range(3):
        _write(tmp_path / f"part_{number}.parquet", _columns(157, number))
    config = _config(tmp_path, num_workers=num_workers)
    streamed, whole = open_data(config), load_data(replace(config, streaming=False))
    assert streamed.vocab == whole.vocab == [9, 6] and streamed.num_dense == whole.num_dense == 1
    assert streamed.layout == whole.layout
    for split in ("train", "valid", "test"):
        assert streamed.num_rows(split) == whole.num_rows(split)
        batches = [list(data.batches(split, 8, None).epoch(0)) for data in (streamed, whole)]
        order = torch.cat([batch.rows for batch in batches[0]])
        assert torch.equal(order.sort().values, torch.arange(streamed.num_rows(split)))
        for name in ("labels", "dense", "kinds"):
            one, other = (torch.cat([getattr(batch, name) for batch in part]) for part in batches)
            assert torch.equal(one, other[order]), name
        lengths = [torch.cat([batch.features["tags"].lengths() for batch in part]) for part in batches]
        assert torch.equal(lengths[0], lengths[1][order])
    for name, count in streamed.counts().items():
        assert torch.equal(count, whole.counts()[name])


def test_shares_and_resumption_over_files(tmp_path):
    for number in range(3):
        _write(tmp_path / f"part_{number}.parquet", _columns(157, number))
    data = open_data(_config(tmp_path, num_workers=2))
    whole = list(data.batches("train", 12, 3).epoch(1))
    for world in (1, 2, 4):
        parts = [data.batches("train", 12, 3, Share(rank, world)).epoch(1, 5) for rank in range(world)]
        for batch, *shares in zip(whole[5:], *parts, strict=True):
            assert torch.equal(torch.cat([share.rows[share.weights > 0] for share in shares]), batch.rows)


def test_folders_and_chunks_can_be_the_splits(tmp_path):
    for number, split in enumerate(("train", "valid", "test")):
        columns = {**_columns(50 + number, number), "split": np.zeros(50 + number, dtype=np.int64)}
        _write(tmp_path / "folders" / split / "a.parquet", columns)
    by_folder = open_data(_config(tmp_path / "folders"))
    assert [by_folder.num_rows(split) for split in ("train", "valid", "test")] == [50, 51, 52]
    for number in range(4):
        _write(tmp_path / "files" / f"{number}.parquet", {**_columns(40, number), "split": np.zeros(40)}, rows=10)
    change = {"split": None, "drop": ["split"]}
    last = open_data(_config(tmp_path / "files", split_by="last_file", **change))
    assert [last.num_rows(split) for split in ("train", "valid", "test")] == [120, 20, 20]
    order = open_data(_config(tmp_path / "files", split_by="order", fractions=[0.5, 0.25], **change))
    assert [order.num_rows(split) for split in ("train", "valid", "test")] == [80, 40, 40]
    drawn = [open_data(_config(tmp_path / "files", fractions=[0.4, 0.3], **change)).num_rows("train") for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0] % 10 == 0
    memory = load_data(_config(tmp_path / "files", split_by="last_file", streaming=False, **change))
    assert [memory.num_rows(split) for split in ("train", "valid", "test")] == [120, 20, 20]


def test_metadata_states_the_rows_of_tables(tmp_path):
    _write(tmp_path / "a.parquet", _columns(90), {"user": 50, "tags": 7})
    assert open_data(_config(tmp_path / "a.parquet")).vocab == [50, 7]
    assert open_data(_config(tmp_path / "a.parquet", vocab={"user": 60})).vocab == [60, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": np.arange(90)}, r"a\.parquet: ids of column 'user' must be in \[0, 9\), got 9 in row 9"),
        ({"user": np.arange(90) - 40}, r"must be in \[0, 9\), got -40 in row 0"),
        ({"label": np.arange(90) // 45 * 2, "kind": np.ones(90, np.int64)}, "must hold 0 and 1, got 2 in row 45"),
        ({"price": np.where(np.arange(90) == 7, np.nan, 1.0)}, "'price' must be finite, got nan in row 7"),
        ({"user": pa.array([*range(8), None, *([1] * 81)], pa.int64())}, "missing values, got 1, first in row 8"),
        ({"tags": pa.array([[1, 2, 3, 4]] * 90)}, "at most data.pooling = 3 ids per row, got 4 in row 0"),
        ({"tags": pa.array([[1, -2]] * 90)}, "ids of column 'tags' must not be negative, got -2"),
        ({"tags": pa.array([[1, None]] * 90)}, "lists of column 'tags' must have no missing values"),
        ({"tags": pa.array([[1, 9]] * 90)}, r"ids of column 'tags' must be in \[0, 6\), got 9 in row 0"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_named_when_they_are_read(tmp_path, change, message, num_workers):
    columns = {**_columns(90), "split": np.zeros(90, dtype=np.int64), **change}
    for split in ("train", "valid", "test"):
        _write(tmp_path / split / "a.parquet", columns, {"user": 9, "tags": 6}, rows=90)
    data = open_data(_config(tmp_path, num_workers=num_workers))
    with pytest.raises(ValueError, match=message):
        list(data.batches("valid", 4, None).epoch(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_filter": "user != 3"}, r"data\.row_filter: must not be set"),
        ({"subsample": 0.5}, r"data\.subsample: must not be set"),
        ({"pooling": {}}, r"data\.pooling: must state the most ids per row .* \['tags'\]"),
        ({"pooling": {"tags": 3, "user": 2}}, r"data\.pooling: must name columns of lists"),
        ({"features": ["usr"]}, "must have the column 'usr'.*did you mean 'user'"),
        ({"features": ["price", "tags"], "dense": []}, "'price' must be of an int type"),
        ({"label": "tags"}, "'tags' must be of an int type"),
        ({"split": "user", "features": ["tags"]}, "must lie in one split, but its column 'user' holds 0 to 8; sort"),
        ({"vocab": {"usr": 4}}, r"data\.vocab: must name features"),
        ({"kind": "generator"}, r"data\.streaming: must be false with data.kind = 'generator'"),
    ],
)
def test_bad_files_are_refused_when_they_are_opened(tmp_path, change, message):
    _write(tmp_path / "a.parquet", _columns(90))
    with pytest.raises(ValueError, match=message):
        open_data(_config(tmp_path, **change))


def test_files_that_are_cut_off_or_of_another_schema_are_refused(tmp_path):
    _write(tmp_path / "a.parquet", _columns(90))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"b\.parquet: must be a Parquet file, got {len(whole) - 9} bytes"):
        open_data(_config(tmp_path))
    columns = _columns(20)
    _write(tmp_path / "b.parquet", {name: value for name, value in columns.items() if name != "price"})
    with pytest.raises(ValueError, match=r"b\.parquet: must have the column 'price'"):
        open_data(_config(tmp_path))
    _write(tmp_path / "b.parquet", {**columns, "tags": columns["user"]})
    with pytest.raises(ValueError, match=r"b\.parquet: must have lists in the same columns"):
        open_data(_config(tmp_path))
    (tmp_path / "b.parquet").unlink()
    data = open_data(_config(tmp_path, split=None, fractions=[0.4, 0.3]))
    (tmp_path / "a.parquet").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"a\.parquet: row group \d+ must be readable"):
        list(data.batches("train", 4, None).epoch(0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="which has none"):
        open_data(_config(tmp_path / "empty"))


def test_too_few_row_groups_for_the_lanes_are_refused(tmp_path):
    _write(tmp_path / "a.parquet", _columns(90), rows=1000)
    with pytest.raises(ValueError, match=r"at least as many row groups as data\.lanes = 4, got 1"):
        open_data(_config(tmp_path)).batches("train", 4, 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": ["label"]}, r"data\.dense: must not hold the column 'label', which is data\.label"),
        ({"dense": ["split"]}, r"data\.dense: must not hold the column 'split', which is data\.split"),
        ({"features": ["user", "split"]}, r"data\.features: must not hold the column 'split', which is data\.split"),
        ({"dense": ["user"]}, r"data\.features: must not hold the column 'user', which is data\.dense"),
        ({"drop": ["user"]}, r"data\.features: must not hold the column 'user', which is data\.drop"),
        ({"drop": ["label"]}, r"data\.drop: must not hold the column 'label', which is data\.label"),
        (
            {"features": ["user", "kind"]},
            r"data\.features: .* the column 'kind', which is data\.kind_column",
        ),
    ],
)
def test_a_column_has_one_use(tmp_path, streaming, change, message):
    _write(tmp_path / "a.parquet", _columns(40))
    with pytest.raises(ValueError, match=message):
        open_data(_config(tmp_path, streaming=streaming, **change))


def test_rows_without_a_split_are_refused(tmp_path):
    columns = _columns(40)
    columns["split"] = pa.array([None if n == 3 else 0 for n in range(20)] + [1] * 10 + [2] * 10)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(ValueError, match="row group 0 must have no missing values in its column 'split', got 1; fill"):
        open_data(_config(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wrong", [256, 300, -1, 0])
def test_kinds_are_those_of_negatives_and_not_cut(tmp_path, streaming, wrong):
    columns = _columns(40)
    row = int(np.flatnonzero(columns["label"] == 0)[0])
    columns["kind"][row] = wrong
    _write(tmp_path / "a.parquet", columns)
    message = rf"column 'kind' must be 0 for clicks and 1 to 127 for others, got {wrong} with label 0 in row {row}"
    with pytest.raises(ValueError, match=message):
        data = open_data(_config(tmp_path, streaming=streaming))
        for split in ("train", "valid", "test"):
            for _ in data.batches(split, 40, None).epoch(0):
                pass


def test_hidden_files_are_neither_read_nor_noted(tmp_path, caplog):
    for name in ("a.parquet", ".b.parquet", "_c.parquet"):
        _write(tmp_path / name, _columns(40))
    (tmp_path / "._a.parquet").write_bytes(b"of a file manager")
    config = _config(tmp_path)
    assert [path.name for path in parquet_files(tmp_path)] == ["a.parquet"] == list(identify(config))
    assert "no data: ['._a.parquet', '.b.parquet', '_c.parquet']" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_holds_files_or_folders_of_splits(tmp_path, streaming):
    for name in ("a.parquet", "train/a.parquet", "valid/a.parquet", "test/a.parquet"):
        _write(tmp_path / name, _columns(40))
    message = (
        "must hold files or folders of splits, got both" if streaming else "folders of splits are read with data.str"
    )
    with pytest.raises(ValueError, match=message):
        open_data(_config(tmp_path, streaming=streaming))


def test_endings_are_written_small(tmp_path):
    for name in ("a.parquet", "b.PARQUET"):
        _write(tmp_path / name, _columns(40))
    with pytest.raises(ValueError, match=r"must end in .parquet, got \['b.PARQUET'\]; rename them"):
        open_data(_config(tmp_path))


@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_ids_that_a_subsample_is_drawn_by(tmp_path, wrong):
    columns = _columns(40)
    columns["group"] = np.where(np.arange(40) == 7, wrong, 1)
    _write(tmp_path / "a.parquet", columns)
    change = {"streaming": False, "subsample": 0.5, "subsample_by": "group"}
    with pytest.raises(ValueError, match=r"data.subsample_by: column 'group' must hold ids in \[0, 2\*\*31\)"):
        open_data(_config(tmp_path, **change))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wrong", [2**31, 2**31 + 5, 2**40])
def test_ids_that_no_table_can_have(tmp_path, streaming, wrong):
    ids = np.where(np.arange(40) == 7, wrong, 1)
    for name, values in (("user", ids), ("tags", pa.array([[int(value)] for value in ids]))):
        _write(tmp_path / "a.parquet", {**_columns(40), name: values})
        with pytest.raises(
            ValueError, match=rf"a\.parquet: ids of column '{name}' must be below 2\*\*31, got {wrong};"
        ):
            open_data(_config(tmp_path / "a.parquet", streaming=streaming))


def test_large_unsigned_labels_are_clicks(tmp_path):
    columns = _columns(40)
    columns["label"] = np.where(columns["label"] == 1, 2**63 + 5, 0).astype(np.uint64)
    _write(tmp_path / "a.parquet", columns)
    data = open_data(_config(tmp_path, streaming=False, positive_from=1))
    clicks = sum(int(data.split(name).labels.sum()) for name in ("train", "valid", "test"))
    assert clicks == int((columns["label"] > 0).sum()) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_are_alike(tmp_path, streaming):
    config = _config(tmp_path, streaming=streaming)
    _write(tmp_path / "a.parquet", _columns(40), {"user": 9, "tags": 6})
    _write(tmp_path / "b.parquet", _columns(40), {"user": 50, "tags": 6})
    with pytest.raises(ValueError, match=r"b.parquet: the schema metadata 'vocab' must be that of the first file"):
        open_data(config)
    twice = pa.table(_columns(40)).append_column("user", pa.array(range(40)))
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: columns must have different names, got 'user' twice"):
        open_data(config)
    _write(tmp_path / "b.parquet", {**_columns(40), "tags": np.zeros(40, np.int64)})
    with pytest.raises(ValueError, match=r"b.parquet: must have lists in the .*columns"):
        open_data(config)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_without_any_id_is_named(tmp_path, streaming):
    columns = {**_columns(40), "tags": pa.array([[]] * 40, pa.list_(pa.int64()))}
    _write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match="column 'tags' must hold an id, got none"):
        open_data(_config(tmp_path, streaming=streaming))


def test_an_index_that_pandas_notes_is_a_list(tmp_path):
    table = pa.table(_columns(40)).replace_schema_metadata({"pandas": json.dumps({"index_columns": 5})})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the schema metadata 'pandas' must list index_columns, got 5"):
        open_data(_config(tmp_path, streaming=False, features=[], dense=["price"]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a=1/x.parquet", "a=2/b=3/x.parquet"], r"got \['a=1', 'a=2'\]; write partitions \(Hive\) .*columns \['a'\]"),
        (["x.parquet", "a=1/x.parquet"], r"got \['a=1'\]; write partitions \(Hive\)"),
        (["x.parquet", "old/x.parquet"], r"got \['old'\]; write the files side by side"),
        (
            ["train/a=1/x.parquet", "valid/x.parquet", "test/x.parquet"],
            "Parquet files must not lie in folders inside it",
        ),
        (["train/x.parquet", "valid/x.parquet", "test/x.parquet", "more/x.parquet"], "files must not lie in folders"),
    ],
)
def test_files_in_folders_are_never_left_out(tmp_path, streaming, names, message):
    for name in names:
        _write(tmp_path / name, _columns(40))
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(ValueError, match=message):
        open_data(_config(tmp_path, streaming=streaming))


def test_folders_of_splits_need_streaming_and_leave_nothing_to_draw(tmp_path):
    for name in ("train", "valid", "test"):
        _write(tmp_path / name / "x.parquet", _columns(40))
    with pytest.raises(
        ValueError, match=r"got \['test', 'train', 'valid'\]; folders of splits are read with data.stream"
    ):
        open_data(_config(tmp_path, streaming=False))
    assert open_data(_config(tmp_path)).num_rows("train") == 40
    for change in ({"split_by": "order"}, {"fractions": [0.5, 0.2]}, {"split_seed": 3}):
        with pytest.raises(ValueError, match=rf"data.{next(iter(change))}: has no meaning with the folders train"):
            open_data(_config(tmp_path, split=None, **change))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_lists_goes_by_its_own_name(tmp_path, streaming):
    _write(tmp_path / "x.parquet", _columns(60))
    plain = {"streaming": streaming, "features": [], "pooling": {}, "lanes": 1, "drop": ["kind"], "kind_column": None}
    assert open_data(_config(tmp_path, **{**plain, "drop": ["tags", "kind"]})).features == ["user"]
    with pytest.raises(ValueError, match=r"got \['label', 'user', 'tags', 'price', 'split', 'kind'\]"):
        open_data(_config(tmp_path, **{**plain, "features": ["tag"]}))
    with pytest.raises(ValueError, match=r"column 'tags' must be of an int type, got list"):
        open_data(_config(tmp_path, **{**plain, "features": ["user"], "label": "tags"}))
