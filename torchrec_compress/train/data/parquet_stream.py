"""Clicks from Parquet files, read one row group at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import Layout
from torchrec_compress.train.data.inputs import is_data
from torchrec_compress.train.data.memory import Split
from torchrec_compress.train.data.parquet import check_ids, column_values, to_kinds, to_labels
from torchrec_compress.train.data.parquet_schema import (
    Schema,
    check_columns,
    check_folders,
    list_columns,
    open_parquet,
    parquet_files,
    read_schema,
    rows_of,
    warn_of_row_numbers,
)
from torchrec_compress.train.data.source import SPLITS
from torchrec_compress.train.data.splits import draw_split
from torchrec_compress.train.data.streamed import Chunks, StreamedData


@dataclass(frozen=True)
class _Group:
    """A row group: its file, its number there, its rows and the number of the first of them in the file."""

    path: Path
    number: int
    num_rows: int
    first_row: int


class ParquetChunks(Chunks):
    """Row groups of Parquet files.

    Args:
        config: which values count as a click.
        schema: which columns are what.
        layout: how many ids a row has.
        vocab: rows per table.
        groups: the row groups.
        metadata: of the files, by path, so that opening one again is quick.
    """

    whole = True

    def __init__(
        self,
        config: DataConfig,
        schema: Schema,
        layout: Layout,
        vocab: list[int],
        groups: list[_Group],
        metadata: dict[Path, pq.FileMetaData],
    ) -> None:
        self.sizes = [group.num_rows for group in groups]
        self.where = str(config.path)
        self._config, self._schema, self._layout, self._vocab = config, schema, layout, vocab
        self._groups, self._metadata = groups, metadata

    def read(self, chunk: int, first: int, last: int) -> Split:
        """Return the rows [first, last) of a row group."""
        group, schema = self._groups[chunk], self._schema
        path, start = group.path, group.first_row + first
        try:
            with pq.ParquetFile(path, metadata=self._metadata[path]) as file:
                table = file.read_row_group(group.number, columns=schema.columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path}: row group {group.number} must be readable, got {error}") from error
        table = table.slice(first, last - first)
        blocks = []
        for name, width, size in zip(schema.features, self._layout.widths, self._vocab, strict=True):
            ids = column_values(path, name, table[name], dense=False, width=width, first=start)
            check_ids(path, name, ids, size, start)
            blocks.append(ids if ids.ndim == 2 else ids[:, None])
        dense = [column_values(path, name, table[name], dense=True, first=start) for name in schema.dense]
        label = column_values(path, schema.label, table[schema.label], dense=False, first=start)
        kinds = None
        if schema.kind is not None:
            values = column_values(path, schema.kind, table[schema.kind], dense=False, first=start)
            kinds = to_kinds(path, self._config, values, to_labels(path, self._config, label, start), start)
        return Split(
            torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.int32, casting="unsafe")),
            torch.from_numpy(to_labels(path, self._config, label, start).astype(np.float32)),
            torch.from_numpy(np.stack(dense, axis=1)) if dense else None,
            None if kinds is None else torch.from_numpy(kinds),
        )


def stream_parquet(config: DataConfig, pin_memory: bool = False) -> StreamedData:
    """Open Parquet files; only what stands at their ends is read here.

    The rows of a table are, in this order: `data.vocab`, the schema metadata `vocab` of the first file, the largest
    id in the statistics of all row groups + 1.

    Args:
        config: a file; a folder of files; or a folder with the folders train, valid and test of files.
        pin_memory: whether batches are put into page-locked memory.

    Raises:
        ValueError: files that are missing, empty, cut off or lack a column; a row group of several splits; a table
            whose rows nothing states.
    """
    path = Path(str(config.path))
    folders = [path / name for name in SPLITS]
    by_folder = any(folder.is_dir() for folder in folders)
    _check_settings(config, path, by_folder)
    files = [parquet_files(folder) for folder in folders] if by_folder else [parquet_files(path)]
    every = [file for part in files for file in part]
    start = open_parquet(every[0])
    if by_folder:
        has_split = config.split in start.schema_arrow.names
        config = replace(config, split=None, drop=[*config.drop, *([str(config.split)] if has_split else [])])
    metadata = {}
    schema = read_schema(start, every[0], config)
    for file in every:
        opened = open_parquet(file)
        check_columns(opened, file, schema)
        metadata[file] = opened.metadata
        own = list_columns(opened, schema)
        if own != list_columns(start, schema):
            raise ValueError(f"{file}: must have lists in the same columns as {every[0]}, got them in {own}")
    lists = list_columns(start, schema)
    missing = [name for name in lists if name not in config.pooling]
    if missing:
        raise ValueError(f"data.pooling: must state the most ids per row of columns of lists, got none for {missing}")
    unused = sorted(set(config.pooling) - set(lists))
    if unused:
        raise ValueError(f"data.pooling: must name columns of lists, of which there are {lists}, got {unused}")
    layout = Layout(schema.features, tuple(config.pooling.get(name, 1) for name in schema.features), bool(lists))
    vocab = [_table_rows(config, schema, name, metadata) for name in schema.features]
    groups = [_groups(part, metadata) for part in files] if by_folder else _by_split(config, files[0], metadata)
    schema = replace(schema, others=[])  # the split is known by now
    splits: dict[str, Chunks] = {
        name: ParquetChunks(config, schema, layout, vocab, part, metadata)
        for name, part in zip(SPLITS, groups, strict=True)
    }
    return StreamedData(config, vocab, len(schema.dense), layout, splits, pin_memory)


def _check_settings(config: DataConfig, path: Path, by_folder: bool) -> None:
    """Raise ValueError for settings that streaming, or folders of splits, leave nothing to do, and for stray files."""
    for key, wanted in (("row_filter", None), ("subsample", 1.0), ("subsample_by", None)):
        if getattr(config, key) != wanted:
            raise ValueError(f"data.{key}: must not be set with data.streaming, got {getattr(config, key)!r}")
    if not by_folder:
        return
    if any(is_data(file) for file in path.glob("*.parquet")):
        raise ValueError(f"{path}: must hold files or folders of splits, got both; move one of them away")
    check_folders(path, known=SPLITS)
    for key, wanted in (("split_by", "drawn"), ("fractions", [0.8, 0.1]), ("split_seed", 0)):
        if getattr(config, key) != wanted:
            raise ValueError(
                f"data.{key}: has no meaning with the folders train, valid and test of {path}, got "
                f"{getattr(config, key)!r}"
            )


def _groups(files: list[Path], metadata: dict[Path, pq.FileMetaData]) -> list[_Group]:
    groups = []
    for file in files:
        first = 0
        for number in range(metadata[file].num_row_groups):
            size = metadata[file].row_group(number).num_rows
            groups.append(_Group(file, number, size, first))
            first += size
    return groups


def _by_split(config: DataConfig, files: list[Path], metadata: dict[Path, pq.FileMetaData]) -> list[list[_Group]]:
    """Return the row groups of train, valid and test."""
    groups = _groups(files, metadata)
    if config.split is None:
        sizes = [metadata[file].num_rows for file in files]
        numbers = draw_split(config, sizes, [group.num_rows for group in groups]).tolist()
    else:
        numbers = [_split_of(config.split, group, metadata[group.path]) for group in groups]
    return [[group for group, number in zip(groups, numbers, strict=True) if number == split] for split in range(3)]


def _split_of(column: str, group: _Group, metadata: pq.FileMetaData) -> int:
    found = _statistics(metadata, group.number, column)
    low, high = (found.min, found.max) if found is not None and found.has_min_max else (None, None)
    if found is not None and found.null_count != 0:
        many = "an unknown number of" if found.null_count is None else f"{found.null_count:,}"
        raise ValueError(
            f"{group.path}: row group {group.number} must have no missing values in its column {column!r}, got {many}; "
            "fill them, or set data.split to null"
        )
    if low is None or low != high or low not in (0, 1, 2):
        raise ValueError(
            f"{group.path}: row group {group.number} must lie in one split, but its column {column!r} holds {low} to "
            f"{high}; sort the rows by it before they are written, or set data.split to null"
        )
    return int(low)


def _statistics(metadata: pq.FileMetaData, group: int, column: str) -> Any:
    """Return the statistics of a column in a row group, or None."""
    for number in range(metadata.num_columns):
        path = metadata.schema.column(number).path  # "ids.list.element" of a column of lists
        if path == column or path.startswith(f"{column}.list."):
            return metadata.row_group(group).column(number).statistics
    return None


def _table_rows(config: DataConfig, schema: Schema, name: str, metadata: dict[Path, pq.FileMetaData]) -> int:
    if name in config.vocab or name in schema.stated:
        return config.vocab.get(name, schema.stated.get(name, 0))
    rows = 0
    for path, found in metadata.items():
        for group in range(found.num_row_groups):
            statistics = _statistics(found, group, name)
            if statistics is None or (statistics.num_values and not statistics.has_min_max):
                raise ValueError(f"data.vocab: must give the rows of {name!r}, of which {path} has no statistics")
            if statistics.num_values:  # none where all lists are empty
                rows = max(rows, rows_of(path, name, int(statistics.max)))
    if rows < 1:
        raise ValueError(f"{config.path}: column {name!r} must hold an id, got none; name it in data.drop")
    if rows >= sum(found.num_rows for found in metadata.values()) > 1:  # how many there are is not known
        warn_of_row_numbers(Path(str(config.path)), name)
    return rows
