"""The sharders of tables with managers."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.modules.managed import ManagedBagRows, ManagedCollection
from torchrec_compress.sharding.checks import check_env, check_names, tell_of_defaults, tell_of_missing_codec
from torchrec_compress.sharding.managed import SHARDING_TYPES, ShardedManagedCollection
from torchrec_compress.sharding.native import NativeSharder, rows_of_bags


class ManagedCollectionSharder(NativeSharder[ManagedCollection]):
    """Shard tables with managers row-wise or table-wise, in whole blocks.

    Args:
        stock: TorchRec's sharder, where its fused parameters or quantised collectives are wanted.
    """

    def __init__(self, stock: EmbeddingCollectionSharder | None = None) -> None:
        super().__init__(EmbeddingCollectionSharder() if stock is None else stock)

    def shard(
        self,
        module: ManagedCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollection:
        """Return the sharded collection."""
        where = module_fqn or "tables with managers"
        check_env(env, where)
        check_names(where, params, module.native.keys(), optional=False)
        tell_of_defaults(module.native.parameters(), sorted(params), self.fused_params)
        device = torch.device("cpu") if device is None else device
        return ShardedManagedCollection(module, params, env, device, self._stock)

    def shardable_parameters(self, module: ManagedCollection) -> dict[str, nn.Parameter]:
        """Return the native tables by the names of the user's tables."""
        return {
            table.name: module.native[table.name].embeddings[table.native.name].weight for table in module.configs()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return what keeps blocks whole, and on one rank each."""
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the kernel whose rows and optimizer state lie where they can be moved: in no cache."""
        return [EmbeddingComputeKernel.FUSED.value]

    @property
    def module_type(self) -> type[ManagedCollection]:
        """The module that is sharded."""
        return ManagedCollection


class ManagedBagRowsSharder(ManagedCollectionSharder):
    """Shard tables with managers of pooled collections: rows travel, but the settings are those of the user's bags.

    Args:
        bags: the sharder of the user's `EmbeddingBagCollection`, whose fused parameters and codecs are taken.
    """

    def __init__(self, bags: BaseEmbeddingSharder[EmbeddingBagCollection] | None = None) -> None:
        super().__init__(rows_of_bags(bags))

    def shard(
        self,
        module: ManagedCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollection:
        """Return the sharded collection."""
        tell_of_missing_codec(self.qcomm_codecs_registry, params)
        return super().shard(module, params, env, device, module_fqn)

    @property
    def module_type(self) -> type[ManagedBagRows]:
        """The module that is sharded."""
        return ManagedBagRows
