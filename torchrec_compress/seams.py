"""Every seam of TorchRec that is not in its documented interface, in one place.

Checked on TorchRec 1.6 to 1.9; where a release moves one, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ShardingOption, StorageReservation
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardedModule,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, EmbeddingTableConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

__all__ = [
    "EmbeddingCollectionContext",
    "KJTList",
    "KJTListSplitsAwaitable",
    "RowTable",
    "SequenceShardingContext",
    "backward_optimizer",
    "backward_settings",
    "copy_backward_optimizer",
    "copy_to_host",
    "forget_inputs",
    "fused_rows",
    "has_codecs",
    "local_shards",
    "look_up_local",
    "num_backward_optimizers",
    "optimizers_in_backward",
    "plan_as",
    "rescaled",
    "reserved_share",
    "row_exchange",
    "sequence_context",
    "shard_bounds",
    "sharded_configs",
    "sharded_tensor",
    "steps_in_backward",
    "steps_uncounted",
    "without_input_exchange",
]

# what `apply_optimizer_in_backward` leaves on a parameter for TorchRec's sharders
_READ_BY_SHARDERS = ("_optimizer_classes", "_optimizer_kwargs")


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


def sharded_configs(module: nn.Module) -> tuple[list[BaseEmbeddingConfig], bool] | None:
    """Return the tables of a stock collection that is sharded and whether its batches carry weights, or None.

    Its `unsharded_module_type` does not tell: that of a `ShardedEmbeddingCollection` is `nn.Module`.
    """
    if isinstance(module, ShardedEmbeddingBagCollection):
        return list(module._embedding_bag_configs), bool(module._is_weighted)
    if isinstance(module, ShardedEmbeddingCollection):
        return list(module._embedding_configs), False
    return None


def needs_indices(module: nn.Module) -> bool:
    """Return whether an unpooled collection, sharded or not, returns ids as well."""
    return isinstance(module, EmbeddingCollection | ShardedEmbeddingCollection) and bool(module._need_indices)


def forget_inputs(module: nn.Module) -> None:
    """Have sharded stock collections of a module learn anew which features a batch has, and in which order."""
    stock = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
    parts: list[Any] = [part for part in module.modules() if isinstance(part, stock)]
    for part in parts:
        part._has_uninitialized_input_dist, part._has_features_permute = True, True
        part._input_dists, part._features_order, part._feature_splits = [], [], []


def has_codecs(module: nn.Module) -> bool:
    """Return whether something of a sharded module sends values in other types than they have."""
    return any(part.qcomm_codecs_registry for part in module.modules() if isinstance(part, ShardedModule))


@contextmanager
def steps_uncounted(model: nn.Module) -> Iterator[None]:
    """Give FBGEMM's kernels back the count of steps that they had: those of Adam's kind count every forward."""
    counts = [
        (tensor, tensor.clone())
        for module in model.modules()
        for tensor in (getattr(module, "iter", None), getattr(module, "iter_cpu", None))
        if isinstance(tensor, Tensor)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in counts:
                tensor.copy_(before)


def sharded_tensor(local: Tensor, num_rows: int, sharding: ParameterSharding, env: ShardingEnv) -> ShardedTensor:
    """Return this rank's rows as part of a `ShardedTensor`; no rank waits for another.

    Args:
        local: (rows of this rank, width).
        num_rows: of the whole table.
        sharding: the planner's choice.
        env: ranks and process group.
    """
    metadata = sharding.sharding_spec.build_metadata(  # type: ignore[union-attr]
        torch.Size([num_rows, local.shape[1]]), TensorProperties(dtype=local.dtype)
    )
    mine = [shard for shard in metadata.shards_metadata if shard.placement.rank() == env.rank]  # type: ignore[union-attr]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[Shard(local, shard) for shard in mine],
        sharded_tensor_metadata=metadata,
        process_group=env.process_group,
    )


def shape_and_dtype(value: Tensor | ShardedTensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Return those of a tensor, of all ranks' shards together: asked itself, a `ShardedTensor` warns of its class."""
    if isinstance(value, ShardedTensor):
        whole = value.metadata()
        return tuple(whole.size), whole.tensor_properties.dtype
    return tuple(value.shape), value.dtype


