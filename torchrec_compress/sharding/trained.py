"""Sharded trained rows: ids travel to the owner of their row, rows come back, and gradients go to the owner.

The owner sums the gradients of an id up and takes one step. Bags are summed where their rows lie: of each bag `width`
floats travel back from every rank that holds rows of it, and are added up where the batch is. With weights, whose
gradients want the rows, and unpooled, it is one row per look-up. Gradients that are not finite are found in the
backward of the owner, where no rank can tell the others; so it writes nothing, and all ranks raise with the next batch,
when they agree on its ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from torchrec_compress.modules.row_optimizer import RowOptimizer
from torchrec_compress.modules.trained import Bags, TrainedCollection, in_batch_order
from torchrec_compress.modules.trained_rows import TrainedRows, TrainedTable
from torchrec_compress.ops import pool_rows
from torchrec_compress.seams import RowTable, rescaled, shard_bounds, sharded_tensor
from torchrec_compress.sharding.agree import hears_of_errors
from torchrec_compress.sharding.bag_parts import marked, opened
from torchrec_compress.sharding.loads import failed
from torchrec_compress.sharding.rows import RowContext, ShardedRowCollection


class FusedRowOptimizer(FusedOptimizer):
    """What trains rows in their backward, as TorchRec shows its fused optimizers: rates are set, states are saved here.

    Args:
        rows: by the name of the table's tensor.
        state: (rows of this rank, bytes) of every table as part of a `ShardedTensor`, by the same name.
        groups: the settings of every table, read at each step.
    """

    def __init__(
        self, rows: Mapping[str, TrainedRows], state: Mapping[str, ShardedTensor], groups: Mapping[str, dict[str, Any]]
    ) -> None:
        self._rows = dict(rows)
        weights = {name: table.rows for name, table in rows.items()}
        kept = {weights[name]: {"state": state[name], "step": table.num_steps} for name, table in rows.items()}
        for name, group in groups.items():
            group["params"] = [weights[name]]
        super().__init__(weights, kept, list(groups.values()))

    def step(self, closure: Any = None) -> None:
        """Do nothing: rows step in their backward, at the rate of that moment."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Do nothing: rows have no gradient."""

    def post_load_state_dict(self) -> None:
        """Raise ValueError where the state that was loaded is not one that the table's optimizer keeps.

        So does the next batch, on all ranks.

        TorchRec calls it after a load, in which it gives tensors the size of what is loaded.
        """
        for table in self._rows.values():
            try:
                table.check_state()
            except ValueError as error:
                table.load_fault = failed(str(error))
                raise
            table.load_fault = None


