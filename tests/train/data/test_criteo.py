"""Criteo's files: several ids per row, streaming, and TSV files to NumPy files as TorchRec converts them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec.datasets.criteo import BinaryCriteoUtils

from torchrec_compress.train.config import DataConfig, RunConfig, override
from torchrec_compress.train.data import criteo_tsv
from torchrec_compress.train.data.batch import Share
from torchrec_compress.train.data.criteo_tsv import convert, convert_file
from torchrec_compress.train.data.open import load_data, open_data
from torchrec_compress.train.stages import run

NAMES = [f"cat_{number}" for number in range(26)]
WIDTHS = [3, 2, 1, *([1] * 22), 4]


def _day(folder, number, num_rows, *, multi_hot=False, **change):
    rng = np.random.default_rng(number)
    arrays = {
        "dense.npy": rng.random((num_rows, 13), dtype=np.float32),
        "labels.npy": rng.integers(0, 2, (num_rows, 1)).astype(np.int32),
        "sparse.npy": rng.integers(0, 50, (num_rows, 26)).astype(np.int32),
    }
    if multi_hot:
        del arrays["sparse.npy"]
        blocks = {str(k): rng.integers(0, 50, (num_rows, width)).astype(np.int32) for k, width in enumerate(WIDTHS)}
        np.savez(folder / f"day_{number}_sparse_multi_hot.npz", **blocks)
    for end, array in {**arrays, **change}.items():
        np.save(folder / f"day_{number}_{end}", array)


def _config(folder, **change) -> DataConfig:
    start = {"kind": "criteo", "path": str(folder), "split_by": "last_file", "lanes": 4, "chunk_rows": 16, "window": 2}
    vocab = dict.fromkeys(NAMES, 50)
    return DataConfig(**{**start, "vocab": vocab, "num_workers": 0, **change})


@pytest.mark.parametrize("multi_hot", [False, True])
def test_streamed_rows_are_those_in_memory(tmp_path, multi_hot):
    for number, num_rows in ((0, 70), (2, 33), (10, 41)):  # day_10 is the last, though its name comes first
        _day(tmp_path, number, num_rows, multi_hot=multi_hot)
    config = _config(tmp_path, pooling=dict(zip(NAMES, WIDTHS, strict=True)) if multi_hot else {})
    whole, streamed = load_data(config), open_data(replace(config, streaming=True))
    assert [whole.num_rows(split) for split in ("train", "valid", "test")] == [103, 21, 20]
    assert whole.layout == streamed.layout and streamed.layout.widths == tuple(WIDTHS if multi_hot else [1] * 26)
    for split in ("train", "valid", "test"):
        one, other = (list(data.batches(split, 8, None).epoch(0)) for data in (whole, streamed))
        order = torch.cat([batch.rows for batch in other])
        assert sorted(order.tolist()) == list(range(whole.num_rows(split)))
        for name in ("cat_0", "cat_7", "cat_25"):
            ids = [torch.cat([b.features[name].values().view(len(b.rows), -1) for b in part]) for part in (one, other)]
            assert torch.equal(ids[0][order], ids[1])
        dense = [torch.cat([batch.dense for batch in part]) for part in (one, other)]
        assert torch.equal(dense[0][order], dense[1])
    for name, count in whole.counts().items():
        assert torch.equal(count, streamed.counts()[name])
    first = next(streamed.batches("train", 8, 1, Share(1, 2)).epoch(0))
    assert first.features["cat_25"].lengths().tolist() == [WIDTHS[-1] if multi_hot else 1] * 4


@pytest.mark.parametrize("largest", [50, 51])
def test_raw_counts_become_logarithms_of_four_more(tmp_path, largest):
    counts = np.random.default_rng(0).integers(-3, largest, (40, 13)).astype(np.float32)
    counts[7, 3] = largest
    _day(tmp_path, 0, 40, **{"dense.npy": counts})
    data = load_data(_config(tmp_path, split_by="order"))
    found = torch.cat([split.dense for split in (data.train, data.valid, data.test)]).numpy()
    np.testing.assert_allclose(found, np.log(counts + 4) if largest > 50 else counts, rtol=1e-6)


def test_streamed_rows_are_trained_on(tmp_path, ranks):
    for number in range(3):
        _day(tmp_path, number, 400, multi_hot=True)
    stage = {"epochs": 1.0, "batch_size": 64, "evals_per_epoch": 2}
    changes = {
        "tensorboard": False,
        "data": vars(_config(tmp_path, streaming=True, num_workers=2)),
        "model": {"name": "dlrm_dcnv2", "embedding_dim": 8, "hidden": [8], "bottom": [8], "cross_rank": 4},
        "pretrain": stage,
        "retrain": stage,
        "compression": {"*": {"method": "pq", "num_codes": 2, "codebook_size": 8}},
    }
    found = run(override(RunConfig(), changes), tmp_path / "run", tmp_path / "full", ranks, None)
    assert found["training"]["steps"] == 13 and 0.3 < found["metrics"]["test"]["auc"] < 0.7


def test_numpy_files_are_not_read_before_they_are_needed(tmp_path):
    _day(tmp_path, 0, 64, **{"labels.npy": np.where(np.arange(64)[:, None] == 50, 3, 1).astype(np.int32)})
    _day(tmp_path, 1, 64)
    batches = open_data(_config(tmp_path, streaming=True, lanes=2)).batches("train", 8, None, Share(1, 2))
    with pytest.raises(ValueError, match=r"day_0_dense\.npy: labels must be 0 or 1, got 3 in row 50"):
        list(batches.epoch(0))
    assert len(list(batches.epoch(0, 8))) == 0
    other = open_data(_config(tmp_path, streaming=True, lanes=2)).batches("train", 8, None, Share(0, 2))
    assert len(list(other.epoch(0))) == 8  # the bad row is another rank's


def test_ids_are_taken_modulo_the_rows_of_each_table(tmp_path):
    _day(tmp_path, 0, 40, **{"sparse.npy": np.full((40, 26), 0xFFFFFFFF, dtype=np.int64)})
    _day(tmp_path, 1, 40)
    sizes = {name: 10 + number for number, name in enumerate(NAMES)}
    data = load_data(_config(tmp_path, hash_size=sizes, vocab={}))
    assert data.vocab == list(sizes.values())
    assert data.train.ids[0].tolist() == [0xFFFFFFFF % size for size in sizes.values()]
    with pytest.raises(ValueError, match=r"data\.hash_size: must be positive for each of"):
        load_data(_config(tmp_path, hash_size={"cat_0": 3}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense.npy": np.zeros((40, 12), np.float32)}, "must have rows of 13 dense columns"),
        ({"sparse.npy": np.zeros((40, 25), np.int32)}, "must have rows of 26 ids"),
        ({"sparse.npy": np.zeros((40, 26), np.float32)}, "ids must be of an int type"),
        ({"sparse.npy": np.zeros((39, 26), np.int32)}, r"must have equally many rows, got \[39, 40\]"),
        ({"labels.npy": np.zeros((38, 1), np.int32)}, r"must have equally many rows, got \[38, 40\]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_the_wrong_shape_are_refused_at_once(tmp_path, change, message, streaming):
    _day(tmp_path, 0, 40, **change)
    _day(tmp_path, 1, 40)
    with pytest.raises(ValueError, match=message):
        open_data(_config(tmp_path, streaming=streaming))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense.npy": np.where(np.arange(520).reshape(40, 13) == 100, np.nan, 1)}, "NaN or infinity in row 7"),
        ({"sparse.npy": np.full((40, 26), 50)}, r"ids of 'cat_0' must be in \[0, 50\), got 50 in row 0"),
        ({"sparse.npy": np.full((40, 26), -3)}, r"must be in \[0, 50\), got -3 in row 0; set data.vocab, or data.hash"),
        ({"labels.npy": np.full((40, 1), 0.5)}, r"labels must be 0 or 1, got 0\.5 in row 0"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_named(tmp_path, change, message, num_workers):
    _day(tmp_path, 0, 40, **change)
    _day(tmp_path, 1, 40)
    data = open_data(_config(tmp_path, streaming=True, num_workers=num_workers))
    with pytest.raises(ValueError, match=message):
        list(data.batches("train", 8, None).epoch(0))
    with pytest.raises(ValueError, match=message):
        load_data(_config(tmp_path))


def test_files_that_are_cut_off_missing_or_compressed_are_refused(tmp_path):
    _day(tmp_path, 0, 40, multi_hot=True)
    _day(tmp_path, 1, 40, multi_hot=True)
    path = tmp_path / "day_1_sparse_multi_hot.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    with pytest.raises(ValueError, match=r"day_1_sparse_multi_hot\.npz: must be a whole NPZ file with 26 arrays"):
        open_data(_config(tmp_path))
    np.savez_compressed(path, **{str(k): np.zeros((40, width), np.int32) for k, width in enumerate(WIDTHS)})
    with pytest.raises(ValueError, match=r"0\.npy is compressed"):
        open_data(_config(tmp_path))
    np.savez(path, **{str(k): np.zeros((40, 1), np.int32) for k in range(26)})
    with pytest.raises(ValueError, match="as many ids per row as the first file"):
        open_data(_config(tmp_path))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"data\.pooling: must be what .* holds"):
        open_data(_config(tmp_path, pooling={"cat_0": 2}))
    dense = tmp_path / "day_1_dense.npy"
    dense.write_bytes(dense.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"day_1_dense\.npy: must be a whole NumPy file, got \d+ bytes"):
        open_data(_config(tmp_path))
    dense.unlink()
    with pytest.raises(ValueError, match=r"of the same names, got \[1, 2, 2\]"):
        open_data(_config(tmp_path))


def test_streaming_needs_sizes_and_a_split_by_order(tmp_path):
    _day(tmp_path, 0, 40)
    _day(tmp_path, 1, 40)
    with pytest.raises(ValueError, match=r"data\.vocab: must give the rows of every table with data\.streaming"):
        open_data(_config(tmp_path, streaming=True, vocab={}))
    with pytest.raises(ValueError, match=r"data\.vocab: must give the rows of every table or of none"):
        open_data(_config(tmp_path, vocab={"cat_0": 50}))
    with pytest.raises(ValueError, match=r"data\.split_by: must be 'order' or 'last_file'"):
        open_data(_config(tmp_path, streaming=True, split_by="drawn"))
    data = open_data(_config(tmp_path, streaming=True, split_by="order"))
    assert [data.num_rows(split) for split in ("train", "valid", "test")] == [64, 8, 8]


def _tsv(path, num_rows, seed, opener=open):
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        dense = [str(value) if value > -2 else "" for value in rng.integers(-3, 200, 13)]
        ids = [f"{value:08x}" if value else "" for value in rng.integers(0, 6, 26) * 0x2FFFFFFF]
        lines.append("\t".join([str(rng.integers(0, 2)), *dense, *ids]))
    with opener(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(criteo_tsv, "_BLOCK", 3000)
    monkeypatch.setattr(criteo_tsv, "_ROWS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchrec's reader leaves its file open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_conversion_equals_torchrec(tmp_path):
    source = tmp_path / "day_0"
    _tsv(source, 60, 0)
    convert_file(source, tmp_path / "ours", "day_0")
    theirs = [str(tmp_path / kind) for kind in ("dense", "sparse", "labels")]
    BinaryCriteoUtils.tsv_to_npys(str(source), *theirs)
    for kind, path in zip(("dense", "sparse", "labels"), theirs, strict=True):
        mine, expected = np.load(tmp_path / "ours" / f"day_0_{kind}.npy"), np.load(path)
        assert mine.dtype == expected.dtype and np.array_equal(mine, expected), kind


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [0, 1, 3, 12])
def test_contiguous_ids_equal_torchrec(tmp_path, threshold, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for day, num_rows in ((0, 20), (2, 31), (10, 13)):
        _tsv(source / f"day_{day}", num_rows, day)
    found = convert(source, target, threshold)
    assert [path.name for path in found] == [f"day_{day}_sparse.npy" for day in (0, 2, 10)]
    raw = [str(target / "hashes" / path.name) for path in found]
    BinaryCriteoUtils.sparse_to_contiguous(raw, str(tmp_path), threshold)
    capsys.readouterr()
    for path in found:
        assert np.array_equal(np.load(path), np.load(tmp_path / f"{path.stem}_contig_freq.npy"))
    sizes = json.loads((target / "vocab.json").read_text())
    assert sizes["cat_3"] == max(int(np.load(path)[:, 3].max()) for path in found) + 1
    data = open_data(DataConfig(kind="criteo", path=str(target), streaming=True, split_by="last_file", lanes=2))
    assert data.vocab == list(sizes.values()) and data.num_rows("train") == 51


def test_a_killed_conversion_continues_where_it_stopped(tmp_path, monkeypatch):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for day in range(3):
        _tsv(source / f"day_{day}.gz", 20, day, gzip.open)
    whole = [np.load(path) for path in convert(source, tmp_path / "whole", 2)]
    logarithms, calls = criteo_tsv._take_logarithms, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        logarithms(*arguments)

    monkeypatch.setattr(criteo_tsv, "_take_logarithms", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, 2)
    assert not list(target.glob("*.npy")) and not (target / "hashes").exists()
    with pytest.raises(ValueError, match=r"out/\.unfinished: is of a conversion that broke off"):
        load_data(_config(target))
    again = [np.load(path) for path in convert(source, target, 2)]
    assert len(calls) == 4  # day 0 was not done again
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\n", "rows of a label, 13 ints and 26 hexadecimals"),
        ("\t".join(["1", *["x"] * 13, *["68fd1e64"] * 26]), "rows of a label, 13 ints and 26 hexadecimals"),
        ("\t".join(["1", *["1"] * 13, *["68fd1e6g"] * 26]), "ids must be hexadecimals, got 68fd1e6g in row 0"),
        ("", "rows"),
    ],
)
def test_bad_tsv_files_are_refused(tmp_path, text, message):
    (tmp_path / "day_0").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("day_*"))
    with pytest.raises(ValueError, match="must be a TSV, or a folder with day_0"):
        convert(tmp_path / "out", tmp_path)
