"""Sharded code tables: ids travel to the owner of the row, codes travel back, nothing is differentiated.

A table that this rank holds whole, as every rank does one that is data-parallel, is handed on as it is: the look-up of
codes is then a part of their decoding, as without sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.code_bank import CodeBank, CodeRows, CodeTableConfig, fill_with_start
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
    lookup_codes,
    mark_of,
    total_of,
)
from torchrec_compress.seams import KJTList, RowTable, shard_bounds
from torchrec_compress.sharding.agree import Recount, run_together
from torchrec_compress.sharding.code_exchange import CodeContext, CodesAwaitable, row_words
from torchrec_compress.sharding.exchange import Checked, ShardedExchange

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


class ShardedCodeTableCollection(ShardedExchange[CodeTableConfig, dict[str, Codes], CodeContext]):
    """`CodeTableCollection` over many ranks: row-wise, table-wise or data-parallel, table by table.

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
        super().__init__(CodeTableCollection, module.configs(), plan, env, device)
        self._deduplicate = deduplicate
        self._also_checked = module.also_checked
        self._summed: dict[str, _Summed] = {}
        self._is_checked = self._is_fresh = False
        self._num_changes = 0
        self.banks: Any = nn.ModuleDict()
        spread, self._whole = [], []
        for config in module.configs():
            bank, sharding = module.banks[config.name], plan[config.name]
            self.banks[config.name] = self._shard_of(config, bank)
            if self._is_whole(config.name):
                self._whole.append(config)
            else:
                spread.append(RowTable(config.name, config.num_rows, row_words(config), bank.codes, sharding))
        self._open_exchanges(spread)

    def _shard_of(self, config: CodeTableConfig, bank: CodeBank) -> CodeShard:
        first, last = shard_bounds(config.name, config.num_rows, self._plan[config.name], self._env)
        if bank.codes.is_meta:
            shape = (last - first, config.part.row_size)
            local = torch.zeros(shape, dtype=config.part.dtype, device=self._device)
            flag = torch.full((1,), NOT_FILLED, dtype=torch.int32, device=self._device)
            is_filled = fill_with_start(config.part, local, first)
            if is_filled:
                flag.fill_(NOT_SUMMED)
            shard = CodeShard(config, local, flag, first)
            shard.start_flag = NOT_SUMMED if is_filled else None
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

    def _is_whole(self, name: str) -> bool:
        """Return whether this rank, and then every rank, holds all rows of a table."""
        return self._env.world_size == 1 or self._plan[name].sharding_type == _DATA_PARALLEL

    def input_dist(  # type: ignore[override]
        self, ctx: CodeContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send every id to the rank that owns its row."""
        if not self._is_checked:
            self._is_checked = True
            warn_of_start_codes(list(self._configs.values()), self.banks)
        self._is_fresh = False
        return super().input_dist(ctx, features)

    def agreed(self, check: Callable[[], Checked]) -> Checked:
        """Return what a check returns, or raise on all ranks; it may ask for the sums over all ranks (`Recount`)."""
        return run_together(check, self._env, self._device, self._sum_up)

    def asked_by(self, ctx: CodeContext, features: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        """Return the ids that are asked of every table that is spread over ranks."""
        jagged = split_features(features)
        check_ranges(jagged, self._also_checked)
        for config in self._whole:
            parts = self._check(config, jagged)
            if config.part.num_coded is not None:
                bank = self.banks[config.name]
                for name, ids in zip(config.output_names, parts, strict=True):
                    ctx.gathered[name] = lookup_codes(bank.codes, bank.is_set, bank.row_numbers(ids), config.name)
        return {config.name: self._ids_of(ctx, config, jagged) for tables in self._tables for config in tables}

    def _check(self, config: CodeTableConfig, jagged: dict[str, Any]) -> list[Tensor]:
        """Return the ids that are asked of one table, by feature, or raise where it cannot serve them."""
        if self._device.type == "cpu" and not bool(self.banks[config.name].is_set):
            raise RuntimeError(
                f"table {config.name!r}: the code table must be filled before it is used, got one that never was; "
                "load a checkpoint, or shard a collection that compress() made"
            )
        self._check_intact(config)
        return [
            check_ids(jagged[feature].values(), config.num_ids, f"table {config.name!r}, feature {feature!r}")
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
        spread = [name for name in self._configs if not self._is_whole(name)]
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
        """Return the rows that are asked of one table's owners, and note in the context how to undo it."""
        parts = self._check(config, jagged)
        ctx.num_ids[config.name] = [len(part) for part in parts]
        ids = self._rows_of(config, torch.cat(parts))
        if self._deduplicate:
            ids, ctx.inverse[config.name] = torch.unique(ids, return_inverse=True)
        return ids.to(self._id_dtype)

    def _rows_of(self, config: CodeTableConfig, ids: Tensor) -> Tensor:
        """Return the rows of a table that ids have, or raise ValueError where it has no such rows."""
        rows = self.banks[config.name].row_numbers(ids)
        return rows if rows is ids else check_ids(rows, config.num_rows, f"table {config.name!r}, rows of its ids")

    @torch.no_grad()
    def compute(self, ctx: CodeContext, dist_input: KJTList) -> list[Tensor]:  # type: ignore[override]
        """Look the received ids up in this rank's rows: one (ids, words) int32 per exchange."""
        ctx.num_changes = self._num_changes
        return super().compute(ctx, dist_input)

    def rows_here(self, table: CodeTableConfig, asked: Tensor) -> Tensor:
        """Return the codes of ids in words; row-wise, ids are relative to the first row of their owner already."""
        if not self._holds(table.name):
            return self.no_rows(row_words(table))
        codes, num_bytes = self.banks[table.name].codes, 4 * row_words(table)
        return code_gather(codes, asked, f"table {table.name!r}", num_bytes).view(torch.int32)

    def no_rows(self, width: int) -> Tensor:
        """Return no codes, in words."""
        return torch.empty(0, width, dtype=torch.int32, device=self._device)

    def output_dist(self, ctx: CodeContext, output: list[Tensor]) -> LazyAwaitable[dict[str, Codes]]:
        """Send the codes back to the ranks that asked: by output name, (L, row_size) integer or a whole table."""
        rows = self._sent_back(ctx, output)
        banks = [(config.output_names, self.banks[config.name]) for config in self._whole]
        whole: dict[str, Codes] = {name: CodeTable(bank.codes, bank.is_set) for names, bank in banks for name in names}
        return CodesAwaitable(rows, self._tables, ctx, {**whole, **ctx.gathered}, lambda: self._num_changes)

    def held(self, table: str) -> HeldCodes:
        """Return the codes of a table that are to change."""
        bank, group = self.banks[table], self._env.process_group if self._env.world_size > 1 else None
        return HeldCodes(bank.first_row, bank.codes, group, self._is_whole(table))

    def check_held(self, table: str) -> None:
        """Raise, on all ranks, where something else than a fit, a checkpoint or a manager has changed the integers."""
        self._is_fresh = False
        config = self._configs[table]
        self.agreed(lambda: self._check_intact(config))

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

    def shared_state(self) -> Iterator[tuple[str, Tensor, int, ParameterSharding]]:
        """Yield the state-dict name, this rank's part, the rows of the whole and the sharding of spread tables."""
        for name, config in self._configs.items():
            if self._plan[name].sharding_type != _DATA_PARALLEL:
                yield f"banks.{name}.codes", self.banks[name].codes, config.num_rows, self._plan[name]
