"""Rows of ours behind TorchRec's exchange of sequences: ids travel to the owner of their row, and rows come back.

Only flat lists of ids travel, not bags; so uneven batches, weights and variable batch sizes never get into it. How a
rank looks its rows up, whether it sums those of a bag, and what is made of them where the batch is, is the part's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

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
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.modules.features import IdRange, LookedUpTable, check_ranges, split_features
from torchrec_compress.seams import (
    EmbeddingCollectionContext,
    KJTList,
    KJTListSplitsAwaitable,
    RowTable,
    SequenceShardingContext,
    row_exchange,
    sequence_context,
    shape_and_dtype,
    shard_bounds,
    sharded_tensor,
)
from torchrec_compress.sharding.agree import run_together
from torchrec_compress.sharding.bag_parts import BagParts, num_parts, places_of_arrival

SHARDING_TYPES = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)
Table = TypeVar("Table", bound=LookedUpTable)
TableOut = TypeVar("TableOut", bound=LookedUpTable, covariant=True)


class WholeTables(Protocol[TableOut]):
    """An unsharded collection of tables."""

    also_checked: Sequence[IdRange]

    def configs(self) -> tuple[TableOut, ...]:
        """Return the configs of the tables."""
        ...


class RowContext(EmbeddingCollectionContext):
    """What the way back needs to know of one batch.

    Attributes:
        features: the batch.
        jagged: its features.
        parts: of bags, by the tables whose owners sum them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: KeyedJaggedTensor | None = None
        self.jagged: dict[str, JaggedTensor] = {}
        self.parts: dict[str, BagParts] = {}

    def record_stream(self, stream: Any) -> None:
        """Keep the tensors alive until the stream is done with them."""
        super().record_stream(stream)
        if self.features is not None:
            self.features.record_stream(stream)
        for parts in self.parts.values():
            for tensor in parts:
                tensor.record_stream(stream)

    def num_rows(self, table: LookedUpTable) -> int:
        """Return how many rows come back of a table."""
        parts = self.parts.get(table.name)
        return sum(self.num_ids(table)) if parts is None else len(parts.owners)

    def num_ids(self, table: LookedUpTable) -> list[int]:
        """Return how many ids of each of its features a table is asked for."""
        return [len(self.jagged[name].values()) for name in table.features]


class RowsAwaitable(LazyAwaitable[dict[str, Tensor]], Generic[Table]):
    """The rows of a batch, on their way back.

    Args:
        rows: by exchange.
        tables: of each exchange.
        context: of the batch.
        outputs: makes look-ups by key of the rows of every table.
    """

    def __init__(
        self,
        rows: list[Awaitable[Tensor]],
        tables: list[list[Table]],
        context: RowContext,
        outputs: Callable[[RowContext, list[tuple[Table, Tensor]]], dict[str, Tensor]],
    ) -> None:
        super().__init__()
        self._rows, self._tables, self._context, self._outputs = rows, tables, context, outputs

    def _wait_impl(self) -> dict[str, Tensor]:
        found: list[tuple[Table, Tensor]] = []
        for awaitable, tables in zip(self._rows, self._tables, strict=True):
            counts = [self._context.num_rows(table) for table in tables]
            found += zip(tables, awaitable.wait().split(counts), strict=True)
        return self._outputs(self._context, found)


class ShardedRowCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], dict[str, Tensor], RowContext], Generic[Table]
):
    """Tables over many ranks, row-wise or table-wise, table by table.

    Args:
        module: the unsharded collection.
        plan: the planner's choice by table name.
        env: ranks and process group.
        device: of the shards.

    Raises:
        ValueError: the plan is neither row-wise nor table-wise.
    """

    def __init__(
        self, module: WholeTables[Table], plan: dict[str, ParameterSharding], env: ShardingEnv, device: torch.device
    ) -> None:
        super().__init__()
        self._env, self._device, self._plan = env, device, plan
        self._kind: Any = type(module)
        self._also_checked = module.also_checked
        self._configs = {table.name: table for table in module.configs()}
        for name, table in self._configs.items():
            if plan[name].sharding_type not in SHARDING_TYPES:
                raise ValueError(
                    f"{table.where}: its rows must be sharded row_wise or table_wise, got {plan[name].sharding_type}"
                )
        self._has_uninitialized_input_dist = True
        self._register_state_dict_hook(_share_state)
        self._register_load_state_dict_pre_hook(_take_state, with_module=True)

    def _open_exchanges(self, tables: list[RowTable], codecs: dict[str, QuantizedCommCodecs] | None) -> None:
        """Open an exchange for the tables of each sharding and width, as one moves rows of one width.

        Args:
            tables: as they are asked for, in the order of the configs.
            codecs: of what travels back.
        """
        groups: dict[tuple[str, int], list[RowTable]] = {}
        for table in tables:
            groups.setdefault((self._plan[table.name].sharding_type, table.num_words), []).append(table)
        self._widths = [width for _, width in groups]
        self._exchanges = [
            row_exchange(kind, mine, self._env, self._device, codecs) for (kind, _), mine in groups.items()
        ]
        self._tables = [[self._configs[name] for name in exchange.feature_names()] for exchange in self._exchanges]
        self._output_dists = [exchange.create_output_dist() for exchange in self._exchanges]
        few = all(table.num_rows < 2**31 for table in tables)
        self._id_dtype = torch.int32 if few else torch.int64

    @abstractmethod
    def asked(self, ctx: RowContext, table: Table, ids: Tensor) -> Tensor:
        """Return what travels for the ids of a table, (L,) integer: the rows of the exchange's table.

        Raises:
            ValueError: the table's integers are not as they must be.
        """

    @abstractmethod
    def rows_here(self, table: Table, asked: Tensor) -> Tensor:
        """Return the rows that this rank is asked for, (L, width), counted from its first; none where it has none.

        Where `asked` made parts of bags, it is a row a part.
        """

    @abstractmethod
    def outputs(self, ctx: RowContext, found: list[tuple[Table, Tensor]]) -> dict[str, Tensor]:
        """Return the look-ups of a batch by key, from (L, width) rows of every table, feature by feature, or of parts."""

    @abstractmethod
    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of shared buffers."""

    def create_context(self) -> RowContext:
        """Return an empty context for one batch."""
        return RowContext()

    @torch.no_grad()
    def input_dist(  # type: ignore[override]
        self, ctx: RowContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send every id to the rank that owns its row."""
        if self._has_uninitialized_input_dist:
            self._input_dists = [exchange.create_input_dist() for exchange in self._exchanges]
            self._has_uninitialized_input_dist = False
        sent = run_together(lambda: self._asked_by(ctx, features), self._env, self._device)
        awaitables = []
        for exchange, tables, ids in zip(self._input_dists, self._tables, sent, strict=True):
            counts = [len(part) for part in ids]
            lengths = torch.tensor(counts, dtype=self._id_dtype, device=self._device)
            names = [table.name for table in tables]
            flat = KeyedJaggedTensor(names, torch.cat(ids), lengths=lengths, stride=1, length_per_key=counts)
            awaitables.append(exchange(flat))
            back = sequence_context(flat, exchange)  # which knows the order from the call
            if ctx.parts and back.unbucketize_permute_tensor is not None:
                back.unbucketize_permute_tensor = places_of_arrival(_owners(ctx, tables))
            ctx.sharding_contexts.append(back)
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _asked_by(self, ctx: RowContext, features: KeyedJaggedTensor) -> list[list[Tensor]]:
        """Return what a batch asks of every table, by exchange, or raise where ids or tables are wrong."""
        ctx.features, ctx.jagged = features, split_features(features)
        check_ranges(ctx.jagged, self._also_checked)
        found = {
            name: self.asked(ctx, table, torch.cat(table.ids(ctx.jagged))).to(self._id_dtype)
            for name, table in self._configs.items()
        }
        return [[found[table.name] for table in tables] for tables in self._tables]

    def compute(self, ctx: RowContext, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look up what was received in this rank's rows: one (ids, width) per exchange."""
        found = []
        for asked, sent, tables, width in zip(
            dist_input, ctx.sharding_contexts, self._tables, self._widths, strict=True
        ):
            self._note_rows(ctx, sent, tables, asked)
            here = [table.name for table in tables if self._holds(table.name)]
            parts = dict(zip(here, asked.values().split(asked.length_per_key()), strict=True))
            none = torch.empty(0, dtype=self._id_dtype, device=self._device)
            rows = [self.rows_here(table, parts.get(table.name, none)) for table in tables]
            # of a rank that holds nothing too, gradients must pass the exchange
            nothing = torch.empty(0, width, device=self._device, requires_grad=torch.is_grad_enabled())
            found.append(torch.cat([nothing, *rows]))
        return found

    def _note_rows(
        self, ctx: RowContext, sent: SequenceShardingContext, tables: list[Table], asked: KeyedJaggedTensor
    ) -> None:
        """Note how many rows each rank is sent back of every table here, and, where they are parts, sends back."""
        lengths = asked.lengths().view(-1, max(asked.stride(), 1))
        if ctx.parts:
            lengths = num_parts(asked.values(), lengths.flatten()).view_as(lengths)
            sent.output_splits = lengths.sum(0).tolist()
            sent.input_splits = _owners(ctx, tables).bincount(minlength=self._env.world_size).tolist()
        sent.lengths_after_input_dist = lengths

    def _holds(self, name: str) -> bool:
        return self._env.rank in (self._plan[name].ranks or [])

    def output_dist(self, ctx: RowContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Tensor]]:
        """Send the rows back to the ranks that asked, and make look-ups of them there."""
        rows = [
            exchange(found, sent)
            for exchange, found, sent in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]
        return RowsAwaitable(rows, self._tables, ctx, self.outputs)

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return self._kind


def _owners(ctx: RowContext, tables: Sequence[LookedUpTable]) -> Tensor:
    """Return the ranks that hold the parts of bags of the tables of one exchange, (parts,) int64."""
    return torch.cat([ctx.parts[table.name].owners for table in tables])


def _share_state(module: ShardedRowCollection, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put shared buffers into the state dict under their unsharded names, as `ShardedTensor`."""
    for name, local, num_rows, sharding in module.shared_state():
        state[prefix + name] = sharded_tensor(local, num_rows, sharding, module._env)


def _take_state(module: ShardedRowCollection, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Cut this rank's rows out of a whole buffer or a `ShardedTensor` of the same plan."""
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
