"""Sharded tables with managers: ids travel to the owner of their block, which says what their rows are now.

Ids are sent by their places in the blocks, so that the input exchange hangs on nothing that a step changes: train
pipelines may send the ids of the next batch during this one. What an id's rows are is asked behind the exchange, after
the last step has ended. Every look-up travels, not every distinct id: gradients are noted one by one, and summing them
up on a rank first would make their norms depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.managers import OwnedTable
from torchrec_compress.modules.features import check_ranges, split_features
from torchrec_compress.modules.managed import ManagedCollection, ManagedOwner, ManagedTable
from torchrec_compress.seams import (
    EmbeddingCollectionContext,
    KJTList,
    KJTListSplitsAwaitable,
    RowTable,
    fused_rows,
    look_up_local,
    rescaled,
    row_exchange,
    sequence_context,
    shape_and_dtype,
    shard_bounds,
    sharded_tensor,
    without_input_exchange,
)
from torchrec_compress.sharding.agree import run_together
from torchrec_compress.sharding.remapped import copy_values

SHARDING_TYPES = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)


class ManagedContext(EmbeddingCollectionContext):
    """What the way back needs to know of one batch.

    Attributes:
        num_ids: by table, ids of each of its features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_ids: dict[str, list[int]] = {}


class ManagedRowsAwaitable(LazyAwaitable[dict[str, Tensor]]):
    """The rows of a batch, on their way back."""

    def __init__(
        self, rows: list[Awaitable[Tensor]], tables: list[list[ManagedTable]], context: ManagedContext
    ) -> None:
        super().__init__()
        self._rows, self._tables, self._context = rows, tables, context

    def _wait_impl(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for awaitable, tables in zip(self._rows, self._tables, strict=True):
            counts = [self._context.num_ids[table.name] for table in tables]
            for table, of_table, rows in zip(
                tables, counts, awaitable.wait().split([sum(each) for each in counts]), strict=True
            ):
                found |= zip(table.keys, rows.split(of_table), strict=True)
        return found


class ShardedManagedCollection(ShardedEmbeddingModule[KJTList, list[Tensor], dict[str, Tensor], Any], ManagedOwner):
    """`ManagedCollection` over many ranks: row-wise or table-wise, table by table; a block lies on one rank.

    Only flat lists of ids travel, not bags; so uneven batches, weights and variable batch sizes never get here.

    Args:
        module: the unsharded collection; values off the meta device are copied.
        plan: the planner's choice by table name, of the native table "rows".
        env: ranks and process group.
        device: of the shards.
        sharder: TorchRec's own, with the fused parameters and codecs.

    Raises:
        ValueError: the plan is neither row-wise nor table-wise, or cuts a block.
    """

    def __init__(
        self,
        module: ManagedCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        sharder: EmbeddingCollectionSharder,
    ) -> None:
        super().__init__()
        self._turns, self._told = {}, set()
        self._env, self._device, self._plan, self._kind = env, device, plan, type(module)
        self._also_checked = module.also_checked
        self._configs = {table.name: table for table in module.configs()}
        self.native: Any = nn.ModuleDict()
        self.managers = nn.ModuleDict()
        groups: dict[tuple[str, int], list[RowTable]] = {}  # one exchange moves rows of one width
        for name, table in self._configs.items():
            self.managers[name] = self._manager(module, table)
            self.native[name] = self._native(module, table, sharder)
            width, part = table.native.embedding_dim, table.part
            places = rescaled(plan[name], part.rows_per_block, part.blocks.ids_per_block, width)
            whole = torch.empty(part.blocks.num_places, width, device="meta")
            row_table = RowTable(name, part.blocks.num_places, width, whole, places)
            groups.setdefault((plan[name].sharding_type, width), []).append(row_table)
        self._widths = [width for _, width in groups]
        self._exchanges = [
            row_exchange(kind, tables, env, device, sharder.qcomm_codecs_registry)
            for (kind, _), tables in groups.items()
        ]
        self._tables = [[self._configs[name] for name in exchange.feature_names()] for exchange in self._exchanges]
        self._output_dists = [exchange.create_output_dist() for exchange in self._exchanges]
        # TorchRec's walks over the kernels stop at this name
        self._lookups = [lookup for native in self.native.values() for lookup in native._lookups]
        self._has_uninitialized_input_dist = True
        few = all(table.part.blocks.num_places < 2**31 for table in self._configs.values())
        self._id_dtype = torch.int32 if few else torch.int64
        self._register_state_dict_hook(_share_state)
        self._register_load_state_dict_pre_hook(_take_state, with_module=True)

    def _bounds(self, table: ManagedTable) -> tuple[int, int]:
        """Return the blocks (first, last + 1) of a table that this rank holds."""
        per_block, sharding = table.part.rows_per_block, self._plan[table.name]
        if sharding.sharding_type not in SHARDING_TYPES:
            raise ValueError(
                f"table {table.name!r}: a table with a manager must be sharded row_wise or table_wise, got "
                f"{sharding.sharding_type}"
            )
        num_blocks, world = table.part.blocks.num_blocks, self._env.world_size
        if sharding.sharding_type == ShardingType.ROW_WISE.value and num_blocks % world:
            raise ValueError(
                f"table {table.name!r}: num_blocks must be a multiple of the {world} ranks that share it, got "
                f"{num_blocks}; choose another num_blocks, or shard it table_wise"
            )
        first, last = shard_bounds(table.name, table.part.rows.num_embeddings, sharding, self._env)
        return first // per_block, last // per_block

    def _manager(self, module: ManagedCollection, table: ManagedTable) -> nn.Module:
        """Return what manages the blocks of this rank, with the values that the whole table's manager has."""
        first, last = self._bounds(table)
        manager, whole = table.part.manager(last - first, self._device), module.managers[table.name]
        for name, buffer in whole.named_buffers():
            if not buffer.is_meta:
                per_block = buffer.shape[0] // table.part.blocks.num_blocks
                manager.get_buffer(name).copy_(buffer[first * per_block : last * per_block])
        return manager

    def _native(self, module: ManagedCollection, table: ManagedTable, sharder: EmbeddingCollectionSharder) -> Any:
        stock = module.native[table.name]
        sharded = sharder.shard(stock, {table.native.name: self._plan[table.name]}, self._env, self._device)
        copy_values(stock, sharded)
        return without_input_exchange(sharded)

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Point the state dict at the kernels' weights anew; TorchRec calls it when it has quantised them."""
        for native in self.native.values():
            native._initialize_torch_state(skip_registering=skip_registering)

    def create_context(self) -> ManagedContext:
        """Return an empty context for one batch."""
        return ManagedContext()

    @torch.no_grad()
    def input_dist(  # type: ignore[override]
        self, ctx: ManagedContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send the place of every id to the rank that owns its block."""
        if self._has_uninitialized_input_dist:
            self._input_dists = [exchange.create_input_dist() for exchange in self._exchanges]
            self._has_uninitialized_input_dist = False
        sent = run_together(lambda: self._places(ctx, features), self._env, self._device)
        awaitables = []
        for exchange, tables, places in zip(self._input_dists, self._tables, sent, strict=True):
            counts = [len(part) for part in places]
            lengths = torch.tensor(counts, dtype=self._id_dtype, device=self._device)
            names = [table.name for table in tables]
            flat = KeyedJaggedTensor(names, torch.cat(places), lengths=lengths, stride=1, length_per_key=counts)
            awaitables.append(exchange(flat))
            ctx.sharding_contexts.append(sequence_context(flat, exchange))  # which knows the order from the call
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _places(self, ctx: ManagedContext, features: KeyedJaggedTensor) -> list[list[Tensor]]:
        """Return the places of the ids of every table, by exchange, or raise where ids or a manager are wrong."""
        jagged = split_features(features)
        check_ranges(jagged, self._also_checked)
        found: dict[str, Tensor] = {}
        for name, table in self._configs.items():
            self.check_integers(name)
            ids = table.ids(jagged)
            ctx.num_ids[name] = [len(part) for part in ids]
            found[name] = table.part.blocks.places(torch.cat(ids)).to(self._id_dtype)
        return [[found[table.name] for table in tables] for tables in self._tables]

    def compute(self, ctx: ManagedContext, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look the received places up in this rank's rows: one (ids, width) per exchange."""
        found = []
        for asked, sent, tables, width in zip(
            dist_input, ctx.sharding_contexts, self._tables, self._widths, strict=True
        ):
            sent.lengths_after_input_dist = asked.lengths().view(-1, max(asked.stride(), 1))
            here = [table for table in tables if self._holds(table.name)]
            parts = asked.values().split(asked.length_per_key())
            rows = [self._rows_here(table, places) for table, places in zip(here, parts, strict=True)]
            # of a rank that holds nothing too, gradients must pass the exchange
            nothing = torch.empty(0, width, device=self._device, requires_grad=torch.is_grad_enabled())
            found.append(torch.cat([nothing, *rows]))
        return found

    def _rows_here(self, table: ManagedTable, places: Tensor) -> Tensor:
        native, width = self.native[table.name], table.native.embedding_dim
        return self.rows(
            table.name, places, lambda rows: look_up_local(native, table.name, rows, width).float(), self.trains
        )

    def _holds(self, name: str) -> bool:
        return self._env.rank in (self._plan[name].ranks or [])

    def output_dist(self, ctx: ManagedContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Tensor]]:
        """Send the rows back to the ranks that asked: (L, D) float32 by look-up key."""
        rows = [
            exchange(found, sent)
            for exchange, found, sent in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]
        return ManagedRowsAwaitable(rows, self._tables, ctx)

    def owned(self, name: str, optimizer: Any) -> OwnedTable | None:
        """Return the blocks of a table that this rank holds; their optimizer is the kernel's own."""
        if not self._holds(name):
            return None
        table, is_shared = self._configs[name], self._plan[name].sharding_type == ShardingType.ROW_WISE.value
        first, last = self._bounds(table)
        weight, state = fused_rows(self.native[name])
        per_block = table.part.blocks.ids_per_block
        group = self._env.process_group if is_shared else None
        return OwnedTable(first * per_block, (last - first) * per_block, {"rows": weight}, {"rows": state}, group)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of parameters and buffers that differ over the ranks, which no wrapper may synchronise."""
        for name, native in self.native.items():
            yield from native.sharded_parameter_names(append_prefix(prefix, f"native.{name}"))
        for name, _ in self.managers.named_buffers():
            yield append_prefix(prefix, f"managers.{name}")

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return self._kind

    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of managers' buffers."""
        for name, table in self._configs.items():
            num_blocks = table.part.blocks.num_blocks
            for buffer, local in self.managers[name].named_buffers():
                whole = table.part.state()[buffer].shape
                sharding = rescaled(self._plan[name], table.part.rows_per_block, whole[0] // num_blocks, whole[1])
                yield f"managers.{name}.{buffer}", local, whole[0], sharding


def _share_state(module: ShardedManagedCollection, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put managers' buffers into the state dict under their unsharded names, as `ShardedTensor`."""
    for name, local, num_rows, sharding in module.shared_state():
        state[prefix + name] = sharded_tensor(local, num_rows, sharding, module._env)


def _take_state(module: ShardedManagedCollection, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Cut this rank's blocks out of a whole buffer or a `ShardedTensor` of the same plan."""
    for name, local, num_rows, sharding in module.shared_state():
        value = state.get(prefix + name)
        if value is None:
            continue
        whole = (num_rows, local.shape[1])
        shape, dtype = shape_and_dtype(value)
        if shape != whole or dtype != local.dtype:
            raise ValueError(
                f"{prefix}{name}: must be {whole} of {local.dtype}, got {shape} of {dtype}; load it into a collection "
                "with the compression that it was saved with"
            )
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            state[prefix + name] = shards[0].tensor if shards else local.new_empty(0, whole[1])
        else:
            first, last = shard_bounds(name, num_rows, sharding, module._env)
            state[prefix + name] = value[first:last]
