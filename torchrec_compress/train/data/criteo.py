"""Criteo's click logs as NumPy files, one id per feature or several as MLPerf has them, in memory or streamed."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES, INT_FEATURE_COUNT

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import Layout
from torchrec_compress.train.data.conversion import CheckedFile, read_manifest
from torchrec_compress.train.data.inputs import MANIFEST, VOCAB_FILE
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.data.source import SPLITS
from torchrec_compress.train.data.splits import draw_split, split_ends
from torchrec_compress.train.data.streamed import Chunks, StreamedData
from torchrec_compress.train.sealed import read_json

_PROBE = 65536  # rows that are looked at to tell raw counts from their logarithms


@dataclass(frozen=True)
class _Day:
    """The arrays of a day, mapped into memory: dense (N, 13), one or 26 blocks of ids (N, width), labels (N, 1)."""

    path: Path
    dense: np.ndarray
    blocks: list[np.ndarray]
    labels: np.ndarray
    checked: list[tuple[CheckedFile, np.memmap]]

    def verify(self, first: int, last: int) -> None:
        """Raise ValueError where the rows [first, last) are not those that a conversion wrote."""
        for file, array in self.checked:
            file.check(array.offset + first * array.strides[0], array.offset + last * array.strides[0])

    def __len__(self) -> int:
        return len(self.labels)


class CriteoFiles:
    """A folder of `*_dense.npy`, `*_labels.npy` and `*_sparse.npy` or `*_sparse_multi_hot.npz` files.

    They are those of TorchRec's `InMemoryBinaryCriteoIterDataPipe`, and of MLPerf's `MultiHotCriteoIterDataPipe`
    (https://github.com/facebookresearch/dlrm, torchrec_dlrm). Where both kinds of ids are there, those of several per
    row are taken if `data.pooling` is set.

    Args:
        config: path, hash_size, vocab and pooling.

    Attributes:
        folder: with the files.
        sizes: rows per day.
        layout: how many ids a row has.

    Raises:
        ValueError: files that are missing, empty, cut off or of the wrong shape.
    """

    def __init__(self, config: DataConfig) -> None:
        path = Path(str(config.path))
        self.folder = path if path.is_dir() else _convert(path)
        self._manifest = read_manifest(self.folder)
        multi_hot = bool(config.pooling) or not self._files("_sparse.npy")
        ends = ("_dense.npy", "_sparse_multi_hot.npz" if multi_hot else "_sparse.npy", "_labels.npy")
        found = [self._files(end) for end in ends]
        names = [[file.name.removesuffix(end) for file in files] for files, end in zip(found, ends, strict=True)]
        if not names[0] or any(name != names[0] for name in names):
            raise ValueError(
                f"{self.folder}: must hold as many *_dense.npy, *_sparse.npy (or *_sparse_multi_hot.npz) and "
                f"*_labels.npy files of the same names, got {[len(files) for files in found]}"
            )
        sums = {} if self._manifest is None else self._manifest["files"]
        self._days = [_open_day(dense, sparse, labels, sums) for dense, sparse, labels in zip(*found, strict=True)]
        self.sizes = [len(day) for day in self._days]
        widths = [block.shape[1] for block in self._days[0].blocks] if multi_hot else [1] * CAT_FEATURE_COUNT
        self._check(config, widths, multi_hot)
        self.layout = Layout(list(DEFAULT_CAT_NAMES), tuple(widths))
        self._hashes = _hash_sizes(config)
        self._days[0].verify(0, min(_PROBE, self.sizes[0]))
        probe = self._days[0].dense[:_PROBE]
        # raw counts, of which the Kaggle set has some at -3
        self._raw = bool(np.min(probe) >= -3 and np.max(probe) > 50)

    def _files(self, end: str) -> list[Path]:
        """Return the files whose names end so, by number; where a conversion made the folder, what it lists."""
        found = [path for path in self.folder.glob(f"*{end}") if not path.name.startswith(".")]
        other = [path for path in found if self._manifest is not None and path.name not in self._manifest["files"]]
        if other:
            raise ValueError(
                f"{other[0]}: must be listed in {MANIFEST} beside it, got a file of another origin; move it"
            )
        return sorted(found, key=_natural)

    def _check(self, config: DataConfig, widths: list[int], multi_hot: bool) -> None:
        for day in self._days:
            found = [block.shape[1] for block in day.blocks] if multi_hot else widths
            if found != widths:
                raise ValueError(f"{day.path}: must have as many ids per row as the first file, {widths}, got {found}")
        for key, given in (("pooling", config.pooling), ("vocab", config.vocab)):
            unknown = sorted(set(given) - set(DEFAULT_CAT_NAMES))
            if unknown:
                raise ValueError(f"data.{key}: must name features of {DEFAULT_CAT_NAMES}, got {unknown}")
        stated = [config.pooling.get(name, 1) for name in DEFAULT_CAT_NAMES]
        if config.pooling and stated != widths:
            raise ValueError(f"data.pooling: must be what {self.folder} holds, {widths}, got {stated}")

    def table_rows(self, config: DataConfig) -> list[int] | None:
        """Return rows per table where the config or the folder's vocab.json states them, else None.

        Raises:
            ValueError: some are stated and others are not.
        """
        if self._hashes is not None:
            return self._hashes
        stated = {**self._stated(), **config.vocab}
        missing = [name for name in DEFAULT_CAT_NAMES if name not in stated]
        if stated and missing:
            raise ValueError(f"data.vocab: must give the rows of every table or of none, got none for {missing}")
        return [stated[name] for name in DEFAULT_CAT_NAMES] if stated else None

    def _stated(self) -> dict[str, int]:
        """Return the rows per table that vocab.json states; a conversion to contiguous ids wrote one."""
        file = self.folder / VOCAB_FILE
        if self._manifest is None:
            return json.loads(file.read_text()) if file.is_file() else {}
        is_contiguous = self._manifest["settings"]["frequency_threshold"] is not None
        return read_json(file, "delete its folder and convert again") if is_contiguous else {}

    def read(self, number: int, first: int, last: int, vocab: list[int] | None) -> Split:
        """Return the rows [first, last) of a day, checked.

        Args:
            number: of the day.
            first: row.
            last: row after the last.
            vocab: rows per table, or None where they are not known yet.

        Raises:
            ValueError: dense values that are not finite, ids outside their table, labels other than 0 and 1.
        """
        day = self._days[number]
        day.verify(first, last)
        dense = np.asarray(day.dense[first:last], dtype=np.float32)
        if self._raw:
            with np.errstate(divide="ignore", invalid="ignore"):  # what has no logarithm is refused below
                dense = np.log(dense + 4)
        if not np.isfinite(dense).all():
            row = first + int(np.flatnonzero(~np.isfinite(dense).all(1))[0])
            raise ValueError(f"{day.path}: dense values must be finite, got NaN or infinity in row {row}")
        ids = np.concatenate([block[first:last] for block in day.blocks], axis=1)
        if self._hashes is not None:
            ids = ids % np.repeat(self._hashes, self.layout.widths)
        self._check_ids(day.path, ids, vocab, first)
        labels = np.asarray(day.labels[first:last]).reshape(-1)
        if labels.min() < 0 or labels.max() > 1 or (labels.dtype.kind == "f" and not np.isin(labels, (0, 1)).all()):
            row = int(np.flatnonzero((labels != 0) & (labels != 1))[0])
            raise ValueError(f"{day.path}: labels must be 0 or 1, got {labels[row]} in row {first + row}")
        return Split(
            torch.from_numpy(ids.astype(np.int32)),
            torch.from_numpy(labels.astype(np.float32)),
            torch.from_numpy(dense if dense.flags.writeable else dense.copy()),
        )

    def _check_ids(self, path: Path, ids: np.ndarray, vocab: list[int] | None, first: int) -> None:
        limits = np.full(ids.shape[1], 2**31) if vocab is None else np.repeat(vocab, self.layout.widths)
        bad = np.argwhere((ids < 0) | (ids >= np.minimum(limits, 2**31)))
        if len(bad):
            row, column = bad[0].tolist()
            name = DEFAULT_CAT_NAMES[int(np.searchsorted(np.cumsum(self.layout.widths), column, side="right"))]
            raise ValueError(
                f"{path}: ids of {name!r} must be in [0, {limits[column]}), got {ids[row, column]} in row "
                f"{first + row}; set data.vocab, or data.hash_size for hashed ids"
            )


class CriteoChunks(Chunks):
    """Row ranges of Criteo's files.

    Args:
        files: the folder.
        vocab: rows per table.
        ranges: (day, first row, row after the last) of each range that belongs to the split.
        chunk_rows: the longest chunk.
    """

    whole = False

    def __init__(
        self, files: CriteoFiles, vocab: list[int], ranges: list[tuple[int, int, int]], chunk_rows: int
    ) -> None:
        self._files, self._vocab = files, vocab
        self._chunks = [
            (day, start, min(start + chunk_rows, last))
            for day, first, last in ranges
            for start in range(first, last, chunk_rows)
        ]
        self.sizes = [last - first for _, first, last in self._chunks]
        self.where = str(files.folder)

    def read(self, chunk: int, first: int, last: int) -> Split:
        """Return the rows [first, last) of a chunk."""
        day, start, _ = self._chunks[chunk]
        return self._files.read(day, start + first, start + last, self._vocab)


def read_criteo(config: DataConfig) -> ClickData:
    """Read Criteo's files into memory.

    A TSV (the Kaggle or the one-terabyte set) is converted once, into a folder beside it.

    Args:
        config: path, hash_size or contiguous ids, and the split.

    Returns:
        26 id features and 13 dense ones, the latter as log(x + 4) where the files hold raw counts.

    Raises:
        ValueError: files that are missing, empty or of the wrong shape, NaN, negative ids, labels other than 0 and 1.
    """
    files = CriteoFiles(config)
    vocab = files.table_rows(config)
    rows = Split.join([files.read(day, 0, size, vocab) for day, size in enumerate(files.sizes)])
    if vocab is None:
        blocks = rows.ids.split(list(files.layout.widths), dim=1)
        vocab = [int(block.max()) + 1 for block in blocks]
    number = draw_split(config, files.sizes)
    if not 0 < config.subsample <= 1:
        raise ValueError(f"data.subsample: must be in (0, 1], got {config.subsample}")
    kept = np.random.default_rng(config.split_seed + 1).random(len(rows)) < config.subsample
    splits = []
    for split in range(3):
        chosen = np.flatnonzero((number == split) & kept)
        if len(chosen) == 0:
            raise ValueError(f"data.path: every split must have rows, got {len(rows)} rows in all")
        splits.append(rows.take(torch.from_numpy(chosen)))
    return ClickData(files.layout.features, vocab, INT_FEATURE_COUNT, *splits, widths=files.layout.widths)


def stream_criteo(config: DataConfig, pin_memory: bool = False) -> StreamedData:
    """Open Criteo's files; only their headers are read here.

    Args:
        config: path, hash_size or contiguous ids, and the split, by order or by the last file.
        pin_memory: whether batches are put into page-locked memory.

    Raises:
        ValueError: files that are missing, empty, cut off or of the wrong shape; tables whose rows nothing states.
    """
    if config.split_by == "drawn" or config.subsample != 1:
        raise ValueError(
            f"data.split_by: must be 'order' or 'last_file' with data.streaming, and data.subsample 1, got "
            f"{config.split_by!r} and {config.subsample}"
        )
    files = CriteoFiles(config)
    vocab = files.table_rows(config)
    if vocab is None:
        raise ValueError(
            f"data.vocab: must give the rows of every table with data.streaming, got none; or set data.hash_size, or "
            f"convert with `torchrec-compress data criteo`, which writes {VOCAB_FILE}"
        )
    starts = np.cumsum([0, *files.sizes])
    bounds = [0, *split_ends(config, files.sizes), sum(files.sizes)]
    splits: dict[str, Chunks] = {}
    for number, name in enumerate(SPLITS):
        first, last = bounds[number], bounds[number + 1]
        ranges = [
            (day, max(first - int(start), 0), min(last - int(start), size))
            for day, (start, size) in enumerate(zip(starts, files.sizes, strict=False))
        ]
        ranges = [(day, begin, end) for day, begin, end in ranges if begin < end]
        splits[name] = CriteoChunks(files, vocab, ranges, config.chunk_rows)
    return StreamedData(config, vocab, INT_FEATURE_COUNT, files.layout, splits, pin_memory)


def _convert(path: Path) -> Path:
    """Convert a TSV and return the folder of the NumPy files."""
    from torchrec_compress.train.data.criteo_tsv import convert

    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"data.path: must be a folder of NumPy files or a TSV with rows, got {str(path)!r}")
    folder = path.with_name(path.name + ".npy")
    convert(path, folder)
    return folder


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order day_2 before day_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _hash_sizes(config: DataConfig) -> list[int] | None:
    """Return what the ids of each table are taken modulo of, or None."""
    if config.hash_size is None:
        return None
    given = config.hash_size
    sizes = (
        [given] * CAT_FEATURE_COUNT if isinstance(given, int) else [given.get(name, 0) for name in DEFAULT_CAT_NAMES]
    )
    if min(sizes) < 1 or (isinstance(given, dict) and len(given) != CAT_FEATURE_COUNT):
        raise ValueError(f"data.hash_size: must be positive for each of {DEFAULT_CAT_NAMES}, got {given}")
    return sizes


def _open_day(dense: Path, sparse: Path, labels: Path, sums: dict[str, Any]) -> _Day:
    files = {path: CheckedFile(path, sums[path.name]) for path in (dense, sparse, labels) if path.name in sums}
    for file in files.values():
        file.check(0, 1)  # headers are parsed next
    arrays = _load(dense), _load(labels)
    blocks = [_load(sparse)] if sparse.suffix == ".npy" else _load_members(sparse)
    columns = CAT_FEATURE_COUNT if sparse.suffix == ".npy" else None
    for file, array, width in ((dense, arrays[0], INT_FEATURE_COUNT), *((sparse, block, columns) for block in blocks)):
        if array.ndim != 2 or len(array) == 0 or (width is not None and array.shape[1] != width):
            what = "dense columns" if file is dense else "ids"
            raise ValueError(f"{file}: must have rows of {width or 'some'} {what}, got the shape {array.shape}")
    if any(block.dtype.kind not in "iu" for block in blocks):
        raise ValueError(f"{sparse}: ids must be of an int type, got {[str(block.dtype) for block in blocks][:3]}")
    lengths = {len(arrays[0]), len(arrays[1]), *(len(block) for block in blocks)}
    if len(lengths) != 1 or arrays[1].size != len(arrays[1]):
        raise ValueError(f"{dense.parent}: files of {dense.name} must have equally many rows, got {sorted(lengths)}")
    mapped = {dense: arrays[0], sparse: blocks[0], labels: arrays[1]}
    return _Day(dense, arrays[0], blocks, arrays[1], [(file, mapped[path]) for path, file in files.items()])


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: must be a whole NumPy file, got {path.stat().st_size} bytes that are not ({error})"
        ) from error


def _load_members(path: Path) -> list[np.ndarray]:
    """Map the arrays 0.npy to 25.npy of an uncompressed NPZ file into memory, which `np.load` does not."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = [archive.getinfo(f"{number}.npy") for number in range(CAT_FEATURE_COUNT)]
            return [_map_member(path, file, info) for info in infos]
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: must be a whole NPZ file with {CAT_FEATURE_COUNT} arrays ({error})") from error


def _map_member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed; write it with numpy.savez")
    file.seek(info.header_offset + 26)  # the local header: 30 bytes, of which the last four are two lengths
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, 1)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError(f"{info.filename} is in Fortran order")
    return np.memmap(path, dtype=dtype, shape=shape, mode="r", offset=file.tell())
