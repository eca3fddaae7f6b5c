"""Sharded trained rows: ids travel to the owner of their row, rows come back, and gradients go to the owner.

The owner sums the gradients of an id up and takes one step. Rows travel one per look-up, `width` floats each, and are
pooled where the batch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.distributed.utils import append_prefix
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.modules.features import check_ranges, split_features
from torchrec_compress.modules.row_optimizer import RowOptimizer
from torchrec_compress.modules.trained import Bags, TrainedCollection, in_batch_order
from torchrec_compress.modules.trained_rows import TrainedRows, TrainedTable
from torchrec_compress.ops import pool_rows
from torchrec_compress.seams import (
    EmbeddingCollectionContext,
    KJTList,
    KJTListSplitsAwaitable,
    RowTable,
    rescaled,
    row_exchange,
    sequence_context,
    shape_and_dtype,
    shard_bounds,
    sharded_tensor,
)
from torchrec_compress.sharding.agree import run_together

SHARDING_TYPES = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)


class TrainedContext(EmbeddingCollectionContext):
    """What the way back needs to know of one batch.

    Attributes:
        features: the batch.
        jagged: its features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: KeyedJaggedTensor | None = None
        self.jagged: dict[str, JaggedTensor] = {}

    def record_stream(self, stream: Any) -> None:
        """Keep the tensors alive until the stream is done with them."""
        super().record_stream(stream)
        if self.features is not None:
            self.features.record_stream(stream)


