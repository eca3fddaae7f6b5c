"""Sharded code tables: ids travel to the owner of the row, codes travel back, nothing is differentiated.

A table that this rank holds whole, as every rank does one that is data-parallel, is handed on as it is: the look-up of
codes is then a part of their decoding, as without sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.code_bank import CodeBank, CodeRows, CodeTableConfig
from torchrec_compress.modules.code_tables import CodeTable, CodeTableCollection, HeldCodes, warn_of_start_codes
from torchrec_compress.modules.codes import Codes
from torchrec_compress.modules.features import check_ranges, split_features
from torchrec_compress.ops import (
    NOT_FILLED,
    NOT_SUMMED,
    can_check,
    changed,
    check_ids,
    check_intact,
    checksum,
    code_gather,
    flag_of,
    known,
    mark_of,
    total_of,
)
from torchrec_compress.seams import (
    KJTList,
    KJTListSplitsAwaitable,
    RowTable,
    row_exchange,
    sequence_context,
    shape_and_dtype,
    shard_bounds,
    sharded_tensor,
)
from torchrec_compress.sharding.agree import Recount, run_together
from torchrec_compress.sharding.code_exchange import CodeContext, CodesAwaitable, row_words

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value


class CodeShard(CodeRows):
    """The rows of one code table that this rank holds, from `first_row` on; attributes as in `CodeRows`."""

    def __init__(self, config: CodeTableConfig, codes: Tensor, is_set: Tensor, first_row: int) -> None:
        super().__init__(config.name, codes, is_set)
        self.first_row = first_row

    def checksum(self) -> int:
        """Return the checksum of these rows; those of all ranks add up to the table's."""
        return known(self.codes, lambda codes: checksum(codes, self.first_row))


class _Found(NamedTuple):
    """The checksums of this rank's codes and low-bit rows, and the table's flag."""

    codes: int
    low_bit_rows: int
    flag: int


class _Summed(NamedTuple):
    """What this rank held when all ranks last summed up, and the mark of all of it."""

    found: _Found
    mark: int


