"""Examples from a Parquet file of integer columns."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.dataset import Dataset, Split

_NUM_SPLITS = 3


def parquet(config: DataConfig) -> Dataset:
    """Read a Parquet file whose features are integer columns of ids.

    Table sizes come from the schema's metadata key "vocab" (a mapping by column) where it is present, else they are the
    largest id plus one.

    Args:
        config: path, columns and splits.

    Returns:
        The data set, all in memory (int32 ids).

    Raises:
        ValueError: no such file, an empty one, a missing column, a column that is not of integers, nulls, a negative id,
            an id outside the stated vocabulary, labels other than 0 and 1, or an empty split.
    """
    where = f"data.path {config.path!r}"
    if not config.path or not Path(config.path).is_file():
        raise ValueError(f"{where}: must be a Parquet file, found none; set --data.path")
    try:
        file = pq.ParquetFile(config.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{where}: must be a readable Parquet file, got: {error}") from error
    schema = file.schema_arrow
    roles = [name for name in (config.label, config.split, config.kind, *config.drop) if name]
    features = config.features or [
        field.name
        for field in schema
        if pa.types.is_integer(field.type) and field.name not in roles and field.name not in config.exclude
    ]
    _check_columns(where, schema, [*features, *roles])
    if not features:
        raise ValueError(f"{where}: must have at least one feature column, got none of {schema.names}")
    table = file.read(columns=sorted({*features, *roles}))
    columns = {name: _column(where, table, name) for name in table.column_names}
    keep = np.ones(table.num_rows, dtype=bool)
    for name, value in config.drop.items():
        keep &= columns[name] != value
    if not keep.any():
        raise ValueError(f"{where}: must have rows, got {table.num_rows}, none of them kept by data.drop={config.drop}")
    columns = {name: values[keep] for name, values in columns.items()}
    vocab = _vocab(where, schema, columns, features)
    return _split(where, config, columns, features, vocab)


def _check_columns(where: str, schema: pa.Schema, names: list[str]) -> None:
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ValueError(f"{where}: must have the columns {missing}, got {schema.names}")
    wrong = {name: str(schema.field(name).type) for name in names if not pa.types.is_integer(schema.field(name).type)}
    if wrong:
        raise ValueError(f"{where}: id, label and split columns must hold integers, got {wrong}; encode them first")


def _column(where: str, table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    if column.null_count:
        raise ValueError(f"{where}: column {name!r} must have no nulls, got {column.null_count}")
    return column.to_numpy()


def _vocab(where: str, schema: pa.Schema, columns: dict[str, np.ndarray], features: list[str]) -> dict[str, int]:
    metadata = schema.metadata or {}
    stated = ast.literal_eval(metadata[b"vocab"].decode()) if b"vocab" in metadata else {}
    vocab = {}
    for name in features:
        low, high = int(columns[name].min()), int(columns[name].max())
        vocab[name] = max(int(stated.get(name, high + 1)), 1)
        if low < 0 or high >= vocab[name]:
            raise ValueError(f"{where}: ids of {name!r} must be in [0, {vocab[name]}), got {low} to {high}")
    return vocab


def _split(
    where: str, config: DataConfig, columns: dict[str, np.ndarray], features: list[str], vocab: dict[str, int]
) -> Dataset:
    labels = columns[config.label].astype(np.float32)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{where}: labels in {config.label!r} must be 0 or 1, got {np.unique(labels)[:5].tolist()}")
    rng = np.random.default_rng(config.seed)
    if config.split:
        number = columns[config.split]
    else:
        number = rng.choice(_NUM_SPLITS, size=len(labels), p=(0.8, 0.1, 0.1))
    splits = []
    for split in range(_NUM_SPLITS):
        rows = np.flatnonzero(number == split)
        if split == 0 and config.fraction < 1:
            rows = np.sort(rng.choice(rows, size=max(1, round(len(rows) * config.fraction)), replace=False))
        if not len(rows):
            raise ValueError(f"{where}: split {split} (0 train, 1 valid, 2 test) must have rows, got none")
        ids = torch.from_numpy(np.stack([columns[name][rows].astype(np.int32) for name in features]))
        kinds = torch.from_numpy(columns[config.kind][rows].astype(np.int8)) if config.kind else None
        splits.append(Split(ids, None, torch.from_numpy(labels[rows]), kinds))
    return Dataset(features, vocab, *splits)
