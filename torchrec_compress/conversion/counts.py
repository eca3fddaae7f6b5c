"""Look-ups per id and pairs of ids, from files of someone else's, and from what an optimizer has summed up."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.conversion.entries import Entry
from torchrec_compress.fit.checks import first_wrong
from torchrec_compress.train.sealed import check_regular, load_plain

_SUMS = ("momentum1", "momentum_1", "sum")  # of FBGEMM's row-wise Adagrad, TorchRec's and torch's
_MOMENTS = ("momentum2", "momentum_2", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of Adam and its like
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# what NumPy and torch raise of bytes that a stranger wrote, a size that no memory has among it
_UNREADABLE = (ValueError, TypeError, OSError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
_BATCH = 1 << 20
_HELP = "give a .npy or .npz of look-ups per id, a .pt of such a tensor, or file.parquet:column of ids"


def read_counts(where: str, text: str, num_rows: int) -> Tensor:
    """Return look-ups per id, (N,).

    Args:
        where: names the table in errors.
        text: a path; that of a Parquet file of ids may end in ":column".
        num_rows: N.

    Raises:
        ValueError: it is missing, a link, or holds anything else.
    """
    path, column = _split(text)
    try:
        if path.suffix == ".parquet":
            return _counted(path, column, num_rows)
        found = _read(path, "counts")
    except _UNREADABLE as error:
        raise ValueError(f"{where}: counts: {path}: {error}; {_HELP}") from None
    if found.shape != (num_rows,) or found.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(
            f"{where}: counts: {path}: must hold {num_rows} numbers, one per id, got {found.dtype} "
            f"{tuple(found.shape)}; {_HELP}"
        )
    return found


def check_files(name: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError where a file is not there, also one of a table that is not converted."""
    for key, text in given.items():
        path, _ = _split(str(text))
        if (problem := check_regular(path)) is not None:
            raise ValueError(f"{name}: {key!r}: {path}: {problem}; {_HELP}")


def read_contexts(where: str, text: str) -> tuple[Tensor, Tensor]:
    """Return pairs (id, context id), ((P,), (P,)) int64; arguments and errors as in `read_counts`."""
    path, _ = _split(text)
    try:
        if path.suffix == ".npz":
            with _loaded(path) as file:
                ids, contexts = (torch.from_numpy(file[name]) for name in ("ids", "contexts"))
        else:
            both = _read(path, "")
            if both.dim() != 2 or both.shape[0] != 2:
                raise ValueError(f"must hold 2 x P ids, got {tuple(both.shape)}")
            ids, contexts = both
        if ids.dtype not in _INTEGERS or contexts.dtype not in _INTEGERS:
            raise ValueError(f"must hold integers, got {ids.dtype} and {contexts.dtype}")
    except _UNREADABLE as error:
        raise ValueError(
            f"{where}: contexts: {path}: {error}; give a .npz with 'ids' and 'contexts', or a .npy or .pt of 2 x P"
        ) from None
    return ids.long(), contexts.long()


def _split(text: str) -> tuple[Path, str | None]:
    name, colon, column = text.rpartition(":")
    return (Path(name), column) if colon and name.endswith(".parquet") else (Path(text), None)


def _regular(path: Path) -> Path:
    problem = check_regular(path)
    if problem is not None:
        raise ValueError(problem)
    return path


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """Yield what a file of NumPy's holds: one array, or several that are read when they are asked for."""
    with _regular(path).open("rb") as opened:
        yield np.load(opened, allow_pickle=False)


def _read(path: Path, name: str) -> Tensor:
    """Return the one array of a file of NumPy's or torch's."""
    _regular(path)
    if path.suffix in (".npy", ".npz"):
        with _loaded(path) as found:
            if path.suffix == ".npz":
                if name not in found.files and len(found.files) != 1:
                    raise ValueError(f"must hold one array, or one called {name!r}, got {found.files}")
                found = found[name if name in found.files else found.files[0]]
            return torch.from_numpy(np.ascontiguousarray(found))
    if path.suffix in (".pt", ".pth"):
        with path.open("rb") as opened:
            value = load_plain(opened, "its content", "save one tensor")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"must hold a tensor, got {type(value).__name__}")
        return value
    raise ValueError(f"must end in .npy, .npz, .pt or .parquet, got {path.suffix or 'no ending'!r}")


def _counted(path: Path, column: str | None, num_rows: int) -> Tensor:
    """Return how often each id stands in a column, read by batches."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            "must be read by pyarrow, which is not installed; pip install torchrec-compress[train]"
        ) from None
    found = np.zeros(num_rows, dtype=np.int64)
    try:
        with pq.ParquetFile(_regular(path)) as file:
            names = file.schema_arrow.names
            if column is None and len(names) == 1:
                column = names[0]
            if column not in names:
                raise ValueError(f"must have the column {column!r} of ids, got {names[:10]}")
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
                flat = batch.column(0)
                while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
                    flat = flat.flatten()
                ids = flat.drop_null().to_numpy(zero_copy_only=False)
                if ids.dtype.kind not in "iu":
                    raise ValueError(f"column {column!r} must hold integers, got {ids.dtype}")
                if len(ids) and (ids.min() < 0 or ids.max() >= num_rows):
                    raise ValueError(f"ids must be in [0, {num_rows}), got {ids.min()} to {ids.max()}")
                values, times = np.unique(ids, return_counts=True)
                found[values] += times
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 (bytes of a stranger raise whatever they like)
        raise ValueError(f"must be a Parquet file, got {type(error).__name__}: {error}") from None
    return torch.from_numpy(found)


def counts_of_optimizer(
    where: str, checkpoint: Checkpoint, keys: Mapping[str, Any], num_rows: int, numbered: Sequence[str] = ()
) -> Tensor:
    """Return what Adagrad has summed up per row, which grows with look-ups; the mean of those above zero is 1.

    Args:
        where: names the table in errors.
        checkpoint: that holds the optimizer's state.
        keys: of the state of the table's weight.
        num_rows: N.
        numbered: optimizers that call parameters by numbers, of which nobody knows whose sums are whose.

    Raises:
        ValueError: there is no such state, or several.
    """
    found = [key for key in keys if _last(key) in _SUMS and checkpoint.tensors[key].shape[:1] == (num_rows,)]
    if others := [key for key in keys if _last(key) in _MOMENTS]:
        raise ValueError(
            f"{where}: counts: must be the sums of one Adagrad in the checkpoint, got moments, {others[0]!r}; give "
            "files of look-ups, or null"
        )
    if len(found) != 1:
        raise ValueError(
            f"{where}: counts: must be the sums of one Adagrad in the checkpoint, got {found or 'none'}"
            + (f" by its name, {list(numbered)} by numbers; save these by names" if numbered and not found else "")
            + "; give files of look-ups, or null"
        )
    sums = _row_means(checkpoint.tensors[found[0]])
    if first_wrong(sums) is not None:
        raise ValueError(
            f"{where}: counts: {found[0]!r} must be finite and not negative, got others; give files, or null"
        )
    used = sums > 0
    if not bool(used.any()):
        return sums + 1
    return sums / sums[used].mean().clamp(max=sums.max())  # rounded, the mean of equal sums may be above all of them


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _row_means(entry: Entry) -> Tensor:
    rows, step = entry.shape[0], 65536
    found = torch.empty(rows)
    for first in range(0, rows, step):
        block = entry.rows(first, min(first + step, rows)).float()
        found[first : first + step] = block.reshape(len(block), -1).mean(1)
    return found
