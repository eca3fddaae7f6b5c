"""Clicks from Parquet files, all rows in memory; and what reading them in chunks shares with that."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.data.parquet_schema import (
    Schema,
    check_columns,
    is_list,
    list_columns,
    open_parquet,
    parquet_files,
    parse_filter,
    read_schema,
    rows_of,
    warn_of_row_numbers,
)
from torchrec_compress.train.data.source import SPLITS
from torchrec_compress.train.data.splits import draw_split

_COMPARE = {
    "!=": operator.ne,
    "==": operator.eq,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def read_parquet(config: DataConfig) -> ClickData:
    """Read a Parquet file, or all files of a folder in the order of their names.

    The rows of a table are, in this order: `data.vocab`, the schema metadata `vocab` (a JSON or Python
    mapping by column), max + 1.

    Args:
        config: path, columns, filter and split.

    Returns:
        All kept rows, ids int32.

    Raises:
        ValueError: a file is missing or empty, lacks a column, or a column is not of ints, has nulls, negative ids or
            ids beyond its vocabulary; a split without rows.
    """
    path = Path(str(config.path))
    files = parquet_files(path)
    start = open_parquet(files[0])
    schema = read_schema(start, files[0], config)
    tables = [read_file(file, schema, list_columns(start, schema)) for file in files]
    parts = [
        {name: column_values(file, name, table[name], dense=name in schema.dense) for name in table.column_names}
        for file, table in zip(files, tables, strict=True)
    ]
    columns = {name: _join([part[name] for part in parts]) for name in parts[0]}
    labels = to_labels(path, config, columns[config.label])
    kept = kept_rows(config, columns, len(labels))
    ids, vocab, widths = _ids(path, config, columns, schema)
    split = _split(path, config, columns, [len(part[config.label]) for part in parts])
    dense = np.stack([columns[name] for name in schema.dense], axis=1) if schema.dense else None
    kinds = to_kinds(path, config, columns[config.kind_column], labels) if config.kind_column else None
    splits = []
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(kept & (split == number))
        if len(rows) == 0:
            raise ValueError(f"{path}: the {name} split must have rows, got none; see data.split and data.row_filter")
        splits.append(
            Split(
                torch.from_numpy(ids[rows]),
                torch.from_numpy(labels[rows].astype(np.float32)),
                None if dense is None else torch.from_numpy(dense[rows]),
                None if kinds is None else torch.from_numpy(kinds[rows]),
            )
        )
    ragged = bool((ids < 0).any())
    return ClickData(schema.features, vocab, len(schema.dense), *splits, widths=tuple(widths), ragged=ragged)


def read_file(path: Path, schema: Schema, lists: list[str]) -> pa.Table:
    """Return the columns of a file that a schema names, with lists where the first file of the folder has them.

    Raises:
        ValueError: it is no such file.
    """
    file = open_parquet(path)
    check_columns(file, path, schema)
    if (own := list_columns(file, schema)) != lists:
        raise ValueError(f"{path}: must have lists in the columns {lists} as the first file has, got them in {own}")
    return file.read(columns=schema.columns)


def column_values(
    path: Path, name: str, column: pa.ChunkedArray, *, dense: bool, width: int | None = None, first: int = 0
) -> np.ndarray:
    """Return a column: (rows,) ints, float32 where it is dense; (rows, width) int64 of lists, -1 after short ones.

    Args:
        path: for errors.
        name: of the column.
        column: its values.
        dense: whether it holds dense values.
        width: most ids of a list; None takes the longest.
        first: number of its first row in the file, for errors.

    Raises:
        ValueError: missing values, dense values that are not finite, a negative id in a list, a list that is too long.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"{path}: column {name!r} must have no missing values, got {array.null_count}, first in row {row}"
        )
    if is_list(array.type):
        return _list_values(path, name, array, width, first)
    values = array.to_numpy(zero_copy_only=False)
    if not dense:
        return values
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{path}: column {name!r} must be finite, got {values[row]} in row {first + row}")
    return values


