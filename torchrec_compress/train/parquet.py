"""Clicks from a Parquet file of int columns."""

from __future__ import annotations

import ast
import operator
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from torchrec_compress.train.config import DataConfig, nearest
from torchrec_compress.train.data import SPLITS, ClickData, Split

_COMPARE = {
    "!=": operator.ne,
    "==": operator.eq,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def read_parquet(config: DataConfig) -> ClickData:
    """Read a Parquet file.

    The rows of a table are, in this order: `data.vocab`, the schema metadata `vocab` (a JSON or Python
    mapping by column), max + 1.

    Args:
        config: path, columns, filter and split.

    Returns:
        All kept rows, ids int32.

    Raises:
        ValueError: the file is missing or empty, lacks a column, or a column is not of ints, has nulls, negative ids or
            ids beyond its vocabulary; a split without rows.
    """
    path = Path(str(config.path))
    columns, stated = _read_columns(path, config)
    features = _features(path, config, list(columns), stated)
    labels = _labels(path, config, columns)
    kept = _kept(config, columns, len(labels))
    ids, vocab = _ids(path, config, columns, features, stated)
    split = _split(path, config, columns, len(labels))
    kinds = columns[config.kind_column].astype(np.int8) if config.kind_column else None
    parts = []
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(kept & (split == number))
        if len(rows) == 0:
            raise ValueError(f"{path}: the {name} split must have rows, got none; see data.split and data.row_filter")
        parts.append(
            Split(
                torch.from_numpy(ids[rows]),
                torch.from_numpy(labels[rows].astype(np.float32)),
                kinds=None if kinds is None else torch.from_numpy(kinds[rows]),
            )
        )
    return ClickData(features, vocab, 0, *parts)


def _read_columns(path: Path, config: DataConfig) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the int columns and the vocabulary that the metadata states."""
    if not path.is_file():
        raise ValueError(f"data.path: must be a Parquet file, got {str(path)!r}, which does not exist")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: must be a Parquet file, got {path.stat().st_size} bytes that are not ({error})"
        ) from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path}: must have rows, got none")
    text = (file.schema_arrow.metadata or {}).get(b"vocab")
    stated = {str(key): int(value) for key, value in _mapping(path, text).items()} if text else {}
    wanted = set(config.features) | {config.label, config.split, config.kind_column, config.subsample_by} - {None}
    if config.row_filter:
        wanted.add(_parse_filter(config.row_filter)[0])
    if not config.features:
        wanted |= set(stated) or set(file.schema_arrow.names)
    wanted -= set(config.drop)
    names = file.schema_arrow.names
    for name in sorted(wanted):  # type: ignore[type-var]
        if name not in names:
            raise ValueError(f"{path}: must have the column {name!r}, got {names}{nearest(str(name), names)}")
    table = file.read(columns=[name for name in names if name in wanted])
    columns = {}
    for name in table.column_names:
        column = table[name]
        if not pa.types.is_integer(column.type) and not pa.types.is_boolean(column.type):
            raise ValueError(f"{path}: column {name!r} must be of an int type, got {column.type}")
        if column.null_count:
            raise ValueError(f"{path}: column {name!r} must have no missing values, got {column.null_count}")
        columns[name] = column.to_numpy()
    return columns, stated


def _mapping(path: Path, text: bytes) -> dict[str, int]:
    try:
        return dict(ast.literal_eval(text.decode()))  # reads JSON of numbers as well
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: the schema metadata 'vocab' must be a mapping, got {text[:60]!r}") from error


def _features(path: Path, config: DataConfig, names: list[str], stated: dict[str, int]) -> list[str]:
    if config.features:
        return list(config.features)
    filtered = {_parse_filter(config.row_filter)[0]} if config.row_filter else set()
    special = {config.label, config.split, config.kind_column, *config.drop} | (filtered - set(stated))
    features = [name for name in (stated or names) if name not in special]
    if not features:
        raise ValueError(f"{path}: must have id columns besides {sorted(map(str, special))}, got {names}")
    return features


def _labels(path: Path, config: DataConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    labels = columns[config.label].astype(np.int64)
    if config.positive_from is not None:
        return labels >= config.positive_from
    values = np.unique(labels)
    if not set(values.tolist()) <= {0, 1}:
        raise ValueError(
            f"{path}: column {config.label!r} must hold 0 and 1, got {values[:5].tolist()}; set data.positive_from"
        )
    return labels


def _kept(config: DataConfig, columns: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    """Return which rows pass the filter and the subsample: (num_rows,) bool."""
    kept = np.ones(num_rows, dtype=bool)
    if config.row_filter:
        name, compare, value = _parse_filter(config.row_filter)
        kept &= _COMPARE[compare](columns[name], value)
    if not 0 < config.subsample <= 1:
        raise ValueError(f"data.subsample: must be in (0, 1], got {config.subsample}")
    if config.subsample < 1:
        rng = np.random.default_rng(config.split_seed + 1)
        if config.subsample_by:
            groups = columns[config.subsample_by]
            kept &= (rng.random(int(groups.max()) + 1) < config.subsample)[groups]
        else:
            kept &= rng.random(num_rows) < config.subsample
    return kept


def _parse_filter(text: str) -> tuple[str, str, int]:
    match = re.fullmatch(r"\s*(\w+)\s*(!=|==|>=|<=|>|<)\s*(-?\d+)\s*", text)
    if not match:
        raise ValueError(f"data.row_filter: must be like 'rating != 3', got {text!r}")
    return match[1], match[2], int(match[3])


def _ids(
    path: Path, config: DataConfig, columns: dict[str, np.ndarray], features: list[str], stated: dict[str, int]
) -> tuple[np.ndarray, list[int]]:
    """Return the ids (rows, F) int32 and the rows of every table, both checked."""
    unknown = sorted(set(config.vocab) - set(features))
    if unknown:
        raise ValueError(f"data.vocab: must name features of {features}, got {unknown}")
    ids = np.empty((len(columns[features[0]]), len(features)), dtype=np.int32)
    vocab = []
    for position, name in enumerate(features):
        low, high = int(columns[name].min()), int(columns[name].max())
        size = config.vocab.get(name, stated.get(name, high + 1))
        if low < 0 or high >= min(size, 2**31):
            bad = low if low < 0 else high
            raise ValueError(f"{path}: ids of column {name!r} must be in [0, {size}), got {bad}")
        vocab.append(size)
        ids[:, position] = columns[name]
    return ids, vocab


def _split(path: Path, config: DataConfig, columns: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    """Return 0, 1 or 2 per row."""
    if config.split is not None:
        split = columns[config.split]
        values = np.unique(split).tolist()
        if not set(values) <= {0, 1, 2}:
            raise ValueError(f"{path}: column {config.split!r} must hold 0, 1 and 2, got {values[:5]}")
        return split
    shares = config.fractions
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) >= 1:
        raise ValueError(f"data.fractions: must be the shares of train and valid, below 1 in all, got {shares}")
    return np.searchsorted(np.cumsum(shares), np.random.default_rng(config.split_seed).random(num_rows), side="right")
