"""Rows of ours, floats with gradients: ids travel to the owner of their row, and rows come back.

How a rank looks its rows up, whether it sums those of a bag, and what is made of them where the batch is, is the part's
own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.modules.features import IdRange, LookedUpTable, check_ranges, split_features
from torchrec_compress.seams import EmbeddingCollectionContext, SequenceShardingContext
from torchrec_compress.sharding.bag_parts import BagParts, num_parts, places_of_arrival
from torchrec_compress.sharding.exchange import ShardedExchange

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


class ShardedRowCollection(ShardedExchange[Table, dict[str, Tensor], RowContext], Generic[Table]):
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
        super().__init__(type(module), module.configs(), plan, env, device)  # type: ignore[arg-type]
        self._also_checked = module.also_checked
        for name, table in self._configs.items():
            if plan[name].sharding_type not in SHARDING_TYPES:
                raise ValueError(
                    f"{table.where}: its rows must be sharded row_wise or table_wise, got {plan[name].sharding_type}"
                )

    @abstractmethod
    def asked(self, ctx: RowContext, table: Table, ids: Tensor) -> Tensor:
        """Return what travels for the ids of a table, (L,) integer: the rows of the exchange's table.

        Where the context is given parts of bags, `rows_here` returns a row a part.

        Raises:
            ValueError: the table's integers are not as they must be.
        """

    @abstractmethod
    def outputs(self, ctx: RowContext, found: list[tuple[Table, Tensor]]) -> dict[str, Tensor]:
        """Return the look-ups of a batch by key, from (L, width) rows of every table, or of its parts of bags."""

    def create_context(self) -> RowContext:
        """Return an empty context for one batch."""
        return RowContext()

    def asked_by(self, ctx: RowContext, features: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        """Return what a batch asks of every table."""
        ctx.features, ctx.jagged = features, split_features(features)
        check_ranges(ctx.jagged, self._also_checked)
        return {name: self.asked(ctx, table, torch.cat(table.ids(ctx.jagged))) for name, table in self._configs.items()}

    def no_rows(self, width: int) -> Tensor:
        """Return no rows; of a rank that holds nothing too, gradients must pass the exchange."""
        return torch.empty(0, width, device=self._device, requires_grad=torch.is_grad_enabled())

    def expect_rows(self, ctx: RowContext, sent: SequenceShardingContext, tables: list[Table]) -> None:
        """Note in which order parts of bags come back."""
        if ctx.parts and sent.unbucketize_permute_tensor is not None:
            sent.unbucketize_permute_tensor = places_of_arrival(_owners(ctx, tables))

    def count_rows(
        self, ctx: RowContext, sent: SequenceShardingContext, tables: list[Table], asked: KeyedJaggedTensor
    ) -> None:
        """Note how many rows each rank is sent back of every table here, and, where they are parts, sends back."""
        super().count_rows(ctx, sent, tables, asked)
        lengths = sent.lengths_after_input_dist
        if ctx.parts and lengths is not None:
            counts = num_parts(asked.values(), lengths.flatten()).view_as(lengths)
            sent.lengths_after_input_dist = counts
            sent.output_splits = counts.sum(0).tolist()
            sent.input_splits = _owners(ctx, tables).bincount(minlength=self._env.world_size).tolist()

    def output_dist(self, ctx: RowContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Tensor]]:
        """Send the rows back to the ranks that asked, and make look-ups of them there."""
        return RowsAwaitable(self._sent_back(ctx, output), self._tables, ctx, self.outputs)


def _owners(ctx: RowContext, tables: Sequence[LookedUpTable]) -> Tensor:
    """Return the ranks that hold the parts of bags of the tables of one exchange, (parts,) int64."""
    return torch.cat([ctx.parts[table.name].owners for table in tables])
