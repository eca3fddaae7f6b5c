"""Codes that are read from files of someone else's."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.fit import given
from torchrec_compress.fit.given import CodeShape, GivenEncoder, check_given

N, M, K = 1000, 3, 300
SHAPE = CodeShape("table 'item'", N, M, K, K)
CODES = np.random.default_rng(0).integers(0, K, (N, M))


def as_npy(path, codes, dtype="<i8", order="C") -> str:
    np.save(path / "codes.npy", np.asarray(codes, dtype=dtype, order=order))
    return str(path / "codes.npy")


def as_parquet(path, codes, kind="columns", rows_in_group=170) -> str:
    if kind == "columns":
        table = pa.table({f"code_{number}": codes[:, number] for number in range(codes.shape[1])})
    else:
        lists = pa.array(codes.tolist(), pa.list_(pa.int32(), codes.shape[1] if kind == "fixed" else -1))
        table = pa.table({"other": np.zeros(len(codes)), "codes": lists})
    pq.write_table(table, path / "codes.parquet", row_group_size=rows_in_group)
    return str(path / "codes.parquet") + (":codes" if kind != "columns" else "")


WRITERS = {
    "int64": as_npy,
    "uint16": lambda path, codes: as_npy(path, codes, "<u2"),
    "uint64": lambda path, codes: as_npy(path, codes, "<u8"),
    "big endian": lambda path, codes: as_npy(path, codes, ">i4"),
    "by columns": lambda path, codes: as_npy(path, codes, order="F"),
    "parquet columns": as_parquet,
    "parquet lists": lambda path, codes: as_parquet(path, codes, "lists"),
    "parquet fixed lists": lambda path, codes: as_parquet(path, codes, "fixed"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("block", [7, 1 << 18])
def test_rows_are_those_of_the_file(tmp_path, monkeypatch, write, block):
    monkeypatch.setattr(given, "_BLOCK_ROWS", block)
    path = write(tmp_path, CODES)
    check_given(path, SHAPE)
    read = GivenEncoder(path, SHAPE)
    for ids in (
        torch.arange(N),
        torch.arange(165, 345),
        torch.tensor([999, 0, 170, 0]),
        torch.tensor([], dtype=torch.int64),
    ):
        codes = read(ids, None)
        assert codes.dtype == torch.int64
        assert torch.equal(codes, torch.from_numpy(CODES)[ids])


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_code_out_of_range_is_named(tmp_path, write):
    codes = CODES.copy()
    codes[[700, 900], 1] = K
    path = write(tmp_path, codes)
    with pytest.raises(
        ValueError, match=rf"^table 'item': codes: {path}: code 1 of id 700 must be in \[0, 300\), got 300; "
    ):
        check_given(path, SHAPE)
    with pytest.raises(ValueError, match="code 1 of id 700"):
        GivenEncoder(path, SHAPE)(torch.arange(650, 750), None)  # of a file that changed since
    codes = CODES.copy()
    codes[3, 0] = 298
    few = CodeShape("table 'item'", N, M, K, 298)
    with pytest.raises(ValueError, match=r"code 0 of id \d+ must be in \[0, 298\) \(the others are escape codes"):
        check_given(write(tmp_path, codes), few)


def test_what_is_checked_once_is_checked_anew_when_it_changes(tmp_path):
    path = as_npy(tmp_path, CODES)
    check_given(path, SHAPE)
    wrong = CODES.copy()
    wrong[0, 0] = -1
    as_npy(tmp_path, wrong)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"code 0 of id 0 must be in \[0, 300\), got -1"):
        check_given(path, SHAPE)


def lists(path, values):
    pq.write_table(pa.table({"codes": pa.array(values, pa.list_(pa.int64()))}), path / "codes.parquet")
    return str(path / "codes.parquet")


def pickled(path):
    np.save(path / "codes.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    return str(path / "codes.npy")


def text(path, name="codes.npy"):
    (path / name).write_bytes(b"root:x:0:0")
    return str(path / name)


def cut(path):
    file = as_npy(path, CODES)
    os.truncate(file, 1000)
    return file


def pipe(path):
    os.mkfifo(path / "codes.npy")
    return str(path / "codes.npy")


BAD = {
    "missing": (lambda path: str(path / "none.npy"), "must be a file, got none"),
    "a folder": (lambda path: str(path), "must be a regular file"),
    "a pipe": (pipe, "must be a regular file"),
    "another ending": (lambda path: text(path, "codes.txt"), "must end in .npy or .parquet, got '.txt'"),
    "no array": (text, "must be a whole .npy file of numbers; give"),
    "no parquet": (lambda path: text(path, "codes.parquet"), "must be such a file, got ArrowInvalid|Parquet"),
    "a pickle": (pickled, "must be a whole .npy file of numbers; give"),
    "cut": (cut, "must be a whole .npy file of numbers; give"),
    "floats": (lambda path: as_npy(path, CODES, "<f8"), "must hold integers, got float64"),
    "bools": (lambda path: as_npy(path, CODES, "?"), "must hold integers, got bool"),
    "few rows": (lambda path: as_npy(path, CODES[1:]), r"must hold 1000 x 3 codes, one row per id, got \(999, 3\)"),
    "few codes": (lambda path: as_npy(path, CODES[:, 1:]), r"must hold 1000 x 3 codes, .* got \(1000, 2\)"),
    "a vector": (lambda path: as_npy(path, CODES[:, 0]), r"got \(1000,\)"),
    "no such column": (lambda path: as_parquet(path, CODES) + ":ids", "must have the column 'ids', got"),
    "one column": (lambda path: as_parquet(path, CODES) + ":code_0", r"got \(1000, 1\)"),
    "texts": (lambda path: as_parquet(path, CODES.astype(str)), "must hold integers, got .*string"),
    "uneven lists": (
        lambda path: lists(path, [[1, 2, 3]] * 999 + [[1]]),
        r"must hold lists of 3, got such of \[3, 1\]",
    ),
    "null": (lambda path: lists(path, [[1, 2, 3]] * 999 + [None]), "must hold no nulls"),
    "null in a list": (lambda path: lists(path, [[1, 2, 3]] * 999 + [[1, None, 2]]), "must hold no nulls"),
    "huge": (lambda path: as_npy(path, np.full((N, M), 2**64 - 1, dtype="<u8"), "<u8"), "got 18446744073709551615"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    write, message = BAD[name]
    path = write(tmp_path)
    with pytest.raises(ValueError, match=f"^table 'item': codes: {path}.*({message})") as raised:
        check_given(path, SHAPE)
    assert "give a .npy of (N, M) integers" in str(raised.value)
