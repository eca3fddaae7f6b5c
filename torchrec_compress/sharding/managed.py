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
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix

from torchrec_compress.managers import OwnedTable
from torchrec_compress.modules.managed import ManagedCollection, ManagedOwner, ManagedTable
from torchrec_compress.seams import RowTable, fused_rows, look_up_local, rescaled, shard_bounds, without_input_exchange
from torchrec_compress.sharding.remapped import copy_values
from torchrec_compress.sharding.rows import RowContext, ShardedRowCollection


class ShardedManagedCollection(ShardedRowCollection[ManagedTable], ManagedOwner):
    """`ManagedCollection` over many ranks: row-wise or table-wise, table by table; a block lies on one rank.

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
        super().__init__(module, plan, env, device)
        self._turns, self._told = {}, set()
        self.native: Any = nn.ModuleDict()
        self.managers = nn.ModuleDict()
        asked = []
        for name, table in self._configs.items():
            self.managers[name] = self._manager(module, table)
            self.native[name] = self._native(module, table, sharder)
            width, part = table.native.embedding_dim, table.part
            places = rescaled(plan[name], part.rows_per_block, part.blocks.ids_per_block, width)
            whole = torch.empty(part.blocks.num_places, width, device="meta")
            asked.append(RowTable(name, part.blocks.num_places, width, whole, places))
        self._open_exchanges(asked, sharder.qcomm_codecs_registry)
        # TorchRec's walks over the kernels stop at this name
        self._lookups = [lookup for native in self.native.values() for lookup in native._lookups]

    def _bounds(self, table: ManagedTable) -> tuple[int, int]:
        """Return the blocks (first, last + 1) of a table that this rank holds."""
        per_block, sharding = table.part.rows_per_block, self._plan[table.name]
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

    def asked(self, ctx: RowContext, table: ManagedTable, ids: Tensor) -> Tensor:
        """Return the places of ids."""
        self.check_integers(table.name)
        return table.part.blocks.places(ids)

    def rows_here(self, table: ManagedTable, asked: Tensor) -> Tensor:
        """Return what the ids at the received places are served."""
        native, width = self.native[table.name], table.native.embedding_dim
        if not self._holds(table.name):
            return torch.empty(0, width, device=self._device)
        return self.rows(
            table.name, asked, lambda rows: look_up_local(native, table.name, rows, width).float(), self.trains
        )

    def outputs(self, ctx: RowContext, found: list[tuple[ManagedTable, Tensor]]) -> dict[str, Tensor]:
        """Return (L, D) float32 by look-up key."""
        return {
            key: part
            for table, rows in found
            for key, part in zip(table.keys, rows.split(ctx.num_ids(table)), strict=True)
        }

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

    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of managers' buffers."""
        for name, table in self._configs.items():
            num_blocks = table.part.blocks.num_blocks
            for buffer, local in self.managers[name].named_buffers():
                whole = table.part.state()[buffer].shape
                sharding = rescaled(self._plan[name], table.part.rows_per_block, whole[0] // num_blocks, whole[1])
                yield f"managers.{name}.{buffer}", local, whole[0], sharding
