"""Criteo's TSV files to NumPy files, in chunks of bounded memory; a killed one continues at the file it was at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES, DEFAULT_INT_NAMES, DEFAULT_LABEL_NAME
from tqdm import tqdm

from torchrec_compress.train.data.conversion import begin, finish, sums_of
from torchrec_compress.train.data.inputs import VOCAB_FILE, identify_source
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.sealed import is_done, read_json, write_json

_BLOCK = 1 << 24  # bytes of TSV that are parsed at once
_ROWS = 1 << 18  # rows of NumPy files that are read at once
_KINDS = ("dense", "sparse", "labels")
_BAD = 255
_DIGITS = np.full(256, _BAD, dtype=np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_DIGITS[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def convert(source: Path, target: Path, frequency_threshold: int | None = None) -> list[Path]:
    """Convert the Kaggle or the one-terabyte set to the files that TorchRec's data set and `data.kind: criteo` read.

    Args:
        source: a TSV, or a folder with day_0 to day_23 or train.txt; a name may end in .tsv, .txt or .gz.
        target: folder of the results: day_0_dense.npy (N, 13) float32, day_0_labels.npy (N, 1) int32 and
            day_0_sparse.npy (N, 26), int64 hashes as TorchRec's `tsv_to_npys` writes them, or contiguous int32 ids.
        frequency_threshold: makes ids contiguous: those seen at least so often, over all files, are numbered from 2 in
            the order in which they appear, the others are 1, as TorchRec's `sparse_to_contiguous` numbers them; MLPerf
            uses 0, and null keeps hashes. Takes 20 to 40 bytes of memory per distinct id. The hashes stay in the folder
            hashes; rows per table go into vocab.json.

    Returns:
        The files of ids.

    Raises:
        ValueError: no such files, or one that is malformed, where the error names its row; a folder of results of
            another threshold, of other files (by name, size and time of change), or of no finished conversion.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> row = ["1", *["5"] * 13, *["68fd1e64"] * 26]
        >>> _ = (folder / "day_0").write_text(chr(9).join(row) + chr(10))
        >>> [path] = convert(folder, folder / "npy", frequency_threshold=1)
        >>> np.load(path).shape, int(np.load(path)[0, 0])
        ((1, 26), 2)
    """
    files = _sources(source)
    names = [re.split(r"\.(?:tsv|txt|gz)", file.name)[0] for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"{source}: must have one file of each name, got {[file.name for file in files]}")
    told = {
        "settings": {"frequency_threshold": frequency_threshold},
        "sources": {file.name: identify_source(file) for file in files},
    }
    with begin(target, told) as folder:
        if folder is not None:
            made = folder / "made.json"  # all is there, but for its place
            if not is_done(made):
                found, sizes = _convert_all(dict(zip(names, files, strict=True)), folder, frequency_threshold)
                write_json(made, {"sources": told["sources"], "files": found, "sizes": sizes})
            whole = read_json(made)
            check_same(made, whole["sources"], told["sources"])
            if whole["sizes"]:
                write_json(target / VOCAB_FILE, whole["sizes"])
            finish(target, told, whole["files"])
    return [target / f"{name}_sparse.npy" for name in names]


def _convert_all(
    files: dict[str, Path], folder: Path, frequency_threshold: int | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the checksums of what was made, by path in the folder, and rows per table where ids are contiguous."""
    raw = folder / "hashes" if frequency_threshold is not None else folder
    sums: dict[str, Any] = {}
    for name, file in files.items():
        done, source = folder / f"{name}.json", identify_source(file)
        if not is_done(done) or read_json(done)["source"] != source:
            made = convert_file(file, folder, name, raw)
            write_json(
                done, {"source": source, "files": {str(path.relative_to(folder)): sums_of(path) for path in made}}
            )
        sums |= read_json(done)["files"]
    if frequency_threshold is None:
        return sums, {}
    maps = number_ids([raw / f"{name}_sparse.npy" for name in files], frequency_threshold)
    for name in files:
        result = folder / f"{name}_sparse.npy"
        _renumber(raw / result.name, result, maps)
        sums[result.name] = sums_of(result)
    return sums, {name: int(new.max()) + 1 for name, (_, new) in zip(DEFAULT_CAT_NAMES, maps, strict=True)}