def local_shards(value: object) -> list[tuple[Tensor, list[int] | None]]:
    """Return this rank's shards of a tensor with their offsets in the whole; None for a plain tensor."""
    if isinstance(value, ShardedTensor):
        return [(shard.tensor, list(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    if hasattr(value, "local_shards"):
        return list(zip(value.local_shards(), value.local_offsets(), strict=True))  # type: ignore[attr-defined]
    if hasattr(value, "to_local"):
        return local_shards(value.to_local())  # type: ignore[attr-defined]
    return [(value, None)]  # type: ignore[list-item]


def is_cut_by_rows(value: object) -> bool:
    """Return whether each shard of a tensor has whole rows, and no two ranks have the same ones."""
    if not isinstance(value, ShardedTensor):
        return False
    whole = value.metadata()
    return all(shard.shard_sizes[1] == whole.size[1] for shard in whole.shards_metadata)


def environment_of(model: DistributedModelParallel) -> ShardingEnv:
    """Return the ranks of a model and their process group."""
    return model._env


def let_go(model: DistributedModelParallel) -> None:
    """Have a model hold no wrapper any more, whose hooks on its parameters would be called beside those of another."""
    model._dmp_wrapped_module = model.module


def copy_to_host(value: ShardedTensor) -> ShardedTensor:
    """Return a copy whose shards are in the host's memory and share nothing with the original; no rank waits.

    torch's own staging copies the whole storage behind each shard, and FBGEMM keeps all tables of a rank in one.
    """
    whole = value.metadata()
    shards = [
        ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{shard.placement.rank()}/cpu")  # type: ignore[union-attr]
        for shard in whole.shards_metadata
    ]
    on_host = {tuple(shard.shard_offsets): shard for shard in shards}
    properties = TensorProperties(dtype=whole.tensor_properties.dtype)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[
            Shard(shard.tensor.detach().to("cpu", copy=True), on_host[tuple(shard.metadata.shard_offsets)])
            for shard in value.local_shards()
        ],
        sharded_tensor_metadata=ShardedTensorMetadata(shards, whole.size, properties),
        process_group=value._process_group,
    )


def backward_optimizer(parameter: Tensor) -> str | None:
    """Return the name of the optimizer that `apply_optimizer_in_backward` gave a parameter, or None."""
    classes = getattr(parameter, _READ_BY_SHARDERS[0], None)
    return classes[0].__name__ if classes else None


def num_backward_optimizers(parameter: Tensor) -> int:
    """Return how many optimizers `apply_optimizer_in_backward` gave a parameter."""
    return len(getattr(parameter, _READ_BY_SHARDERS[0], ()))


def backward_settings(parameter: Tensor) -> dict[str, Any]:
    """Return the settings that `apply_optimizer_in_backward` gave the optimizer of a parameter, or none."""
    given = getattr(parameter, _READ_BY_SHARDERS[1], None)
    settings = dict(given[0]) if given else {}
    # TorchRec's sharders write into what parameters share, whichever of them comes first
    if "learning_rate" in settings:
        settings["lr"] = settings.pop("learning_rate")
    settings.pop("optimizer", None)
    return settings


def copy_backward_optimizer(source: Tensor, target: Tensor) -> None:
    """Have TorchRec's sharders train one parameter as `apply_optimizer_in_backward` said of another, if it did."""
    for mark in _READ_BY_SHARDERS:
        if hasattr(source, mark):
            setattr(target, mark, getattr(source, mark))


def steps_in_backward(parameter: nn.Parameter) -> bool:
    """Return whether a parameter steps in the backward, as long as no sharder has taken it."""
    return hasattr(parameter, "_in_backward_optimizers")


def optimizers_in_backward(parameter: Tensor) -> list[torch.optim.Optimizer]:
    """Return the optimizers that train a parameter in its own backward, as long as no sharder has taken it."""
    return list(getattr(parameter, "_in_backward_optimizers", ()))


def plan_as(option: ShardingOption, tensor: Tensor | None = None, is_pooled: bool | None = None) -> None:
    """Have the stock estimators see another tensor than an option's own, or other pooling; the option is changed."""
    if tensor is not None:
        option._tensor = tensor
    if is_pooled is not None:
        option._is_pooled = is_pooled


def reserved_share(reservation: StorageReservation) -> float:
    """Return the share of memory that a reservation holds back; the stock planner prints it when it finds no plan."""
    return getattr(reservation, "_percentage", 0.0)


def planner_parts(planner: Any) -> dict[str, Any]:
    """Return what a stock planner was made with, by the names that it takes, but for how it lists options."""
    names = {"proposer": "_proposers", "partitioner": "_partitioner", "performance_model": "_perf_model"}
    names |= {name: f"_{name}" for name in ("stats", "callbacks", "timeout_seconds", "debug")}
    return {name: getattr(planner, kept) for name, kept in names.items()}
