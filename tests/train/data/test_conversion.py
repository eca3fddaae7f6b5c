"""A conversion is done with its settings and inputs, or it is not; what it wrote is verified as it is read."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from tests.train.data.test_criteo import _config, _tsv
from torchrec_compress.train.data import conversion, criteo_tsv, inputs
from torchrec_compress.train.data.criteo_tsv import convert
from torchrec_compress.train.data.open import load_data, open_data


@pytest.fixture
def folders(tmp_path):
    """Two days and where they go."""
    (tmp_path / "in").mkdir()
    for day in range(2):
        _tsv(tmp_path / "in" / f"day_{day}", 40, day)
    return tmp_path / "in", tmp_path / "out"


def _read(folder, **change):
    """Read all rows, in memory or streamed."""
    data = open_data(_config(folder, vocab={}, **change))
    return [
        len(batch.labels) for split in ("train", "valid", "test") for batch in data.batches(split, 8, None).epoch(0)
    ]


@pytest.mark.parametrize("first", [None, 0, 5])
def test_another_threshold_is_refused(folders, first):
    source, target = folders
    found = convert(source, target, first)
    before = [path.read_bytes() for path in found]
    for other in {None, 0, 5} - {first}:
        with pytest.raises(
            ValueError, match=rf"frequency_threshold must be {first} as when it was written, got {other}"
        ):
            convert(source, target, other)
    stamps = [path.stat().st_mtime_ns for path in found]
    assert convert(source, target, first) == found
    assert stamps == [path.stat().st_mtime_ns for path in found]
    assert before == [path.read_bytes() for path in found]


def test_other_inputs_are_refused(folders):
    source, target = folders
    convert(source, target, 0)
    kept = (source / "day_1").read_bytes()
    (source / "day_1").write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=r"sources\.day_1\.bytes must be"):
        convert(source, target, 0)
    (source / "day_1").write_bytes(kept)
    os.utime(source / "day_1", ns=(1, 1))
    with pytest.raises(ValueError, match=r"sources\.day_1\.mtime_ns must be"):
        convert(source, target, 0)
    _tsv(source / "day_2", 5, 2)
    with pytest.raises(ValueError, match=r"sources\.day_"):
        convert(source, target, 0)


def test_two_files_of_one_day_are_refused(folders):
    source, target = folders
    (source / "day_0.tsv").write_bytes((source / "day_0").read_bytes())
    with pytest.raises(ValueError, match="must have one file of each name"):
        convert(source, target)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversion_that_broke_off_is_no_data(folders, streaming):
    source, target = folders
    whole = (source / "day_1").read_bytes()
    (source / "day_1").write_bytes(whole + b"1\tcut")
    with pytest.raises(ValueError, match="must be rows of a label"):
        convert(source, target, 0)
    assert not list(target.glob("*.npy"))
    with pytest.raises(ValueError, match=r"out/\.unfinished: is of a conversion that broke off"):
        _read(target, streaming=streaming)
    with pytest.raises(ValueError, match="frequency_threshold must be 0"):
        convert(source, target, 1)
    (source / "day_1").write_bytes(whole)
    lines = (source / "day_0").read_text().splitlines(keepends=True)  # a file that was done already
    (source / "day_0").write_text("".join(lines[2:]))
    convert(source, target, 0)
    assert sum(_read(target, streaming=streaming)) == 78 and not (target / ".unfinished").exists()


def test_what_an_older_version_left_is_no_data(folders):
    """It wrote hidden parts beside the results, and no manifest."""
    source, target = folders
    convert(source, target)
    for name in ("conversion.json", "SHA256SUMS", ".lock"):
        (target / name).unlink()
    assert sum(_read(target, hash_size=7)) == 80  # as files of any other tool
    with pytest.raises(ValueError, match=r"of a conversion that is not finished or that has no conversion\.json"):
        convert(source, target)
    shutil.copy(target / "day_0_labels.npy", target / ".day_1_labels.npy")
    with pytest.raises(ValueError, match=r"\.day_1_labels\.npy: is of a conversion that broke off"):
        _read(target, hash_size=7)


@pytest.mark.parametrize("at", range(1, 8))
def test_killed_while_the_results_get_their_names_it_ends_the_same(folders, tmp_path, monkeypatch, at):
    source, target = folders
    expected = [np.load(path) for path in convert(source, tmp_path / "whole", 1)]
    calls, replace = [], conversion.Path.replace

    def killed(self, to):
        if self.parent.name in (".unfinished", "hashes") and self.suffix == ".npy":
            calls.append(to)
            if len(calls) == at:
                raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(conversion.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="broke off"):
        _read(target)
    found = [np.load(path) for path in convert(source, target, 1)]
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["day_0_dense.npy", "day_0_labels.npy", "day_1_sparse.npy", "vocab.json", "conversion.json"]
)
def test_a_changed_file_is_named(folders, monkeypatch, name, streaming):
    source, target = folders
    monkeypatch.setattr(conversion, "_BLOCK", 256)
    convert(source, target, 0)
    assert sum(_read(target, streaming=streaming)) == 80
    path = target / name
    whole = path.read_bytes()
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"{name}: is (truncated or )?changed"):
            _read(target, streaming=streaming)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name}: (must have \d+ bytes, got|is truncated)"):
        _read(target, streaming=streaming)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: is missing|whose {name} is gone"):
        _read(target, streaming=streaming)


def test_a_file_of_another_conversion_and_one_too_many_are_refused(folders, tmp_path):
    source, target = folders
    convert(source, target, 0)
    convert(source, tmp_path / "other", 30)
    shutil.copy(target / "day_0_sparse.npy", tmp_path / "kept")
    shutil.copy(tmp_path / "other" / "day_0_sparse.npy", target / "day_0_sparse.npy")
    with pytest.raises(ValueError, match=r"day_0_sparse\.npy: is changed or damaged"):
        _read(target)
    shutil.copy(tmp_path / "kept", target / "day_0_sparse.npy")
    shutil.copy(target / "day_0_labels.npy", target / "day_7_labels.npy")
    with pytest.raises(ValueError, match=r"day_7_labels\.npy: must be listed in conversion\.json"):
        _read(target)


def test_blocks_are_checked_once(folders, monkeypatch):
    source, target = folders
    monkeypatch.setattr(conversion, "_BLOCK", 256)
    convert(source, target, 0)
    sums = json.loads((target / "conversion.json").read_text())["files"]
    reads, crc = [], conversion.zlib.crc32
    monkeypatch.setattr(conversion.zlib, "crc32", lambda block: (reads.append(len(block)), crc(block))[1])
    data = open_data(_config(target, vocab={}, streaming=True))
    for _ in range(3):
        for split in ("train", "valid", "test"):
            list(data.batches(split, 8, None).epoch(0))
    top = [value for name, value in sums.items() if "/" not in name]
    assert len(reads) <= sum(len(value["crc32"]) for value in top) + 2 * len(top)


def test_a_tsv_is_converted_again_only_where_it_is_the_same(tmp_path):
    path = tmp_path / "train.txt"
    _tsv(path, 60, 0)
    config = _config(path, vocab={}, hash_size=7, split_by="order")
    assert load_data(config).num_rows("train") == 48 == load_data(config).num_rows("train")
    _tsv(path, 60, 1)
    with pytest.raises(ValueError, match=r"sources\.train\.txt\.\w+ must be"):
        load_data(config)


def test_a_converted_folder_is_told_by_its_content(folders, tmp_path):
    """So that it can be copied; times of change tell other files that are streamed."""
    source, target = folders
    convert(source, target, 0)
    told = inputs.identify(_config(target, streaming=True))
    shutil.copytree(target, tmp_path / "copy")
    assert inputs.identify(_config(tmp_path / "copy", streaming=True)) == told and list(told) == ["conversion.json"]
    convert(source, tmp_path / "other", 1)
    assert inputs.identify(_config(tmp_path / "other", streaming=True)) != told
    assert criteo_tsv.identify_source(source / "day_0").keys() == {"bytes", "mtime_ns"}