def _sources(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    named = re.compile(r"(?:day_(\d+)|train)(?:\.tsv|\.txt)?(?:\.gz)?")
    found = [(int(match[1] or 0), path) for path in source.glob("*") if (match := named.fullmatch(path.name))]
    files = [path for _, path in sorted(found) if path.is_file()]
    if not files:
        raise ValueError(f"{source}: must be a TSV, or a folder with day_0, day_1 and so on, or train.txt; got neither")
    return files


def convert_file(source: Path, folder: Path, name: str, sparse_folder: Path | None = None) -> list[Path]:
    """Convert one TSV.

    The numbers are those of TorchRec's `BinaryCriteoUtils.tsv_to_npys`: missing values are 0, ids are read as
    hexadecimals, dense values become log(x - smallest of the file + 2).

    Args:
        source: rows of a label, 13 ints and 26 hexadecimals.
        folder: of the results.
        name: in front of _dense.npy, _sparse.npy and _labels.npy.
        sparse_folder: of the ids, where that is another.

    Returns:
        The files.

    Raises:
        ValueError: a row that is malformed, or no rows.
    """
    folders = {"dense": folder, "sparse": sparse_folder or folder, "labels": folder}
    parts = {kind: folders[kind] / f"{name}_{kind}.npy" for kind in _KINDS}
    for kind in _KINDS:
        folders[kind].mkdir(parents=True, exist_ok=True)
    writers = {
        "dense": _Writer(parts["dense"], 13, np.dtype(np.int32), np.dtype(np.float32)),
        "sparse": _Writer(parts["sparse"], CAT_FEATURE_COUNT, np.dtype(np.int64)),
        "labels": _Writer(parts["labels"], 1, np.dtype(np.int32)),
    }
    smallest = 0
    try:
        with tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc=source.name, disable=None) as bar:
            for batch in _batches(source):
                arrays = _arrays(source, batch, writers["labels"].rows)
                smallest = (
                    min(smallest, int(arrays["dense"].min())) if writers["dense"].rows else int(arrays["dense"].min())
                )
                for kind, array in arrays.items():
                    writers[kind].write(array)
                bar.update(batch.nbytes)
    finally:
        for writer in writers.values():
            writer.close()
    if not writers["labels"].rows:
        raise ValueError(f"{source}: must have rows, got none")
    _take_logarithms(parts["dense"], smallest)
    return [*parts.values()]


def _batches(source: Path) -> Iterator[pa.RecordBatch]:
    names = [DEFAULT_LABEL_NAME, *DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]
    kinds = {name: pa.string() if name in DEFAULT_CAT_NAMES else pa.int32() for name in names}
    try:
        yield from pcsv.open_csv(
            source,
            pcsv.ReadOptions(block_size=_BLOCK, column_names=names, use_threads=False),
            pcsv.ParseOptions(delimiter="\t", quote_char=False),
            pcsv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source}: must be rows of a label, 13 ints and 26 hexadecimals ({error})") from error


def _arrays(source: Path, batch: pa.RecordBatch, first: int) -> dict[str, np.ndarray]:
    """Return labels (N, 1) int32, dense (N, 13) int32 and sparse (N, 26) int64 of a batch."""
    numbers = [batch.column(name).fill_null(0).to_numpy() for name in (DEFAULT_LABEL_NAME, *DEFAULT_INT_NAMES)]
    ids = np.stack([_hexadecimals(source, batch.column(name), first) for name in DEFAULT_CAT_NAMES], axis=1)
    return {"labels": numbers[0][:, None], "dense": np.stack(numbers[1:], axis=1), "sparse": ids}


