"""Sharded native tables whose ids are rewritten on the way to their owner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_compress.modules.features import check_ranges, split_features
from torchrec_compress.modules.outputs import OutputType
from torchrec_compress.modules.partial_rows import some_rows, with_row
from torchrec_compress.modules.remapped import (
    FoundRows,
    RemappedEmbeddingBagCollection,
    RemappedEmbeddingCollection,
    remap_features,
    remapped_ids,
    rows_in_place,
)
from torchrec_compress.modules.shared import SeededInit
from torchrec_compress.ops import TableRows
from torchrec_compress.seams import EmbeddingCollectionContext, KJTList, KJTListSplitsAwaitable, local_shards
from torchrec_compress.sharding.agree import run_together
from torchrec_compress.sharding.loads import NotesLoads

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value


class ShardedRemappedEmbeddingBagCollection(NotesLoads, ShardedEmbeddingModule[Any, Any, KeyedTensor, Any]):
    """`RemappedEmbeddingBagCollection` over many ranks: TorchRec's own sharded collection behind rewritten ids.

    Ids are rewritten inside `input_dist`, so that the train pipelines can run ahead with it.

    Args:
        module: the unsharded collection; values off the meta device are copied.
        plan: the planner's choice by physical table name.
        env: ranks and process group.
        device: of the shards.
        sharder: TorchRec's own, with the fused parameters.

    Attributes:
        output_type: what is said of the dtype that embeddings shall have.
    """

    output_type: OutputType = OutputType()

    def __init__(
        self,
        module: RemappedEmbeddingBagCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        sharder: EmbeddingBagCollectionSharder,
    ) -> None:
        super().__init__()
        self._remaps, self._env, self._device = module.remaps, env, device
        self._also_checked, self.places = module.also_checked, module.places
        self.native: Any = sharder.shard(module.native, plan, env, device)
        copy_values(module.native, self.native)
        self._lookups = self.native._lookups  # TorchRec's walks over the kernels stop at this name

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Point the state dict at the kernels' weights anew; TorchRec calls it when it has quantised them."""
        self.native._initialize_torch_state(skip_registering=skip_registering)

    def create_context(self) -> Any:
        """Return TorchRec's context for one batch."""
        return self.native.create_context()

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:  # type: ignore[override]
        """Rewrite the ids and send them to the owners of their rows."""

        def rewritten() -> KeyedJaggedTensor:
            self.check_loaded()
            self.places.make_ready()
            check_ranges(split_features(features), self._also_checked)
            return remap_features(features, self._remaps, self.places.tensors())

        return self.native.input_dist(ctx, run_together(rewritten, self._env, self._device))

    def compute(self, ctx: Any, dist_input: Any) -> Any:
        """Look up and pool."""
        return self.native.compute(ctx, dist_input)

    def output_dist(self, ctx: Any, output: Any) -> LazyAwaitable[KeyedTensor]:
        """Send the pooled embeddings back."""
        return self.native.output_dist(ctx, output)

    def compute_and_output_dist(self, ctx: Any, input: Any) -> LazyAwaitable[KeyedTensor]:
        """Do both, overlapped as TorchRec does."""
        return self.native.compute_and_output_dist(ctx, input)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of the parameters that differ over the ranks."""
        yield from self.native.sharded_parameter_names(append_prefix(prefix, "native"))

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return RemappedEmbeddingBagCollection


class RowContext(EmbeddingCollectionContext):
    """What the way back needs to know of one batch.

    Attributes:
        replicated: by look-up key, (L,) rows of the tables that every rank holds.
        partial: the same of tables that are sharded and have no row for some ids, which were not sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replicated: dict[str, Tensor] = {}
        self.partial: dict[str, Tensor] = {}

    def record_stream(self, stream: Any) -> None:
        """Keep the tensors alive until the stream is done with them."""
        super().record_stream(stream)
        for rows in [*self.replicated.values(), *self.partial.values()]:
            rows.record_stream(stream)