def _list_values(path: Path, name: str, array: pa.ListArray, width: int | None, first: int) -> np.ndarray:
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    flat = array.flatten()
    if flat.null_count:
        raise ValueError(f"{path}: lists of column {name!r} must have no missing values, got {flat.null_count}")
    values = flat.to_numpy(zero_copy_only=False).astype(np.int64)
    longest = int(lengths.max(initial=0))
    if width is not None and longest > width:
        row = first + int(lengths.argmax())
        raise ValueError(
            f"{path}: column {name!r} must have at most data.pooling = {width} ids per row, got {longest} in row {row}"
        )
    if values.min(initial=0) < 0:  # -1 marks what a short list lacks
        raise ValueError(f"{path}: ids of column {name!r} must not be negative, got {values.min()}")
    ids = np.full((len(lengths), max(longest, 1) if width is None else width), -1, dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = values
    return ids


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Join a column of several files; lists are filled up to the longest."""
    width = max(part.shape[1] if part.ndim == 2 else 0 for part in parts)
    if width:
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
    return np.concatenate(parts)


def to_labels(path: Path, config: DataConfig, column: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the labels, 0 or 1.

    Raises:
        ValueError: other values, and the config does not say from which on they count as a click.
    """
    if config.positive_from is not None:
        return column >= config.positive_from  # before any cast: unsigned numbers may be too large for one
    if column.min(initial=0) < 0 or column.max(initial=0) > 1:
        row = int(np.flatnonzero((column < 0) | (column > 1))[0])
        raise ValueError(
            f"{path}: column {config.label!r} must hold 0 and 1, got {column[row]} in row {first + row}; set "
            "data.positive_from"
        )
    return column.astype(np.int64)


def to_kinds(path: Path, config: DataConfig, column: np.ndarray, labels: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the kinds of negatives, int8; 0 is a click.

    Raises:
        ValueError: a kind is outside [0, 127], or a click has another kind than 0, or another row has it.
    """
    wrong = np.flatnonzero((column < 0) | (column > 127) | ((column == 0) != (labels == 1)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{path}: column {config.kind_column!r} must be 0 for clicks and 1 to 127 for others, got {column[row]} "
            f"with label {int(labels[row])} in row {first + row}"
        )
    return column.astype(np.int8)


def check_ids(path: Path, name: str, ids: np.ndarray, size: int, first: int = 0) -> None:
    """Raise ValueError where an id is outside [0, size); -1 is none in columns of lists, which are two-dimensional."""
    if size < 1:
        raise ValueError(f"{path}: column {name!r} must hold an id, got none in {len(ids)} rows; name it in data.drop")
    lowest = -1 if ids.ndim == 2 else 0
    if int(ids.min(initial=0)) < lowest or int(ids.max(initial=0)) >= size:
        where = tuple(np.argwhere((ids < lowest) | (ids >= size))[0].tolist())
        raise ValueError(
            f"{path}: ids of column {name!r} must be in [0, {size}), got {ids[where]} in row {first + where[0]}"
        )


def kept_rows(config: DataConfig, columns: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    """Return which rows pass the filter and the subsample: (num_rows,) bool.

    Raises:
        ValueError: a subsample outside (0, 1], or one by a column that holds no ids.
    """
    kept = np.ones(num_rows, dtype=bool)
    if config.row_filter:
        name, compare, value = parse_filter(config.row_filter)
        kept &= _COMPARE[compare](columns[name], value)
    if not 0 < config.subsample <= 1:
        raise ValueError(f"data.subsample: must be in (0, 1], got {config.subsample}")
    if config.subsample < 1:
        rng = np.random.default_rng(config.split_seed + 1)
        if config.subsample_by:
            if columns[config.subsample_by].dtype == np.bool_:
                raise ValueError(
                    f"data.subsample_by: column {config.subsample_by!r} must hold ids, got bools, of which all rows of "
                    "one would be left out; choose a column of ids"
                )
            groups = columns[config.subsample_by].astype(np.int64)
            if groups.min(initial=0) < 0 or groups.max(initial=0) >= 2**31:
                raise ValueError(
                    f"data.subsample_by: column {config.subsample_by!r} must hold ids in [0, 2**31), got "
                    f"{groups.min()} to {groups.max()}"
                )
            kept &= (rng.random(int(groups.max()) + 1) < config.subsample)[groups]
        else:
            kept &= rng.random(num_rows) < config.subsample
    return kept


def _ids(
    path: Path, config: DataConfig, columns: dict[str, np.ndarray], schema: Schema
) -> tuple[np.ndarray, list[int], list[int]]:
    """Return the ids (rows, sum of widths) int32, the rows of every table and the widths, all checked."""
    vocab, blocks = [], []
    for name in schema.features:
        values = columns[name]
        width = config.pooling.get(name, values.shape[1] if values.ndim == 2 else 1)
        if width < (values.shape[1] if values.ndim == 2 else 1):
            raise ValueError(f"data.pooling: must be at least the ids of a row, got {width} for {name!r}")
        size = config.vocab.get(name, schema.stated.get(name)) or rows_of(path, name, int(values.max()))
        check_ids(path, name, values, size)
        if values.ndim == 1 and size >= len(values) > 1 and len(np.unique(values)) == len(values):
            warn_of_row_numbers(path, name)
        vocab.append(size)
        blocks.append(values if values.ndim == 2 else values[:, None])
    widths = [block.shape[1] for block in blocks]
    ids = np.concatenate(blocks, axis=1, dtype=np.int32, casting="unsafe")  # all are below 2**31
    return ids, vocab, widths


def _split(path: Path, config: DataConfig, columns: dict[str, np.ndarray], file_sizes: list[int]) -> np.ndarray:
    """Return 0, 1 or 2 per row."""
    if config.split is None:
        return draw_split(config, file_sizes)
    split = columns[config.split]
    values = np.unique(split).tolist()
    if not set(values) <= {0, 1, 2}:
        raise ValueError(f"{path}: column {config.split!r} must hold 0, 1 and 2, got {values[:5]}")
    return split
