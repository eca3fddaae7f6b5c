"""TorchRec's exchange of rows between ranks, and its look-up of them, without its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import DataType, EmbeddingTableConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class RowTable:
    """A table whose rows are exchanged unpooled.

    Args:
        name: of the table; also of the one feature that looks it up.
        num_rows: rows of the whole table.
        num_words: width of a row in 32-bit words.
        tensor: the whole table, possibly on the meta device; only its strides are read.
        sharding: the planner's choice.
    """

    name: str
    num_rows: int
    num_words: int
    tensor: Tensor
    sharding: ParameterSharding


def row_exchange(
    sharding_type: str,
    tables: Sequence[RowTable],
    env: ShardingEnv,
    device: torch.device,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
) -> EmbeddingSharding:
    """Return TorchRec's own sequence sharding of tables, used for its input and output exchange only.

    Its lookup, which holds floating-point tables, is never created.

    Args:
        sharding_type: of all of them.
        tables: of one width.
        env: ranks and process group.
        device: of the shards.
        codecs: of what travels back; None: rows travel as they are.
    """
    infos = [
        EmbeddingShardingInfo(
            embedding_config=EmbeddingTableConfig(
                num_embeddings=table.num_rows,
                embedding_dim=table.num_words,
                name=table.name,
                data_type=DataType.FP32,
                feature_names=[table.name],
                pooling=PoolingType.NONE,
                embedding_names=[table.name],
            ),
            param_sharding=table.sharding,
            param=table.tensor,  # type: ignore[arg-type]
            fused_params={},
        )
        for table in tables
    ]
    return ShardedEmbeddingCollection.create_embedding_sharding(sharding_type, infos, env, device, codecs)


def sequence_context(features: KeyedJaggedTensor, input_dist: torch.nn.Module) -> SequenceShardingContext:
    """Return what the exchange back needs to know about the exchange there."""
    row_wise = isinstance(input_dist, RwSparseFeaturesDist)
    return SequenceShardingContext(
        features_before_input_dist=features,
        unbucketize_permute_tensor=input_dist.unbucketize_permute_tensor if row_wise else None,
    )


def shard_bounds(name: str, num_rows: int, sharding: ParameterSharding, env: ShardingEnv) -> tuple[int, int]:
    """Return the rows (first, last + 1) of a table that this rank holds.

    Raises:
        ValueError: the plan cuts columns, or cuts rows unevenly, which TorchRec's exchange does not support.
    """
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return 0, num_rows
    mine = (0, 0)
    block = -(-num_rows // env.world_size)
    for shard in sharding.sharding_spec.shards:  # type: ignore[union-attr]
        first, size, rank = shard.shard_offsets[0], shard.shard_sizes[0], shard.placement.rank()  # type: ignore[union-attr]
        # TorchRec's exchange sends ids of the i-th block to the i-th rank, whatever the plan says
        begin = min(rank * block, num_rows)
        even = size == min(block, num_rows - begin) and (first == begin or size == 0)
        if shard.shard_offsets[1] != 0 or (sharding.sharding_type == ShardingType.ROW_WISE.value and not even):
            raise ValueError(
                f"table {name!r}: shards must be whole rows, {block} per rank in the order of ranks, got rows "
                f"[{first}, {first + size}) from column {shard.shard_offsets[1]} on rank {rank}; let a planner plan it"
            )
        if rank == env.rank:
            mine = (first, first + size)
    return mine


def rescaled(sharding: ParameterSharding, rows: int, to_rows: int, width: int) -> ParameterSharding:
    """Return the sharding of another tensor whose rows lie with those of a table.

    Args:
        sharding: of the table, whole rows.
        rows: of the table that belong together, as those of a block; its shards are multiples of them.
        to_rows: of the other tensor that belong to as many.
        width: of the other tensor.
    """
    shards = [
        ShardMetadata(
            [shard.shard_offsets[0] // rows * to_rows, 0],
            [shard.shard_sizes[0] // rows * to_rows, width],
            shard.placement,
        )
        for shard in sharding.sharding_spec.shards  # type: ignore[union-attr]
    ]
    return replace(sharding, sharding_spec=EnumerableShardingSpec(shards))


def without_input_exchange(collection: ShardedEmbeddingCollection) -> ShardedEmbeddingCollection:
    """Return TorchRec's sharded collection, kept for its look-up alone, so that train pipelines leave it so."""
    collection._has_uninitialized_input_dist = False
    collection._input_dists = []
    return collection


def look_up_local(collection: ShardedEmbeddingCollection, feature: str, rows: Tensor, width: int) -> Tensor:
    """Return rows of the one table of a sharded collection that this rank holds: (L,) int64 -> (L, D).

    Args:
        collection: of one table, of which this rank holds some.
        feature: of the table.
        rows: counted from the first that is held here.
        width: of the table, D.
    """
    lengths = torch.full((1,), len(rows), dtype=rows.dtype, device=rows.device)
    asked = KeyedJaggedTensor([feature], rows, lengths=lengths, stride=1, length_per_key=[len(rows)])
    return collection._lookups[0](asked).view(-1, width)


def fused_rows(collection: ShardedEmbeddingCollection) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weight of the one table of a sharded collection and its optimizer state by name, as live tensors.

    Args:
        collection: of one table, of which this rank holds some, with an optimizer in the backward.
    """
    lookup: Any = collection._lookups[0]
    kernel = lookup._emb_modules[0].emb_module
    weight = kernel.split_embedding_weights()[0]
    of_table = kernel.get_optimizer_state()
    state = of_table[0] if of_table else {}  # plain SGD keeps none
    return weight, {name: value for name, value in state.items() if value.shape[:1] == weight.shape[:1]}
