"""The sharders: one per part of a compressed collection, as TorchRec ties sharding types to the sharder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import (
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.modules.code_tables import CodeTableCollection
from torchrec_compress.modules.decoder import Decoder
from torchrec_compress.modules.remapped import (
    RemappedEmbeddingBagCollection,
    RemappedEmbeddingBagRows,
    RemappedEmbeddingCollection,
)
from torchrec_compress.modules.replicated import strip_in_backward_optimizers
from torchrec_compress.seams import freeze, hold_still
from torchrec_compress.sharding.checks import (
    check_env,
    check_means,
    check_names,
    check_no_empty_shard,
    tell_of_defaults,
    tell_of_missing_codec,
)
from torchrec_compress.sharding.code_tables import ShardedCodeTableCollection
from torchrec_compress.sharding.fused_params import check_kernels
from torchrec_compress.sharding.native import Module, NativeSharder, output_type, rows_of_bags
from torchrec_compress.sharding.remapped import (
    ShardedRemappedEmbeddingBagCollection,
    ShardedRemappedEmbeddingCollection,
)

logger = logging.getLogger(__name__)

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value


def _device(device: torch.device | None) -> torch.device:
    return torch.device("cpu") if device is None else device


class CodeTableCollectionSharder(BaseEmbeddingSharder[CodeTableCollection]):
    """Shard code tables row-wise, table-wise or data-parallel.

    Args:
        deduplicate: whether each id of a batch is asked for once per table (fewer bytes, one sort).
        fused_params: of native tables, of which codes take the output's dtype alone.
    """

    def __init__(self, deduplicate: bool = True, fused_params: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._deduplicate, self._settings = deduplicate, dict(fused_params or {})

    def shard(
        self,
        module: CodeTableCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCodeTableCollection:
        """Return the sharded collection."""
        check_env(env, "code tables")
        where = module_fqn or "code tables"
        check_names(where, params, module.banks.keys(), optional=False)
        made = ShardedCodeTableCollection(module, params, env, _device(device), self._deduplicate)
        made.output_type = output_type(where, self._settings, params)
        return made

    def shardable_parameters(self, module: CodeTableCollection) -> dict[str, nn.Parameter]:
        """Return the code tables by the names of the user's tables; they are buffers."""
        return {name: bank.codes for name, bank in module.banks.items()}

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return what the exchange of codes can do."""
        return [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value, _DATA_PARALLEL]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the name that the planner's tables of bandwidths know."""
        dense = sharding_type == _DATA_PARALLEL
        return [EmbeddingComputeKernel.DENSE.value if dense else EmbeddingComputeKernel.FUSED.value]

    @property
    def module_type(self) -> type[CodeTableCollection]:
        """The module that is sharded."""
        return CodeTableCollection