def _hexadecimals(source: Path, column: pa.StringArray, first: int) -> np.ndarray:
    """Return what strings of hexadecimal digits stand for: (N,) int64; missing ones are 0."""
    present = column.drop_null()
    ends = np.frombuffer(present.buffers()[1], np.int32)[present.offset : present.offset + len(present) + 1]
    values = np.zeros(len(column), dtype=np.int64)
    if not len(present):
        return values
    text = np.frombuffer(present.buffers()[2], np.uint8)
    found = np.zeros(len(present), dtype=np.int64)
    lengths = np.diff(ends)
    bad = lengths > 15
    for place in range(min(int(lengths.max()), 15)):
        has = lengths > place
        digits = _DIGITS[text[ends[:-1][has] + place]]
        found[has] = found[has] * 16 + digits
        bad[np.flatnonzero(has)[digits == _BAD]] = True
    if bad.any():
        where = np.flatnonzero(np.asarray(column.is_valid()))[np.flatnonzero(bad)[0]]
        raise ValueError(f"{source}: ids must be hexadecimals, got {column[int(where)]} in row {first + int(where)}")
    values[np.asarray(column.is_valid())] = found
    return values


class _Writer:
    """An .npy file whose number of rows is known at the end."""

    def __init__(self, path: Path, width: int, dtype: np.dtype, final: np.dtype | None = None) -> None:
        self.rows = 0
        self._width, self._dtype, self._final = width, dtype, final or dtype
        self._file = path.open("wb")
        self._header()

    def _header(self) -> None:
        """Write the header; NumPy leaves room in it for the rows to grow."""
        self._file.seek(0)
        header = {"descr": self._final.str, "fortran_order": False, "shape": (self.rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self._header()
        self._file.close()


def _take_logarithms(path: Path, smallest: int) -> None:
    """Replace int32 counts by float32 logarithms in place, both four bytes."""
    dense: Any = np.load(path, mmap_mode="r+", allow_pickle=False)
    for start in range(0, len(dense), _ROWS):
        counts = dense[start : start + _ROWS].view(np.int32)
        dense[start : start + _ROWS] = np.log(counts - (smallest - 2), dtype=np.float32)
    dense.flush()


Numbering = tuple[np.ndarray, np.ndarray]


def number_ids(files: list[Path], frequency_threshold: int) -> list[Numbering]:
    """Return, for each of 26 columns, the distinct ids in order and the number that each gets.

    Args:
        files: of ids (N, 26), in order.
        frequency_threshold: ids seen less often get 1.
    """
    seen = [_Seen() for _ in range(CAT_FEATURE_COUNT)]
    offset = 0
    for path in files:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        for start in tqdm(range(0, len(ids), _ROWS), desc=f"counting {path.name}", disable=None):
            chunk = np.ascontiguousarray(ids[start : start + _ROWS].T)
            for column, values in zip(seen, chunk, strict=True):
                column.add(values, offset + start)
        offset += len(ids)
    return [column.numbers(frequency_threshold) for column in seen]


class _Seen:
    """Distinct ids with their counts and where each was first seen, in sorted runs that are merged as they grow."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray, offset: int) -> None:
        ids, first, counts = np.unique(values, return_index=True, return_counts=True)
        run = ids, counts, first + offset
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            run = _merge(self._runs.pop(), run)
        self._runs.append(run)

    def numbers(self, frequency_threshold: int) -> Numbering:
        run = self._runs.pop()
        while self._runs:
            run = _merge(self._runs.pop(), run)
        ids, counts, first = run
        kept = np.flatnonzero(counts >= frequency_threshold)
        new = np.ones(len(ids), dtype=np.int32)
        new[kept[np.argsort(first[kept], kind="stable")]] = np.arange(2, len(kept) + 2)
        return ids, new


def _merge(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, counts, first = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return ids[starts], np.add.reduceat(counts[order], starts), np.minimum.reduceat(first[order], starts)


def _renumber(source: Path, target: Path, maps: list[Numbering]) -> None:
    ids = np.load(source, mmap_mode="r", allow_pickle=False)
    writer = _Writer(target, CAT_FEATURE_COUNT, np.dtype(np.int32))
    try:
        for start in tqdm(range(0, len(ids), _ROWS), desc=f"numbering {source.name}", disable=None):
            chunk = ids[start : start + _ROWS]
            columns = [new[np.searchsorted(old, chunk[:, i])] for i, (old, new) in enumerate(maps)]
            writer.write(np.stack(columns, axis=1))
    finally:
        writer.close()
