"""What tables of ours send over many ranks: ids to the owner of their row, and what they are asked for back.

Behind it is TorchRec's own exchange of sequences. Only flat lists of ids travel, not bags; so uneven batches, weights
and variable batch sizes never get into it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.code_bank import CodeTableConfig
from torchrec_compress.modules.features import LookedUpTable
from torchrec_compress.modules.outputs import OutputType
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
from torchrec_compress.sharding.loads import NotesLoads

Table = TypeVar("Table", bound=LookedUpTable | CodeTableConfig)
Context = TypeVar("Context", bound=EmbeddingCollectionContext)
Found = TypeVar("Found")
Checked = TypeVar("Checked")


class ShardedExchange(
    NotesLoads, ShardedEmbeddingModule[KJTList, list[Tensor], Found, Context], Generic[Table, Found, Context]
):
    """Tables over many ranks, table by table.

    Args:
        kind: the unsharded collection.
        configs: of its tables.
        plan: the planner's choice by table name.
        env: ranks and process group.
        device: of the shards.

    Attributes:
        output_type: what is said of the dtype that embeddings shall have.
    """

    output_type: OutputType = OutputType()

    def __init__(
        self,
        kind: type[nn.Module],
        configs: Sequence[Table],
        plan: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._env, self._device, self._plan = env, device, plan
        self._kind: Any = kind
        self._configs = {table.name: table for table in configs}
        self._has_uninitialized_input_dist = True
        self._register_state_dict_hook(_share_state)
        self._register_load_state_dict_pre_hook(_take_state, with_module=True)

    def _open_exchanges(self, tables: list[RowTable], codecs: dict[str, QuantizedCommCodecs] | None = None) -> None:
        """Open an exchange for the tables of each sharding and width, as one moves rows of one width.

        Args:
            tables: as they are asked for, in the order of the configs.
            codecs: of what travels back.
        """
        groups: dict[tuple[str, int], list[RowTable]] = {}
        for table in tables:
            groups.setdefault((table.sharding.sharding_type, table.num_words), []).append(table)
        self._widths = [width for _, width in groups]
        self._exchanges = [
            row_exchange(kind, mine, self._env, self._device, codecs) for (kind, _), mine in groups.items()
        ]
        self._tables = [[self._configs[name] for name in exchange.feature_names()] for exchange in self._exchanges]
        self._output_dists = [exchange.create_output_dist() for exchange in self._exchanges]
        few = all(table.num_rows < 2**31 for table in tables)
        self._id_dtype = torch.int32 if few else torch.int64

    @abstractmethod
    def asked_by(self, ctx: Context, features: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        """Return what a batch asks of every table by name, (L,) integer: rows of the exchange's table.

        Raises:
            ValueError: ids or tables are not as they must be.
        """

    def agreed(self, check: Callable[[], Checked]) -> Checked:
        """Return what a check of this rank's batch returns, or raise on all ranks; see `run_together`."""
        return run_together(check, self._env, self._device)

    @abstractmethod
    def rows_here(self, table: Table, asked: Tensor) -> Tensor:
        """Return the rows that this rank is asked for, (L, width), counted from its first; none where it has none."""

    @abstractmethod
    def no_rows(self, width: int) -> Tensor:
        """Return rows of the kind of `rows_here`, (0, width)."""

    @abstractmethod
    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of shared buffers."""

    @torch.no_grad()
    def input_dist(  # type: ignore[override]
        self, ctx: Context, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send every id to the rank that owns its row."""
        if self._has_uninitialized_input_dist:
            self._input_dists = [exchange.create_input_dist() for exchange in self._exchanges]
            self._has_uninitialized_input_dist = False
        asked = self.agreed(lambda: self._asked(ctx, features))
        awaitables = []
        for exchange, tables in zip(self._input_dists, self._tables, strict=True):
            flat = self._flat(tables, asked)
            awaitables.append(exchange(flat))
            ctx.sharding_contexts.append(sequence_context(flat, exchange))  # which knows the order from the call
            self.expect_rows(ctx, ctx.sharding_contexts[-1], tables)
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _asked(self, ctx: Context, features: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        self.check_loaded()
        return self.asked_by(ctx, features)

    def _flat(self, tables: list[Table], asked: Mapping[str, Tensor]) -> KeyedJaggedTensor:
        """Return what is asked of the tables of an exchange as a batch of one bag."""
        ids = [asked[table.name].to(self._id_dtype) for table in tables]
        counts = [len(part) for part in ids]
        lengths = torch.tensor(counts, dtype=self._id_dtype, device=self._device)
        names = [table.name for table in tables]
        return KeyedJaggedTensor(names, torch.cat(ids), lengths=lengths, stride=1, length_per_key=counts)

    def expect_rows(self, ctx: Context, sent: SequenceShardingContext, tables: list[Table]) -> None:
        """Note in which order rows come back, where they are others than one of each id."""

    def count_rows(
        self, ctx: Context, sent: SequenceShardingContext, tables: list[Table], asked: KeyedJaggedTensor
    ) -> None:
        """Note how many rows each rank is sent back of every table here: one of each id."""
        sent.lengths_after_input_dist = asked.lengths().view(-1, max(asked.stride(), 1))

    def compute(self, ctx: Context, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look up what was received in this rank's rows: one (rows, width) per exchange."""
        found = []
        for asked, sent, tables, width in zip(
            dist_input, ctx.sharding_contexts, self._tables, self._widths, strict=True
        ):
            self.count_rows(ctx, sent, tables, asked)
            here = [table.name for table in tables if self._holds(table.name)]
            parts = dict(zip(here, asked.values().split(asked.length_per_key()), strict=True))
            none = torch.empty(0, dtype=self._id_dtype, device=self._device)
            rows = [self.rows_here(table, parts.get(table.name, none)) for table in tables]
            found.append(torch.cat([self.no_rows(width), *rows]))
        return found

    def _holds(self, name: str) -> bool:
        return self._env.rank in (self._plan[name].ranks or [])

    def _sent_back(self, ctx: Context, output: list[Tensor]) -> list[Awaitable[Tensor]]:
        """Send what was found back to the ranks that asked, by exchange."""
        return [
            exchange(found, sent)
            for exchange, found, sent in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]

    @abstractmethod
    def output_dist(self, ctx: Context, output: list[Tensor]) -> LazyAwaitable[Found]:
        """Send what was found back to the ranks that asked, and make look-ups of it there."""

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return self._kind


def _share_state(module: ShardedExchange, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put shared buffers into the state dict under their unsharded names, as `ShardedTensor`."""
    for name, local, num_rows, sharding in module.shared_state():
        state[prefix + name] = sharded_tensor(local, num_rows, sharding, module._env)


def _take_state(module: ShardedExchange, state: dict[str, Any], prefix: str, *_: Any) -> None:
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
