"""TorchRec's enumerator with our estimators, quick with thousands of tables."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator as StockEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption, Topology
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.planner.accounting import DenseOptimizer
from torchrec_compress.planner.estimators import estimators
from torchrec_compress.planner.means import check_choices


class CompressedEnumerator(StockEnumerator):
    """List every way to shard every table, estimated by `estimators()`; pass it to a planner as `enumerator=`.

    Args:
        topology: of the planner.
        batch_size: examples of a rank.
        constraints: of the planner, as `translate_constraints` returned them.
        dense_optimizer: that trains replicated parameters, by name or as bytes of state per parameter.

    Attributes:
        found: what `enumerate` returned last, or None.

    Raises:
        ValueError: an unknown dense optimizer.

    Example:
        >>> enumerator = CompressedEnumerator(Topology(world_size=8, compute_device="cuda"), batch_size=512)
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints] | None = None,
        dense_optimizer: DenseOptimizer = "adam",
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimators(topology, constraints, dense_optimizer))
        self.found: list[ShardingOption] | None = None

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return all options, estimated, in an order that is the same in every process.

        TorchRec goes over sets of names, whose order changes from process to process, and with it which of two equally
        good plans is found.

        Raises:
            ValueError: a table with a manager may only be cut by rows, over ranks that do not divide its blocks; or
                tables that pool by mean may only be row-wise beside others that may not.
        """
        self.found = None
        self._last_stored_module = None  # TorchRec's takes a model whose tables were replaced for the one it knows
        options = _in_order(_with_whole_blocks(super().enumerate(module, sharders)))
        check_choices(options)
        self.found = options
        return options

    @property
    def last_stored_search_space(self) -> list[ShardingOption] | None:
        """What `enumerate` returned last as the planner has not touched it, or None.

        Its hash, `hash_planner_context_inputs` of a planner, is the same in every process.
        """
        stored = super().last_stored_search_space
        return None if stored is None else _in_order(_with_whole_blocks(stored))

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimate options in place."""
        super().populate_estimates(sharding_options)
        for option in sharding_options:
            option.shards = _Shards(option.shards)


def _in_order(options: list[ShardingOption]) -> list[ShardingOption]:
    tables = {name: number for number, name in enumerate(dict.fromkeys(option.fqn for option in options))}
    return sorted(options, key=lambda option: (tables[option.fqn], option.sharding_type, option.compute_kernel))


def _with_whole_blocks(options: list[ShardingOption]) -> list[ShardingOption]:
    """Leave out what would part a block of a table with a manager, or raise ValueError where nothing else is left."""
    kept = [option for option in options if not _cuts_blocks(option)]
    lost = sorted({option.name for option in options} - {option.name for option in kept})
    if lost:
        (world,) = {len(option.shards) for option in options if option.name == lost[0]}
        raise ValueError(
            f"tables {lost}: num_blocks must be a multiple of the {world} ranks that would share them row_wise; choose "
            "another num_blocks, or allow table_wise"
        )
    return kept


def _cuts_blocks(option: ShardingOption) -> bool:
    part = option.module[1]
    if not isinstance(part, ManagedCollection) or option.sharding_type != ShardingType.ROW_WISE.value:
        return False
    (blocks,) = (table.part.blocks for table in part.configs() if table.name == option.name)
    return blocks.num_blocks % len(option.shards) != 0


class _Shards(list[Shard]):
    """Shards that are copied one level deep.

    The planner copies all options several times. Ranks are all that it writes to a shard; sizes, offsets and estimates
    may be shared, and copying them took most of the time for 1,000 tables.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shards:
        return _Shards(
            Shard(size=shard.size, offset=shard.offset, storage=shard.storage, perf=shard.perf, rank=shard.rank)
            for shard in self
        )