class RowsAwaitable(LazyAwaitable[dict[str, FoundRows]]):
    """Rows of sharded tables on their way back, beside rows of replicated ones."""

    def __init__(
        self,
        sharded: Awaitable[dict[str, FoundRows]] | None,
        replicated: dict[str, FoundRows],
        partial: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self._sharded, self._replicated, self._partial = sharded, replicated, partial

    def _wait_impl(self) -> dict[str, FoundRows]:
        if self._sharded is None:
            return self._replicated
        return {**rows_in_place(self._sharded.wait(), self._partial, list(self._partial)), **self._replicated}


class _Weights(nn.Module):
    """The weight of a replicated table, where the state dict wants it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # fresh: a replicated table must not step in the backward, before its gradient is reduced
        self.weight = nn.Parameter(weight)


class ShardedRemappedEmbeddingCollection(
    NotesLoads, ShardedEmbeddingModule[Any, Any, dict[str, FoundRows], RowContext]
):
    """`RemappedEmbeddingCollection` over many ranks.

    Only flat lists of rewritten ids travel, not bags. Data-parallel tables are kept as plain parameters, which the
    model's DistributedDataParallel reduces: TorchRec's own data-parallel kernel sums the rows of a bag on a CPU.

    Args:
        module: the unsharded collection; values off the meta device are copied.
        plan: the planner's choice by physical table name.
        env: ranks and process group.
        device: of the shards.
        sharder: TorchRec's own, with the fused parameters.

    Attributes:
        output_type: what is said of the dtype that embeddings shall have.
    """

    output_type: OutputType = OutputType()

    def __init__(
        self,
        module: RemappedEmbeddingCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        sharder: EmbeddingCollectionSharder,
    ) -> None:
        super().__init__()
        self._remaps, self._env, self._device, self._kind = module.remaps, env, device, type(module)
        self._also_checked, self.places = module.also_checked, module.places
        self._partial = {entry.key for entry in module.remaps if entry.remap.is_partial}
        configs = module.native.embedding_configs()
        sharded = [config for config in configs if plan[config.name].sharding_type != _DATA_PARALLEL]
        self._table_of = {key: config.name for config in configs for key in config.feature_names}
        self._sharded_keys = [key for config in sharded for key in config.feature_names]
        self._is_sharded = bool(sharded)
        if sharded:
            subset = EmbeddingCollection(tables=sharded, device=torch.device("meta"))
            for config in sharded:
                subset.embeddings[config.name] = module.native.embeddings[config.name]
            self.native: Any = sharder.shard(
                subset, {config.name: plan[config.name] for config in sharded}, env, device
            )
            copy_values(subset, self.native)
            self._lookups = self.native._lookups  # TorchRec's walks over the kernels stop at this name
        else:
            self.native = nn.Module()
            self.native.embeddings = nn.ModuleDict()
        self._sharded_names = list(self.native.sharded_parameter_names("native")) if sharded else []
        for config in configs:
            if config not in sharded:
                self.native.embeddings[config.name] = _Weights(_materialised(module, config.name, device))

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Point the state dict at the kernels' weights anew; TorchRec calls it when it has quantised them."""
        if self._is_sharded:
            self.native._initialize_torch_state(skip_registering=skip_registering)

    def create_context(self) -> RowContext:
        """Return an empty context for one batch."""
        return RowContext()

    def input_dist(self, ctx: RowContext, features: KeyedJaggedTensor) -> Any:  # type: ignore[override]
        """Rewrite the ids and send those of sharded tables to the owners of their rows."""

        def rewritten() -> dict[str, Tensor]:
            self.check_loaded()
            self.places.make_ready()
            check_ranges(split_features(features), self._also_checked)
            return remapped_ids(features, self._remaps, self.places.tensors())

        rows = run_together(rewritten, self._env, self._device)
        sharded = set(self._sharded_keys)
        ctx.replicated = {key: ids for key, ids in rows.items() if key not in sharded}
        if not self._is_sharded:
            return KJTListSplitsAwaitable([], ctx)
        ctx.partial = {key: rows[key] for key in self._sharded_keys if key in self._partial}
        parts = [rows[key] if key not in ctx.partial else with_row(rows[key]) for key in self._sharded_keys]
        counts = [len(part) for part in parts]
        flat = KeyedJaggedTensor(
            keys=self._sharded_keys,
            values=torch.cat(parts),
            lengths=torch.tensor(counts, dtype=parts[0].dtype, device=self._device),
            stride=1,
            length_per_key=counts,
        )
        return self.native.input_dist(ctx, flat)

    def compute(self, ctx: RowContext, dist_input: KJTList) -> list[Tensor]:
        """Look the received ids up in the sharded tables."""
        return self.native.compute(ctx, dist_input) if self._is_sharded else []

    def output_dist(self, ctx: RowContext, output: list[Tensor]) -> LazyAwaitable[dict[str, FoundRows]]:
        """Send the rows back: (L, width) by look-up key."""
        sharded = self.native.output_dist(ctx, output) if self._is_sharded else None
        replicated: dict[str, FoundRows] = {}
        for key, ids in ctx.replicated.items():
            look_up = some_rows if key in self._partial else TableRows
            replicated[key] = look_up(self.native.embeddings[self._table_of[key]].weight, ids)
        return RowsAwaitable(sharded, replicated, ctx.partial)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of the parameters that differ over the ranks."""
        for name in self._sharded_names:
            yield append_prefix(prefix, name)

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return self._kind


@torch.no_grad()
def _materialised(module: RemappedEmbeddingCollection, name: str, device: torch.device) -> Tensor:
    """Return the values of a table that every rank will hold."""
    weight = module.native.embeddings[name].weight
    if not weight.is_meta:
        return weight.detach().to(device, copy=True)
    config = next(config for config in module.native.embedding_configs() if config.name == name)
    values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    assert config.init_fn is not None  # set by TorchRec's own config where the user gave none
    config.init_fn(values)  # DistributedDataParallel starts every rank from the first one's values
    return values


@torch.no_grad()
def copy_values(module: EmbeddingBagCollection | EmbeddingCollection, sharded: nn.Module) -> None:
    """Copy real values into a sharded collection; TorchRec itself does so on a GPU only, and else draws new ones.

    From the meta device TorchRec's draws stand, but for what starts from a seed under every plan.
    """
    values = module.state_dict()
    if not any(tensor.is_meta for tensor in values.values()):
        sharded.load_state_dict(values)
        return
    pooled = isinstance(module, EmbeddingBagCollection)
    configs = module.embedding_bag_configs() if pooled else module.embedding_configs()
    seeded = {config.name: config.init_fn for config in configs if isinstance(config.init_fn, SeededInit)}
    for name, value in sharded.state_dict().items() if seeded else ():
        start = seeded.get(name.split(".")[-2])
        if start is not None:
            for shard, offsets in local_shards(value):
                start.fill(shard, *(offsets or (0, 0)))
