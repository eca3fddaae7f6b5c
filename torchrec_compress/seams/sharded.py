"""Modules, tensors and models that TorchRec has sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import (
    ParameterSharding,
    ShardedModule,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, data_type_to_sparse_type
from torchrec.modules.embedding_modules import EmbeddingCollection


def sharded_configs(module: nn.Module) -> tuple[list[BaseEmbeddingConfig], bool] | None:
    """Return the tables of a stock collection that is sharded and whether its batches carry weights, or None.

    Its `unsharded_module_type` does not tell: that of a `ShardedEmbeddingCollection` is `nn.Module`.
    """
    if isinstance(module, ShardedEmbeddingBagCollection):
        return list(module._embedding_bag_configs), bool(module._is_weighted)
    if isinstance(module, ShardedEmbeddingCollection):
        return list(module._embedding_configs), False
    return None


def output_types(module: nn.Module | None) -> list[torch.dtype | None]:
    """Return the dtypes that a plan says of the outputs of a stock collection that is sharded; else none at all."""
    if not isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
        return []
    return [as_dtype(sharding.output_dtype) for sharding in module.module_sharding_plan.values()]


def as_dtype(kind: Any) -> torch.dtype | None:
    """Return the dtype that is meant by one of TorchRec's data types, or of FBGEMM's; anything else as it is."""
    kind = data_type_to_sparse_type(kind) if isinstance(kind, DataType) else kind
    return kind.as_dtype() if hasattr(kind, "as_dtype") else kind


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


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module is called otherwise than its class is, as by a train pipeline until it is detached."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_compiled(parts: Iterable[nn.Module]) -> bool:
    """Return whether a user has called `compile()` of one of some modules, which another one or a copy forgets."""
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)


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


def data_parallel_wrapper_of(model: DistributedModelParallel) -> DataParallelWrapper:
    """Return what wraps a model's dense part, with the settings that it was given."""
    return model._data_parallel_wrapper


def let_go(model: DistributedModelParallel, where: str) -> None:
    """Have a wrapper hold no other any more, whose hooks would be called beside those of the next, and not be called.

    Without the hooks of `DistributedDataParallel` ranks would train apart, and nothing would show.

    Args:
        model: that is used up.
        where: names what used it up.
    """
    model._dmp_wrapped_module = model.module

    def forward(*given: Any, **named: Any) -> NoReturn:
        raise RuntimeError(
            f"{where}: this DistributedModelParallel is used up, and its ranks would drift apart; call what {where} "
            f"returned, as in model = {where}(model, ...)"
        )

    model.forward = forward


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