class ShardedCodeTableCollection(ShardedEmbeddingModule[KJTList, list[Tensor], dict[str, Codes], CodeContext]):
    """`CodeTableCollection` over many ranks: row-wise, table-wise or data-parallel, table by table.

    Only flat lists of ids travel, not bags; so uneven batches, weights and variable batch sizes never get here.

    Args:
        module: the unsharded collection; one on the meta device gives start codes.
        plan: the planner's choice by table name.
        env: ranks and process group.
        device: of the shards.
        deduplicate: whether each id of a batch is asked for once per table.

    Raises:
        ValueError: the plan cuts columns or cuts rows unevenly.
    """

    def __init__(
        self,
        module: CodeTableCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        deduplicate: bool = True,
    ) -> None:
        super().__init__()
        self._env, self._device, self._plan, self._deduplicate = env, device, plan, deduplicate
        self._configs = {config.name: config for config in module.configs()}
        self._also_checked = module.also_checked
        self._summed: dict[str, _Summed] = {}
        self._is_checked = self._is_fresh = False
        self._num_changes = 0
        self.banks: Any = nn.ModuleDict()
        groups: dict[tuple[str, int], list[RowTable]] = {}  # one exchange moves rows of one width
        for config in module.configs():
            bank, sharding = module.banks[config.name], plan[config.name]
            self.banks[config.name] = self._shard_of(config, bank)
            if self._is_whole(config.name):
                continue
            table = RowTable(config.name, config.num_embeddings, row_words(config), bank.codes, sharding)
            groups.setdefault((sharding.sharding_type, table.num_words), []).append(table)
        self._kinds = [kind for kind, _ in groups]
        self._words = [words for _, words in groups]
        self._exchanges = [row_exchange(kind, tables, env, device) for (kind, _), tables in groups.items()]
        self._tables = [[self._configs[name] for name in exchange.feature_names()] for exchange in self._exchanges]
        self._output_dists = [exchange.create_output_dist() for exchange in self._exchanges]
        self._has_uninitialized_input_dist = True
        self._whole = [config for config in module.configs() if self._is_whole(config.name)]
        few_rows = all(config.num_embeddings < 2**31 for config in module.configs())
        self._id_dtype = torch.int32 if few_rows else torch.int64
        self._register_state_dict_hook(_share_codes)
        self._register_load_state_dict_pre_hook(_take_codes, with_module=True)

    def _shard_of(self, config: CodeTableConfig, bank: CodeBank) -> CodeShard:
        first, last = shard_bounds(config.name, config.num_embeddings, self._plan[config.name], self._env)
        if bank.codes.is_meta:
            shape = (last - first, config.part.row_size)
            local = torch.zeros(shape, dtype=config.part.dtype, device=self._device)
            flag = torch.full((1,), NOT_FILLED, dtype=torch.int32, device=self._device)
            if config.part.start is not None:
                local.copy_(config.part.start(torch.arange(first, last, device=self._device)))
                flag.fill_(NOT_SUMMED)
            shard = CodeShard(config, local, flag, first)
            shard.start_flag = None if config.part.start is None else NOT_SUMMED
        else:
            local = bank.codes[first:last].to(self._device, copy=True)
            shard = CodeShard(config, local, bank.is_set.to(self._device, copy=True), first)
            shard.start_flag = bank.start_flag
        shard.stand_beside(*bank.decoders)
        return shard

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Do nothing: TorchRec calls it when it has quantised its kernels, and codes have none."""

    def create_context(self) -> CodeContext:
        """Return an empty context for one batch."""
        return CodeContext()

    @torch.no_grad()
    def input_dist(  # type: ignore[override]
        self, ctx: CodeContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send every id to the rank that owns its row."""
        if self._has_uninitialized_input_dist:
            self._input_dists = [exchange.create_input_dist() for exchange in self._exchanges]
            self._has_uninitialized_input_dist = False
        if not self._is_checked:
            self._is_checked = True
            warn_of_start_codes(list(self._configs.values()), self.banks)
        self._is_fresh = False
        sent = run_together(lambda: self._distinct_ids(ctx, features), self._env, self._device, self._sum_up)
        awaitables = []
        for exchange, tables, ids in zip(self._input_dists, self._tables, sent, strict=True):
            flat = self._flat([config.name for config in tables], ids)
            awaitables.append(exchange(flat))
            ctx.sharding_contexts.append(sequence_context(flat, exchange))
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _is_whole(self, name: str) -> bool:
        """Return whether this rank, and then every rank, holds all rows of a table."""
        return self._env.world_size == 1 or self._plan[name].sharding_type == _DATA_PARALLEL

    def _distinct_ids(self, ctx: CodeContext, features: KeyedJaggedTensor) -> list[list[Tensor]]:
        """Return the ids that are asked of every table, by exchange."""
        jagged = split_features(features)
        check_ranges(jagged, self._also_checked)
        for config in self._whole:
            self._check(config, jagged)
        return [[self._ids_of(ctx, config, jagged) for config in tables] for tables in self._tables]

    def _check(self, config: CodeTableConfig, jagged: dict[str, Any]) -> list[Tensor]:
        """Return the ids that are asked of one table, by feature, or raise where it cannot serve them."""
        if self._device.type == "cpu" and not bool(self.banks[config.name].is_set):
            raise RuntimeError(
                f"table {config.name!r}: the code table must be filled before it is used, got one that never was; "
                "load a checkpoint, or shard a collection that compress() made"
            )
        self._check_intact(config)
        return [
            check_ids(jagged[feature].values(), config.num_embeddings, f"table {config.name!r}, feature {feature!r}")
            for feature in config.feature_names
        ]

    def _check_intact(self, config: CodeTableConfig) -> None:
        """Raise where this rank's integers, or those of all, are others than a fit or a checkpoint gave the table."""
        bank, name = self.banks[config.name], config.name
        if not can_check(bank.is_set) or flag_of(bank.is_set) == NOT_FILLED:
            return
        if self._is_whole(name):
            check_intact([bank.codes, *bank.low_bit_rows()], bank.is_set, name)
            return
        summed = self._summed.get(name)
        if summed is None or summed.found != self._find(bank):
            raise Recount
        if summed.mark != summed.found.flag:
            if self._is_fresh:
                raise ValueError(changed(name))
            raise Recount  # since the last error another rank may have put its rows right

    def _find(self, bank: CodeShard) -> _Found:
        return _Found(bank.checksum(), total_of(bank.low_bit_rows()), flag_of(bank.is_set))

    def _sum_up(self) -> None:
        """Sum the checksums of all spread tables over the ranks, and note the marks that are missing."""
        spread = [config.name for config in self.shared_names().values() if not self._is_whole(config.name)]
        parts = [self.banks[name].checksum() for name in spread]
        self._is_fresh = True
        halves = [[part % 2**32, part // 2**32] for part in parts]  # whose sums do not overflow
        sums = torch.tensor(halves, device=self._device)
        dist.all_reduce(sums, group=self._env.process_group)
        for name, (low, high) in zip(spread, sums.tolist(), strict=True):
            bank = self.banks[name]
            mark = mark_of((low + (high << 32) + total_of(bank.low_bit_rows())) % 2**64)
            if flag_of(bank.is_set) == NOT_SUMMED:
                bank.is_set.fill_(mark)
            self._summed[name] = _Summed(self._find(bank), mark)

    def _ids_of(self, ctx: CodeContext, config: CodeTableConfig, jagged: dict[str, Any]) -> Tensor:
        """Return the ids that are asked of one table's owners, and note in the context how to undo it."""
        parts = self._check(config, jagged)
        ctx.num_ids[config.name] = [len(part) for part in parts]
        ids = torch.cat(parts)
        if self._deduplicate:
            ids, ctx.inverse[config.name] = torch.unique(ids, return_inverse=True)
        return ids.to(self._id_dtype)

    def _flat(self, names: list[str], ids: list[Tensor]) -> KeyedJaggedTensor:
        """Return lists of ids as a batch of one bag."""
        counts = [len(part) for part in ids]
        lengths = torch.tensor(counts, dtype=self._id_dtype, device=self._device)
        return KeyedJaggedTensor(names, torch.cat(ids), lengths=lengths, stride=1, length_per_key=counts)

    @torch.no_grad()
    def compute(self, ctx: CodeContext, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look the received ids up in this rank's rows: one (ids, words) int32 per exchange."""
        found = []
        ctx.num_changes = self._num_changes
        for asked, sent, kind, tables, words in zip(
            dist_input, ctx.sharding_contexts, self._kinds, self._tables, self._words, strict=True
        ):
            sent.lengths_after_input_dist = asked.lengths().view(-1, max(asked.stride(), 1))
            here = [config for config in tables if kind != ShardingType.TABLE_WISE.value or self._owns(config.name)]
            parts = asked.values().split(asked.length_per_key())
            # row-wise ids are already relative to the first row of the rank that owns them
            rows = [
                code_gather(self.banks[config.name].codes, ids, f"table {config.name!r}", 4 * words).view(torch.int32)
                for config, ids in zip(here, parts, strict=True)
            ]
            empty = torch.empty(0, words, dtype=torch.int32, device=self._device)
            found.append(torch.cat([empty, *rows]))
        return found

    def _owns(self, name: str) -> bool:
        return self._env.rank in (self._plan[name].ranks or [])

    def output_dist(self, ctx: CodeContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Codes]]:
        """Send the codes back to the ranks that asked: by output name, (L, row_size) integer or a whole table."""
        rows = [
            exchange(words, sent)
            for exchange, words, sent in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]
        banks = [(config.output_names, self.banks[config.name]) for config in self._whole]
        whole = {name: CodeTable(bank.codes, bank.is_set) for names, bank in banks for name in names}
        return CodesAwaitable(rows, self._tables, ctx, whole, lambda: self._num_changes)

    def held(self, table: str) -> HeldCodes:
        """Return the codes of a table that are to change."""
        bank, group = self.banks[table], self._env.process_group if self._env.world_size > 1 else None
        return HeldCodes(bank.first_row, bank.codes, group, self._is_whole(table))

    def check_held(self, table: str) -> None:
        """Raise, on all ranks, where something else than a fit, a checkpoint or a manager has changed the integers."""
        self._is_fresh = False
        config = self._configs[table]
        run_together(lambda: self._check_intact(config), self._env, self._device, self._sum_up)

    def take_changed(self, table: str) -> None:
        """Take the integers of a table as they are, on all ranks: their manager has changed them."""
        bank = self.banks[table]
        self._num_changes += 1
        bank.start_flag = None
        if self._is_whole(table):
            bank.is_set.fill_(mark_of(total_of([bank.codes, *bank.low_bit_rows()])))
        else:
            bank.is_set.fill_(NOT_SUMMED)
            self._sum_up()

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of the buffers that differ over the ranks, which no wrapper may synchronise."""
        for name, _ in self.named_buffers():
            yield append_prefix(prefix, name)

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The module that this one replaces."""
        return CodeTableCollection

    def shared_names(self) -> dict[str, CodeTableConfig]:
        """Return the state-dict names of the tables that are spread over the ranks."""
        return {
            f"banks.{name}.codes": config
            for name, config in self._configs.items()
            if self._plan[name].sharding_type != _DATA_PARALLEL
        }


def _share_codes(module: ShardedCodeTableCollection, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put each sharded table into the state dict under its unsharded name, as a `ShardedTensor`."""
    for name, config in module.shared_names().items():
        local = module.banks[config.name].codes
        state[prefix + name] = sharded_tensor(local, config.num_embeddings, module._plan[config.name], module._env)


def _take_codes(module: ShardedCodeTableCollection, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Cut this rank's rows out of a whole table or a `ShardedTensor` of the same plan."""
    for name, config in module.shared_names().items():
        value = state.get(prefix + name)
        if value is None:
            continue
        local = module.banks[config.name].codes
        whole = (config.num_embeddings, config.part.row_size)
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
            first, last = shard_bounds(config.name, config.num_embeddings, module._plan[config.name], module._env)
            state[prefix + name] = value[first:last]
