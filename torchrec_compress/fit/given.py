"""Codes that someone else made, such as semantic ids of an RQ-VAE: read from a file, which is checked, in blocks."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_compress.fit.codes import Encoder

_BLOCK_ROWS = 1 << 18
_HELP = "give a .npy of (N, M) integers, or a .parquet of M columns of integers, or file.parquet:column of lists of M"


@dataclass(frozen=True)
class CodeShape:
    """What codes of a file must be.

    Attributes:
        where: names the table in errors.
        num_rows: ids, N.
        num_codes: of an id, M.
        codebook_size: codes must be below it, K.
        first_size: those of the first column below it, at most K.
    """

    where: str
    num_rows: int
    num_codes: int
    codebook_size: int
    first_size: int


@dataclass(frozen=True)
class GivenEncoder(Encoder):
    """Codes of a file, row i those of id i.

    Attributes:
        path: of the file; that of a Parquet file may end in ":column".
        shape: that it must have.
    """

    path: str
    shape: CodeShape

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of ids, [L] -> [L, M] int64; see `Encoder`.

        Raises:
            ValueError: as `check_given`.
        """
        found = torch.empty(len(ids), self.shape.num_codes, dtype=torch.int64)
        if len(ids):
            given, first, last = ids.cpu(), int(ids.min()), int(ids.max()) + 1
            for start, block in _blocks(self.path, self.shape, first, last):
                mine = (given >= start) & (given < start + len(block))
                found[mine] = block[given[mine] - start]
        return found


def check_given(path: str, shape: CodeShape) -> None:
    """Raise ValueError unless a file holds codes of this shape, all of them in range; read once, and when it changed.

    Args:
        path: of a .npy or .parquet file; the latter may end in ":column", a column of lists.
        shape: of the codes.
    """
    try:
        found = os.stat(_split(path)[0])
    except OSError as error:
        raise _error(path, shape, f"must be a file, got none ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise _error(path, shape, "must be a regular file")
    _check_once(path, shape, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=256)
def _check_once(path: str, shape: CodeShape, stamp: tuple[int, ...]) -> None:
    for _ in _blocks(path, shape, 0, shape.num_rows):
        pass


def _blocks(path: str, shape: CodeShape, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the codes of ids [first, last) in blocks, with the first id of each: (L, M) int64, all in range."""
    try:
        file = _opened(path, shape)
        for start in range(first, last, _BLOCK_ROWS):
            block = file.rows(start, min(start + _BLOCK_ROWS, last))
            _check_range(block, start, shape)
            yield start, torch.from_numpy(block.astype(np.int64))
    except ImportError:
        raise _error(path, shape, "must be read by pyarrow; pip install torchrec-compress[train]") from None
    except ValueError as error:
        raise _error(path, shape, str(error)) from None
    except Exception as error:  # noqa: BLE001 (bytes of a stranger raise whatever they like)
        raise _error(path, shape, f"must be such a file, got {type(error).__name__}: {error}") from None


def _error(path: str, shape: CodeShape, text: str) -> ValueError:
    return ValueError(f"{shape.where}: codes: {path}: {text}; {_HELP}")


def _split(path: str) -> tuple[Path, str | None]:
    name, colon, column = path.rpartition(":")
    return (Path(name), column) if colon and name.endswith(".parquet") else (Path(path), None)


def _check_range(block: Any, first: int, shape: CodeShape) -> None:
    """Raise ValueError for a code of a block, (L, M) integer, that no codeword has."""
    for column, codes in enumerate(block.T):
        most = shape.codebook_size if column else shape.first_size
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= most:
            wrong = low if low < 0 else high
            told = " (the others are escape codes of hot rows)" if most < shape.codebook_size else ""
            number = first + int((codes == wrong).argmax())
            raise ValueError(f"code {column} of id {number} must be in [0, {most}){told}, got {wrong}")


def _opened(path: str, shape: CodeShape) -> _Array | _Columns:
    """Return a file whose shape and dtype are those that it must have."""
    file, column = _split(path)
    if file.suffix not in (".npy", ".parquet"):
        raise ValueError(f"must end in .npy or .parquet, got {file.suffix or 'no ending'!r}")
    found = _Array(file) if file.suffix == ".npy" else _Columns(file, column, shape.num_codes)
    wanted = (shape.num_rows, shape.num_codes)
    if found.shape != wanted:
        raise ValueError(f"must hold {wanted[0]} x {wanted[1]} codes, one row per id, got {found.shape}")
    return found


class _Array:
    """A .npy file, of which no more is read than is asked for."""

    def __init__(self, file: Path) -> None:
        try:
            self._array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):  # NumPy would advise to trust the file
            raise ValueError("must be a whole .npy file of numbers") from None
        self.shape: tuple[int, ...] = self._array.shape
        if self._array.dtype.kind not in "iu":
            raise ValueError(f"must hold integers, got {self._array.dtype}")

    def rows(self, first: int, last: int) -> Any:
        """Return codes of ids [first, last), (L, M) integer."""
        return np.asarray(self._array[first:last])


class _Columns:
    """A Parquet file of M columns, or of one of lists of M; row groups that hold no id that is asked for stay."""

    def __init__(self, file: Path, column: str | None, num_codes: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._file, self._num_codes = pq.ParquetFile(file), num_codes
        schema, about = self._file.schema_arrow, self._file.metadata
        self._ends = [*accumulate(about.row_group(number).num_rows for number in range(about.num_row_groups))]
        if column is not None and column not in schema.names:
            raise ValueError(f"must have the column {column!r}, got {schema.names[:10]}")
        self._names = schema.names if column is None else [column]
        kinds = [schema.field(name).type for name in self._names]
        self._has_lists = len(kinds) == 1 and hasattr(kinds[0], "value_type")
        kinds = [kinds[0].value_type] if self._has_lists else kinds
        if not all(pa.types.is_integer(kind) for kind in kinds):
            raise ValueError(f"must hold integers, got {[str(kind) for kind in kinds][:10]}")
        self.shape = (about.num_rows, num_codes if self._has_lists else len(kinds))

    def rows(self, first: int, last: int) -> Any:
        """Return codes of ids [first, last), (L, M) int64."""
        import pyarrow as pa

        pieces = []
        for group in range(bisect_right(self._ends, first), bisect_right(self._ends, last - 1) + 1):
            start = self._ends[group - 1] if group else 0
            table = self._file.read_row_group(group, columns=self._names)
            table = table.slice(max(first - start, 0), min(last, self._ends[group]) - max(first, start))
            if any(column.null_count for column in table.columns):
                raise ValueError(f"must hold no nulls, got some in rows {first} to {last}")
            columns = [self._flat(column) if self._has_lists else column for column in table.columns]
            pieces.append(np.stack([column.cast(pa.int64()).to_numpy() for column in columns], axis=1))
        return np.concatenate(pieces).reshape(-1, self._num_codes)

    def _flat(self, column: Any) -> Any:
        """Return the codes of a column of lists, one after another."""
        from pyarrow.compute import call_function

        lengths = call_function("list_value_length", [column]).unique().to_pylist()
        if lengths != [self._num_codes]:
            raise ValueError(f"must hold lists of {self._num_codes}, got such of {lengths[:10]}")
        flat = call_function("list_flatten", [column])
        if flat.null_count:
            raise ValueError("must hold no nulls, got some in lists")
        return flat
