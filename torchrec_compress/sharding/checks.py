"""What sharders check, and tell, before they shard."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torchrec.distributed.types import (
    CommOp,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingEnv2D,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_compress.seams import backward_optimizer

logger = logging.getLogger(__name__)

ROW_KINDS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)


def check_env(env: ShardingEnv, where: str) -> None:
    """Raise ValueError for a sharding environment that compressed collections do not know."""
    if isinstance(env, ShardingEnv2D) or env.output_dtensor:
        raise ValueError(
            f"{where}: the sharding environment must be one-dimensional with ShardedTensor output, got "
            f"{type(env).__name__} with output_dtensor={env.output_dtensor}; use DistributedModelParallel"
        )


def check_names(where: str, plan: Mapping[str, ParameterSharding], names: Collection[str], optional: bool) -> None:
    """Raise ValueError where a plan, made by hand or for another model, does not fit the tables of a part.

    Entries too many are left alone, as by TorchRec, but where none is needed: there they must be misspelt.
    """
    missing = [] if optional else sorted(set(names) - set(plan))
    unknown = sorted(set(plan) - set(names))
    if missing or (optional and unknown):
        raise ValueError(
            f"{where}: the plan must have an entry for each of {sorted(names)}, got none for {missing}, and unknown "
            f"entries {unknown}; let a planner make it, or see 'A plan made by hand' in docs/planner.md"
        )


def check_means(where: str, tables: Iterable[EmbeddingBagConfig], plan: Mapping[str, ParameterSharding]) -> None:
    """Raise ValueError for a plan under which TorchRec returns wrong values: row-wise means beside other tables.

    It adds row-wise bags up and divides them afterwards, by a divisor that knows of row-wise sums, but not of tables
    that are sharded otherwise: those are divided as well (`_create_mean_pooling_divisor`, up to 1.9.2 at least).

    Args:
        where: names the part.
        tables: of one collection.
        plan: by their names.
    """
    tables = list(tables)
    kinds = {table.name: plan[table.name].sharding_type for table in tables}
    means, others = wrong_means(kinds, {table.name for table in tables if table.pooling == PoolingType.MEAN})
    if means:
        raise ValueError(means_told(where, means, others))


def means_told(where: str, means: list[str], others: list[str]) -> str:
    """Return what is wrong with these tables, as `wrong_means` returns them; `where` names their part."""
    return (
        f"{where}: tables that pool by mean must not be row-wise beside tables that are not, got {means} row-wise "
        f"and {others} otherwise; TorchRec would divide those too. Constrain all of them to one of the two kinds"
    )


def wrong_means(kinds: Mapping[str, str], means: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the tables of one collection that pool by mean and are row-wise, and those beside them that are not.

    Both are empty where there are none of one sort, and so nothing is wrong.

    Args:
        kinds: sharding types by table.
        means: tables that pool by mean.

    Example:
        >>> wrong_means({"user": "row_wise", "item": "table_wise"}, {"user"})
        (['user'], ['item'])
    """
    rows = [name for name, kind in kinds.items() if kind in ROW_KINDS and name in means]
    others = [name for name, kind in kinds.items() if kind not in ROW_KINDS]
    return (rows, others) if rows and others else ([], [])


def check_no_empty_shard(plan: dict[str, ParameterSharding]) -> None:
    """Raise ValueError, on every rank alike, for what FBGEMM refuses on the one rank that would hold no rows."""
    for table, sharding in plan.items():
        for shard in getattr(sharding.sharding_spec, "shards", ()):
            if shard.shard_sizes[0] == 0:
                raise ValueError(
                    f"table {table!r}: every rank must hold a row of its native table on a CPU, got a plan that is "
                    f"{sharding.sharding_type} and gives rank {shard.placement.rank()} none; constrain it to table_wise"
                )


def tell_of_defaults(weights: Iterable[nn.Parameter], tables: list[str], fused_params: dict[str, Any] | None) -> None:
    """Log that nobody chose an optimizer: a sharder of the user's put behind ours does not reach native tables."""
    is_chosen = all(backward_optimizer(weight) is not None for weight in weights)
    if not is_chosen and not (fused_params or {}).keys() & {"optimizer", "learning_rate"}:
        logger.warning(
            "tables %s: train with FBGEMM's default optimizer, as neither fused_params of these sharders nor "
            "apply_optimizer_in_backward names one; other sharders in the list do not reach them, pass "
            "get_default_sharders(fused_params=...) or compressed_sharders(mine)",
            tables,
        )


def tell_of_missing_codec(registry: dict[str, QuantizedCommCodecs] | None, tables: Collection[str]) -> None:
    """Log that rows travel as they are where the codecs of the user's bags have none for them."""
    needed = CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name
    if registry and needed not in registry:
        logger.warning(
            "tables %s: rows travel unpooled and as they are, since qcomm_codecs_registry has no %s, got %s",
            sorted(tables),
            needed,
            sorted(registry),
        )
