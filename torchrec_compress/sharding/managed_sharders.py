"""The sharders of tables with managers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from torchrec_compress.modules.managed import ManagedBagRows, ManagedCollection
from torchrec_compress.sharding.fused_params import check_kernels
from torchrec_compress.sharding.managed import ShardedManagedCollection
from torchrec_compress.sharding.native import RowSharder


class ManagedCollectionSharder(RowSharder[ManagedCollection]):
    """Shard tables with managers row-wise or table-wise, in whole blocks; arguments as in `RowSharder`."""

    def make(
        self, module: ManagedCollection, params: dict[str, ParameterSharding], env: ShardingEnv, device: torch.device
    ) -> ShardedManagedCollection:
        """Return the sharded collection."""
        check_kernels("tables with managers", self.fused_params, params)
        return ShardedManagedCollection(module, params, env, device, self._stock)

    def marked(self, module: ManagedCollection) -> Iterable[nn.Parameter]:
        """Return the native tables."""
        return module.native.parameters()

    def shardable_parameters(self, module: ManagedCollection) -> dict[str, nn.Parameter]:
        """Return the native tables by the names of the user's tables."""
        return {
            table.name: module.native[table.name].embeddings[table.native.name].weight for table in module.configs()
        }

    @property
    def module_type(self) -> type[ManagedCollection]:
        """The module that is sharded."""
        return ManagedCollection


class ManagedBagRowsSharder(ManagedCollectionSharder):
    """Shard tables with managers of pooled collections."""

    of_bags = True

    @property
    def module_type(self) -> type[ManagedBagRows]:
        """The module that is sharded."""
        return ManagedBagRows