class _RemappedSharder(NativeSharder[Module]):
    """What the two sharders of native tables share.

    The planner, and so the user's constraints, know a native table by the name of the user's table, and by
    "table.part" where the module holds several of it.
    """

    def _native_names(self, module: Module) -> dict[str, str]:
        """Return the physical table name by the name that a plan has for it."""
        return {entry.planned: entry.native_table for entry in module.remaps}  # type: ignore[union-attr]

    def _native_plan(
        self, module: Module, params: dict[str, ParameterSharding], device: torch.device, path: str | None
    ) -> dict[str, ParameterSharding]:
        check_names(path or "native tables", params, self._native_names(module), optional=False)
        check_kernels(path or "native tables", self.fused_params, params)
        if device.type == "cpu":
            check_no_empty_shard(params)
        tell_of_defaults(module.native.parameters(), sorted(params), self.fused_params)  # type: ignore[union-attr]
        return {physical: params[planned] for planned, physical in self._native_names(module).items()}

    def shardable_parameters(self, module: Module) -> dict[str, nn.Parameter]:
        """Return the native tables by the names that a plan has for them."""
        native = self._stock.shardable_parameters(module.native)
        return {planned: native[physical] for planned, physical in self._native_names(module).items()}

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return TorchRec's kernels."""
        return self._stock.compute_kernels(sharding_type, compute_device_type)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return TorchRec's sharding types, and row-wise on a CPU too, where it works but is not offered.

        A subclass of the user's that says itself what it offers is taken at its word.
        """
        types = self._stock.sharding_types(compute_device_type)
        is_stock = type(self._stock).sharding_types is BaseEmbeddingSharder.sharding_types
        return [*types, ShardingType.ROW_WISE.value] if is_stock and ShardingType.ROW_WISE.value not in types else types


class RemappedEmbeddingBagCollectionSharder(_RemappedSharder[RemappedEmbeddingBagCollection]):
    """Shard pooled native tables behind rewritten ids, in any way that TorchRec shards an `EmbeddingBagCollection`.

    Args:
        stock: TorchRec's sharder, where its fused parameters or quantised collectives are wanted.
    """

    def __init__(self, stock: EmbeddingBagCollectionSharder | None = None) -> None:
        super().__init__(EmbeddingBagCollectionSharder() if stock is None else stock)

    def shard(
        self,
        module: RemappedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedRemappedEmbeddingBagCollection:
        """Return the sharded collection."""
        check_env(env, "native tables")
        frozen = hold_still(module)
        plan = self._native_plan(module, params, _device(device), module_fqn)
        check_means(module_fqn or "native tables", module.native.embedding_bag_configs(), plan)
        made = ShardedRemappedEmbeddingBagCollection(module, plan, env, _device(device), self._stock)
        freeze(made, frozen)
        made.output_type = output_type(module_fqn or "native tables", self.fused_params, plan)
        return made

    @property
    def module_type(self) -> type[RemappedEmbeddingBagCollection]:
        """The module that is sharded."""
        return RemappedEmbeddingBagCollection


class RemappedEmbeddingCollectionSharder(_RemappedSharder[RemappedEmbeddingCollection]):
    """Shard unpooled native tables behind rewritten ids, in any way that TorchRec shards an `EmbeddingCollection`.

    Args:
        stock: TorchRec's sharder, where its fused parameters or quantised collectives are wanted.
    """

    def __init__(self, stock: EmbeddingCollectionSharder | None = None) -> None:
        super().__init__(EmbeddingCollectionSharder() if stock is None else stock)

    def shard(
        self,
        module: RemappedEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedRemappedEmbeddingCollection:
        """Return the sharded collection."""
        check_env(env, "native tables")
        frozen = hold_still(module)
        plan = self._native_plan(module, params, _device(device), module_fqn)
        made = ShardedRemappedEmbeddingCollection(module, plan, env, _device(device), self._stock)
        freeze(made, frozen)
        made.output_type = output_type(module_fqn or "native tables", self.fused_params, plan)
        return made

    @property
    def module_type(self) -> type[RemappedEmbeddingCollection]:
        """The module that is sharded."""
        return RemappedEmbeddingCollection


class RemappedEmbeddingBagRowsSharder(RemappedEmbeddingCollectionSharder):
    """Shard unpooled native tables of pooled collections: rows travel, but the settings are those of the user's bags.

    Args:
        bags: the sharder of the user's `EmbeddingBagCollection`, whose fused parameters and codecs are taken.
    """

    def __init__(self, bags: BaseEmbeddingSharder[EmbeddingBagCollection] | None = None) -> None:
        super().__init__(rows_of_bags(bags))

    def shard(
        self,
        module: RemappedEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedRemappedEmbeddingCollection:
        """Return the sharded collection."""
        tell_of_missing_codec(self.qcomm_codecs_registry, params)
        return super().shard(module, params, env, device, module_fqn)

    @property
    def module_type(self) -> type[RemappedEmbeddingBagRows]:
        """The module that is sharded."""
        return RemappedEmbeddingBagRows


class DecoderSharder(BaseEmbeddingSharder[Decoder]):
    """Show the replicated decoder to the planner; DistributedModelParallel's own DistributedDataParallel trains it.

    Args:
        ignored: fused parameters of the native tables, which a decoder's do not take: the log says so.
        outputs: what they say of the embeddings that are decoded.
    """

    def __init__(self, ignored: Mapping[str, Any] | None = None, outputs: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._ignored, self._outputs = dict(ignored or {}), outputs

    @property
    def fused_params(self) -> dict[str, Any] | None:
        """What the planner reads: parameters of the embeddings that are decoded."""
        return self._outputs

    def shard(
        self,
        module: Decoder,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Decoder:
        """Return the decoder itself, with optimizers for the backward pass taken off its parameters."""
        check_env(env, "decoder")
        where = module_fqn or "decoder"
        check_names(where, params, module.replicated_tensors(), optional=True)
        wrong = {name: how.sharding_type for name, how in params.items() if how.sharding_type != _DATA_PARALLEL}
        if wrong:
            raise ValueError(
                f"{where}: a decoder is replicated, so that its entries must be data_parallel, got {wrong}"
            )
        strip_in_backward_optimizers(module)
        banks = {name.partition(".")[0] for name, _ in module.banks.named_parameters()}
        trained = sorted(table for table, bank in module.blueprint.banks.items() if bank in banks)
        if self._ignored and trained:
            logger.warning(
                "tables %s: fused_params %s are for native tables; the dense optimizer trains codebooks and the like",
                trained,
                sorted(self._ignored),
            )
        return module

    def shardable_parameters(self, module: Decoder) -> dict[str, nn.Parameter]:
        """Return codebooks, hot rows and the like by "table.tensor"."""
        return module.replicated_tensors()  # type: ignore[return-value]

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return data-parallel alone."""
        return [_DATA_PARALLEL]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the name that the planner's tables of bandwidths know."""
        return [EmbeddingComputeKernel.DENSE.value]

    @property
    def module_type(self) -> type[Decoder]:
        """The module that is replicated."""
        return Decoder