class ShardedTrainedCollection(ShardedRowCollection[TrainedTable], FusedOptimizerModule):
    """`TrainedCollection` over many ranks: row-wise or table-wise, table by table.

    Args:
        module: the unsharded collection; values off the meta device are copied.
        plan: the planner's choice by table name.
        env: ranks and process group.
        device: of the shards.
        optimizers: what trains each table, with settings of its own.
        codecs: of what travels back.

    Raises:
        ValueError: the plan is neither row-wise nor table-wise, or cuts rows unevenly.
    """

    def __init__(
        self,
        module: TrainedCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        optimizers: Mapping[str, RowOptimizer],
        codecs: dict[str, QuantizedCommCodecs] | None,
    ) -> None:
        super().__init__(module, plan, env, device)
        self._pooled, self._is_weighted = module.pooled, module.is_weighted
        self._sums_here = module.pooled and not module.is_weighted
        self.banks: Any = nn.ModuleDict()
        asked = []
        for name, table in self._configs.items():
            self.banks[name] = self._shard_of(module, table)
            self.banks[name].train_by(optimizers[name])
            asked.append(self._exchanged(table))
        self._open_exchanges(asked, codecs)
        self._trains = {name: module.banks[name].handle.requires_grad for name in self._configs}
        self._lookups: list[nn.Module] = []  # TorchRec's walks over the kernels stop at this name
        self._optim = self._show_optimizer(optimizers)

    def _shard_of(self, module: TrainedCollection, table: TrainedTable) -> TrainedRows:
        first, last = shard_bounds(table.name, table.num_embeddings, self._plan[table.name], self._env)
        parts = replace(table, is_mean=False)  # of bags, which are sums; means are made where the batch is
        shard, whole = TrainedRows(parts, first, last - first, self._device), module.banks[table.name]
        shard.defers_faults = hears_of_errors(self._env, self._device)
        if not whole.rows.is_meta:
            whole.check_intact()
            shard.rows.copy_(whole.rows[first:last])
            shard.note()
        return shard

    def _exchanged(self, table: TrainedTable) -> RowTable:
        """Return the table as the exchange sees it: with marked ids it has two rows for each of its own."""
        width, sharding, num_rows = table.part.width, self._plan[table.name], table.num_embeddings
        if self._sums_here:
            if sharding.sharding_type == ShardingType.ROW_WISE.value:
                num_rows = self._block(table) * self._env.world_size  # so that its blocks are twice those of the table
            num_rows *= 2
        return RowTable(table.name, num_rows, width, torch.empty(num_rows, width, device="meta"), sharding)

    def _block(self, table: TrainedTable) -> int:
        """Return the rows of a rank, row-wise."""
        return -(-table.num_embeddings // self._env.world_size)

    def _show_optimizer(self, optimizers: Mapping[str, RowOptimizer]) -> FusedRowOptimizer:
        rows = {f"banks.{name}.rows": self.banks[name] for name in self._configs}
        state = {
            f"banks.{name}.rows": sharded_tensor(*self._shared(table, self.banks[name].state), self._env)
            for name, table in self._configs.items()
        }
        groups = {f"banks.{name}.rows": dict(optimizers[name].group) for name in self._configs}
        for name in self._configs:  # the settings that a user changes are those that are read
            self.banks[name].train_by(
                RowOptimizer(optimizers[name].kind, optimizers[name].given, groups[f"banks.{name}.rows"])
            )
        return FusedRowOptimizer(rows, state, groups)

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Do nothing: TorchRec calls it when it has quantised its kernels, and these are ours."""

    @property
    def fused_optimizer(self) -> FusedRowOptimizer:
        """What trains the rows of this rank."""
        return self._optim

    def trains(self, table: str) -> bool:
        """Return whether the rows of a table are trained: whether they were before they were sharded."""
        return self._trains[table]

    def asked(self, ctx: RowContext, table: TrainedTable, ids: Tensor) -> Tensor:
        """Return the ids, marked where owners sum them, or raise what was wrong with the last batch's gradients."""
        self.banks[table.name].raise_fault()
        self.banks[table.name].check_intact()
        if not self._sums_here:
            return ids
        offsets = self._batch_of(ctx, table).offsets
        assert offsets is not None
        if self._plan[table.name].sharding_type == ShardingType.ROW_WISE.value:
            owners = ids.long() // self._block(table)
            asked, parts = marked(ids, offsets, owners, self._env.world_size)
        else:
            (owner,) = self._plan[table.name].ranks or []
            asked, parts = marked(ids, offsets, torch.zeros_like(ids, dtype=torch.int64), 1)
            parts = parts._replace(owners=torch.full_like(parts.owners, owner))
        ctx.parts[table.name] = parts
        return asked

    def _batch_of(self, ctx: RowContext, table: TrainedTable) -> Bags:
        return Bags.of([ctx.jagged[name] for name in table.features], self._pooled, self._is_weighted)

    def rows_here(self, table: TrainedTable, asked: Tensor) -> Tensor:
        """Return rows of this rank, or of the parts of bags; one that has none counts the step as others.

        Steps number the dither, which must not depend on who holds what.
        """
        rows = self.banks[table.name]
        trains = self.training and torch.is_grad_enabled() and self.trains(table.name)
        look_up = rows.look_up_to_train if trains else rows.look_up
        ids, offsets = opened(asked) if self._sums_here else (asked, None)
        return look_up(ids, offsets, None, table.where)

    def outputs(self, ctx: RowContext, found: list[tuple[TrainedTable, Tensor]]) -> dict[str, Tensor]:
        """Return bags, (B, width) float32, or rows, (L, width), by look-up key."""
        bags: dict[str, Tensor] = {}
        for table, rows in found:
            bags |= self._bags(ctx, table, rows)
        if not self._pooled:
            return bags
        assert ctx.features is not None
        keys = [key for table, _ in found for key in table.keys]
        names = [name for table, _ in found for name in table.features]
        return in_batch_order(bags, keys, names, ctx.features)

    def _bags(self, ctx: RowContext, table: TrainedTable, rows: Tensor) -> dict[str, Tensor]:
        """Return the bags of one table's look-ups by key, from (L, width) rows of all its features or their parts."""
        batch, parts = self._batch_of(ctx, table), ctx.parts.get(table.name)
        bags = rows
        if batch.offsets is not None:
            bags = pool_rows(rows, batch.offsets if parts is None else parts.offsets, batch.weights)
            if table.is_mean:
                bags = bags / batch.offsets.diff().clamp(min=1).unsqueeze(1)
        return dict(zip(table.keys, bags.split(batch.counts), strict=True))

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of buffers that differ over the ranks, which no wrapper may synchronise."""
        for name, _ in self.banks.named_buffers():
            yield append_prefix(prefix, f"banks.{name}")

    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of every table's rows."""
        for name, table in self._configs.items():
            yield f"banks.{name}.rows", *self._shared(table, self.banks[name].rows)

    def _shared(self, table: TrainedTable, local: Tensor) -> tuple[Tensor, int, ParameterSharding]:
        """Return this rank's part of a tensor, the rows of the whole and its sharding, which is that of the table."""
        return local, table.num_embeddings, rescaled(self._plan[table.name], 1, 1, local.shape[1])
