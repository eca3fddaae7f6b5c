"""Sequences from Parquet files or from the embedded generator: rows grouped by a column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_compress.schema import nearest
from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.memory import Split
from torchrec_compress.train.data.sequences import SequenceData


def open_sequences(config: DataConfig, pin_memory: bool = False) -> SequenceData:
    """Return the sequences that a config asks for.

    Args:
        config: `sequence` says which columns; of the generator's rows, clicks alone count.
        pin_memory: whether batches are put into page-locked memory, for a GPU.

    Raises:
        ValueError: a column or a file is missing or malformed, see `read_parquet`; sequences that `SequenceData`
            refuses.

    Example:
        >>> from torchrec_compress.train.config import GeneratorConfig
        >>> from torchrec_compress.train.config_sequence import SequenceConfig
        >>> sequence = SequenceConfig(by="user", num_negatives=8)
        >>> clicks = GeneratorConfig(num_rows=2000, num_users=50, num_items=40)
        >>> open_sequences(DataConfig(generator=clicks, sequence=sequence)).vocab
        [40]
    """
    groups, items, num_items = _generated(config) if config.kind == "generator" else _read(config)
    wanted = config.sequence
    if wanted.order == "drawn":
        order = np.random.default_rng(wanted.order_seed).permutation(len(groups))
        groups, items = groups[order], items[order]
    together = np.argsort(groups, kind="stable")
    _, lengths = np.unique(groups, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = torch.from_numpy(items[together].astype(np.int32))
    return SequenceData(sequences, torch.from_numpy(offsets), num_items, wanted, pin_memory)


def _generated(config: DataConfig) -> tuple[NDArray, NDArray, int]:
    """Return the groups and items of the generator's clicks in its order, and how many items there are."""
    data = generate(config.generator)
    for key in ("by", "item"):
        name = getattr(config.sequence, key)
        if name not in data.features:
            raise ValueError(
                f"data.sequence.{key}: must be a column of {data.features}, got {name!r}{nearest(name, data.features)}"
            )
    rows = Split.join([data.train, data.valid, data.test])
    ids = rows.ids[rows.labels > 0].numpy()
    by, item = (data.features.index(str(name)) for name in (config.sequence.by, config.sequence.item))
    return ids[:, by], ids[:, item], data.vocab[item]


def _read(config: DataConfig) -> tuple[NDArray, NDArray, int]:
    """Return the groups and items of all kept rows of Parquet files in their order, and the rows of the table."""
    from torchrec_compress.train.data.parquet import check_ids, column_values, kept_rows, read_file  # needs pyarrow
    from torchrec_compress.train.data.parquet_schema import open_parquet, parquet_files, read_schema, rows_of

    path, item, by = Path(str(config.path)), config.sequence.item, str(config.sequence.by)
    # what tells sequences apart is read in place of a label, which they have none of
    wanted = replace(config, features=[item], label=by, split=None)
    files = parquet_files(path)
    schema = read_schema(open_parquet(files[0]), files[0], wanted)
    tables = [read_file(file, schema, []) for file in files]
    columns = {
        name: np.concatenate(
            [column_values(file, name, table[name], dense=False) for file, table in zip(files, tables, strict=True)]
        )
        for name in schema.columns
    }
    kept = kept_rows(wanted, columns, len(columns[by]))
    size = config.vocab.get(item, schema.stated.get(item)) or rows_of(path, item, int(columns[item].max()))
    check_ids(path, item, columns[item], size)
    return columns[by][kept], columns[item][kept], size
