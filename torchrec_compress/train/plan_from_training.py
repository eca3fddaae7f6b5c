"""The dry run of a training config: what it says of its tables, in the words of a `PlanConfig`.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from typing import Any

from torchrec_compress.schema import nearest
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.config import RunConfig, of_pattern
from torchrec_compress.train.data.mlperf import FEATURES, MULTI_HOT_SIZES, TABLE_ROWS
from torchrec_compress.train.width_trial import WidthTrial

# tables that train in the backward are never data-parallel
_TRAINED_TYPES = ("table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard")


def from_training(run: RunConfig) -> dict[str, Any]:
    """Return the keys of a `PlanConfig` that a training config states.

    Args:
        run: whose tables' sizes are known without its data.

    Raises:
        ValueError: they are not, or the methods depend on the data.
    """
    from torchrec_compress.train.check import check_tables, compression_of  # needs torch
    from torchrec_compress.train.sized import Sized

    wanted = compression_of(run.compression)
    if isinstance(wanted, Budget | WidthTrial):
        what = "budget, which is shared out" if isinstance(wanted, Budget) else "trial, which is decided"
        raise ValueError(
            f"compression: must name the methods to be planned, got a {what} by the data; give methods by table"
        )
    sizes = known_rows(run)
    tables = check_tables(run, wanted, sizes)
    compression: Any = run.compression or run.pretrain_compression
    if isinstance(wanted, Sized):
        compression = {name: method.to_dict() for name, method in wanted.methods(tables).items()}
    stage = run.retrain if run.compression else run.pretrain
    pooling = _pooling(run, stage.batch_size)
    return {
        "tables": {
            name: {
                "num_embeddings": size,
                "embedding_dim": run.model.widths.get(name),
                "pooling_factor": float(pooling.get(name, 1)),
                "sharding_types": _sharding_types(run, name),
            }
            for name, size in sizes.items()
        },
        "embedding_dim": run.model.embedding_dim,
        "unpooled": run.data.sequence.by is not None,
        "compression": compression,
        "global_batch_size": stage.batch_size,
        "optimizer": stage.optim.tables,
        "dense_optimizer": stage.optim.dense,
    }


def _sharding_types(run: RunConfig, name: str) -> list[str]:
    """Return the sharding types that training allows for a table."""
    return list(of_pattern(run.parallel.sharding_types, name) or _TRAINED_TYPES)


def _pooling(run: RunConfig, batch_size: int) -> dict[str, Any]:
    """Return the ids of a bag by table name, where there may be several; of sequences the most that a row looks up."""
    sequence = run.data.sequence
    if sequence.by is not None:  # what was, what came next, and its part of the pool
        return {sequence.item: 2 * sequence.max_length + sequence.num_negatives / batch_size}
    if run.data.kind == "generator":
        return MULTI_HOT_SIZES if run.data.generator.multi_hot else {}
    return run.data.pooling


def known_rows(run: RunConfig) -> dict[str, int]:
    """Return rows by table name.

    Raises:
        ValueError: the config leaves some to its data.
    """
    data = run.data
    if data.kind == "generator" and data.generator.criteo_rows:
        return {name: min(size, data.generator.criteo_rows) for name, size in TABLE_ROWS.items()}
    if data.kind == "generator":
        from torchrec_compress.train.data.generator import CONTEXTS

        rows, item = (
            {"user": data.generator.num_users, "item": data.generator.num_items, **CONTEXTS},
            data.sequence.item,
        )
        if data.sequence.by is not None and item not in rows:
            raise ValueError(f"data.sequence.item: must be a column of {list(rows)}, got {item!r}{nearest(item, rows)}")
        return rows if data.sequence.by is None else {item: rows[item]}
    names = FEATURES if data.kind == "criteo" else data.features or list(data.vocab)
    if data.sequence.by is not None:
        names = [data.sequence.item]
    if data.kind == "criteo" and data.hash_size is not None:
        return dict.fromkeys(names, data.hash_size) if isinstance(data.hash_size, int) else dict(data.hash_size)
    missing = [name for name in names if name not in data.vocab]
    if missing or not names:
        raise ValueError(
            f"data.vocab: must give the rows of every table to plan without data, got none for {missing or 'any'}; add "
            "them, or write a config with `tables:` (see configs/plan_criteo_1tb.yaml)"
        )
    return {name: data.vocab[name] for name in names if name not in data.drop}