class BagsAwaitable(LazyAwaitable[dict[str, Tensor]]):
    """The bags of a batch, whose rows are on their way back."""

    def __init__(
        self,
        rows: list[Awaitable[Tensor]],
        tables: list[list[TrainedTable]],
        context: TrainedContext,
        pooled: bool,
        is_weighted: bool,
    ) -> None:
        super().__init__()
        self._rows, self._tables, self._context = rows, tables, context
        self._pooled, self._is_weighted = pooled, is_weighted

    def _wait_impl(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for awaitable, tables in zip(self._rows, self._tables, strict=True):
            counts = [self._num_ids(table) for table in tables]
            for table, rows in zip(tables, awaitable.wait().split(counts), strict=True):
                found |= self._bags(table, rows)
        if not self._pooled:
            return found
        assert self._context.features is not None
        every = [table for tables in self._tables for table in tables]
        keys = [key for table in every for key in table.keys]
        names = [name for table in every for name in table.features]
        return in_batch_order(found, keys, names, self._context.features)

    def _num_ids(self, table: TrainedTable) -> int:
        return sum(len(self._context.jagged[name].values()) for name in table.features)

    def _bags(self, table: TrainedTable, rows: Tensor) -> dict[str, Tensor]:
        """Return the bags of one table's look-ups by key, from (L, width) rows of all its features."""
        batch = Bags.of([self._context.jagged[name] for name in table.features], self._pooled, self._is_weighted)
        bags = rows
        if batch.offsets is not None:
            bags = pool_rows(rows, batch.offsets, batch.weights)
            if table.is_mean:
                bags = bags / batch.offsets.diff().clamp(min=1).unsqueeze(1)
        return dict(zip(table.keys, bags.split(batch.counts), strict=True))


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

        TorchRec calls it after a load, in which it gives tensors the size of what is loaded.
        """
        for table in self._rows.values():
            table.check_state()


class ShardedTrainedCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], dict[str, Tensor], TrainedContext], FusedOptimizerModule
):
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
        super().__init__()
        self._env, self._device, self._plan = env, device, plan
        self._pooled, self._is_weighted, self._kind = module.pooled, module.is_weighted, type(module)
        self._also_checked = module.also_checked
        self._configs = {table.name: table for table in module.configs()}
        self.banks: Any = nn.ModuleDict()
        groups: dict[tuple[str, int], list[RowTable]] = {}  # one exchange moves rows of one width
        for name, table in self._configs.items():
            self.banks[name] = self._shard_of(module, table)
            self.banks[name].train_by(optimizers[name])
            width = table.part.width
            whole = torch.empty(table.num_embeddings, width, device="meta")
            row_table = RowTable(name, table.num_embeddings, width, whole, plan[name])
            groups.setdefault((plan[name].sharding_type, width), []).append(row_table)
        self._trains = {name: module.banks[name].handle.requires_grad for name in self._configs}
        self._widths = [width for _, width in groups]
        self._exchanges = [row_exchange(kind, tables, env, device, codecs) for (kind, _), tables in groups.items()]
        self._tables = [[self._configs[name] for name in exchange.feature_names()] for exchange in self._exchanges]
        self._output_dists = [exchange.create_output_dist() for exchange in self._exchanges]
        self._lookups: list[nn.Module] = []  # TorchRec's walks over the kernels stop at this name
        self._has_uninitialized_input_dist = True
        few = all(table.num_embeddings < 2**31 for table in self._configs.values())
        self._id_dtype = torch.int32 if few else torch.int64
        self._optim = self._show_optimizer(optimizers)
        self._register_state_dict_hook(_share_rows)
        self._register_load_state_dict_pre_hook(_take_rows, with_module=True)

    def _shard_of(self, module: TrainedCollection, table: TrainedTable) -> TrainedRows:
        kind = self._plan[table.name].sharding_type
        if kind not in SHARDING_TYPES:
            raise ValueError(f"{table.where}: trained rows must be sharded row_wise or table_wise, got {kind}")
        first, last = shard_bounds(table.name, table.num_embeddings, self._plan[table.name], self._env)
        shard, whole = TrainedRows(table, first, last - first, self._device), module.banks[table.name]
        if not whole.rows.is_meta:
            whole.check_intact()
            shard.rows.copy_(whole.rows[first:last])
            shard.note()
        return shard

    def _show_optimizer(self, optimizers: Mapping[str, RowOptimizer]) -> FusedRowOptimizer:
        rows = {f"banks.{name}.rows": self.banks[name] for name in self._configs}
        state = {
            f"banks.{name}.rows": sharded_tensor(
                self.banks[name].state, table.num_embeddings, self._state_plan(name), self._env
            )
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

    def create_context(self) -> TrainedContext:
        """Return an empty context for one batch."""
        return TrainedContext()

    @torch.no_grad()
    def input_dist(  # type: ignore[override]
        self, ctx: TrainedContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send every id to the rank that owns its row."""
        if self._has_uninitialized_input_dist:
            self._input_dists = [exchange.create_input_dist() for exchange in self._exchanges]
            self._has_uninitialized_input_dist = False
        sent = run_together(lambda: self._ids(ctx, features), self._env, self._device)
        awaitables = []
        for exchange, tables, ids in zip(self._input_dists, self._tables, sent, strict=True):
            counts = [len(part) for part in ids]
            lengths = torch.tensor(counts, dtype=self._id_dtype, device=self._device)
            names = [table.name for table in tables]
            flat = KeyedJaggedTensor(names, torch.cat(ids), lengths=lengths, stride=1, length_per_key=counts)
            awaitables.append(exchange(flat))
            ctx.sharding_contexts.append(sequence_context(flat, exchange))  # which knows the order from the call
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _ids(self, ctx: TrainedContext, features: KeyedJaggedTensor) -> list[list[Tensor]]:
        """Return the ids that are asked of every table, by exchange."""
        ctx.features, ctx.jagged = features, split_features(features)
        check_ranges(ctx.jagged, self._also_checked)
        for rows in self.banks.values():
            rows.check_intact()
        return [[torch.cat(table.ids(ctx.jagged)).to(self._id_dtype) for table in tables] for tables in self._tables]

    def compute(self, ctx: TrainedContext, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look the received ids up in this rank's rows: one (ids, width) per exchange."""
        found = []
        for asked, sent, tables, width in zip(
            dist_input, ctx.sharding_contexts, self._tables, self._widths, strict=True
        ):
            sent.lengths_after_input_dist = asked.lengths().view(-1, max(asked.stride(), 1))
            here = [table for table in tables if self._env.rank in (self._plan[table.name].ranks or [])]
            parts = dict(zip([table.name for table in here], asked.values().split(asked.length_per_key()), strict=True))
            rows = [self._rows_here(table, parts.get(table.name)) for table in tables]
            # of a rank that holds nothing too, gradients must pass the exchange
            nothing = torch.empty(0, width, device=self._device, requires_grad=torch.is_grad_enabled())
            found.append(torch.cat([nothing, *rows]))
        return found

    def _rows_here(self, table: TrainedTable, ids: Tensor | None) -> Tensor:
        """Return rows of this rank, (L, width); None are asked of a rank that has none, and counts the step as others.

        Steps number the dither, which must not depend on who holds what.
        """
        rows = self.banks[table.name]
        ids = torch.empty(0, dtype=self._id_dtype, device=self._device) if ids is None else ids
        trains = self.training and torch.is_grad_enabled() and self._trains[table.name]
        look_up = rows.look_up_to_train if trains else rows.look_up
        return look_up(ids, None, None, table.where)

    def output_dist(self, ctx: TrainedContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Tensor]]:
        """Send the rows back to the ranks that asked, and pool them there."""
        rows = [
            exchange(found, sent)
            for exchange, found, sent in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]
        return BagsAwaitable(rows, self._tables, ctx, self._pooled, self._is_weighted)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of buffers that differ over the ranks, which no wrapper may synchronise."""
        for name, _ in self.banks.named_buffers():
            yield append_prefix(prefix, f"banks.{name}")

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return self._kind

    def shared_rows(self) -> Iterator[tuple[str, TrainedRows, TrainedTable, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the whole table and the sharding of every table's rows."""
        for name, table in self._configs.items():
            yield f"banks.{name}.rows", self.banks[name], table, self._plan[name]

    def _state_plan(self, name: str) -> ParameterSharding:
        return as_wide(self._plan[name], self.banks[name].state.shape[1])


def as_wide(sharding: ParameterSharding, width: int) -> ParameterSharding:
    """Return the sharding of another tensor of as many rows, of this width."""
    return rescaled(sharding, 1, 1, width)


def _share_rows(module: ShardedTrainedCollection, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put rows into the state dict under their unsharded names, as `ShardedTensor`."""
    for name, local, table, sharding in module.shared_rows():
        plan = as_wide(sharding, local.rows.shape[1])
        state[prefix + name] = sharded_tensor(local.rows, table.num_embeddings, plan, module._env)


def _take_rows(module: ShardedTrainedCollection, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Cut this rank's rows out of whole ones or a `ShardedTensor` of the same plan."""
    for name, local, table, sharding in module.shared_rows():
        value = state.get(prefix + name)
        if value is None:
            continue
        whole = (table.num_embeddings, local.rows.shape[1])
        shape, dtype = shape_and_dtype(value)
        if shape != whole or dtype != torch.uint8:
            raise ValueError(
                f"{prefix}{name}: must be {whole} of torch.uint8, got {shape} of {dtype}; load it into a collection "
                "with the width and bits that it was saved with"
            )
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            state[prefix + name] = shards[0].tensor if shards else local.rows.new_empty(0, whole[1])
        else:
            first, last = shard_bounds(table.name, table.num_embeddings, sharding, module._env)
            state[prefix + name] = value[first:last]
