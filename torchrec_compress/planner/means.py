"""Plans under which TorchRec would return wrong means, which our sharders refuse, are not proposed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchrec.distributed.planner.types import (
    Partitioner,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Topology,
)
from torchrec.modules.embedding_configs import PoolingType

from torchrec_compress.modules.remapped import RemappedEmbeddingBagCollection
from torchrec_compress.sharding.checks import ROW_KINDS, means_told, wrong_means


class SoundMeans(Partitioner):
    """Another partitioner, which is given no proposal with row-wise means beside other tables.

    Args:
        inner: places what is left.
    """

    def __init__(self, inner: Partitioner) -> None:
        self._inner = inner

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Place a proposal's shards on ranks.

        Raises:
            PlannerError: the proposal mixes kinds beside means, or cannot be placed.
        """
        for tables in _by_module(proposal).values():
            kinds = {option.name: option.sharding_type for option in tables}
            means, others = wrong_means(kinds, _means(tables[0]))
            if means:
                raise PlannerError(
                    error_type=PlannerErrorType.PARTITION,
                    message=means_told(f"planner: {tables[0].path}", means, others),
                )
        return self._inner.partition(proposal, storage_constraint)


def check_choices(options: Sequence[ShardingOption]) -> None:
    """Raise ValueError where constraints leave no plan that does not mix kinds beside means."""
    for tables in _by_module(options).values():
        means = _means(tables[0])
        by_rows = {option.name for option in tables if option.sharding_type in ROW_KINDS}
        otherwise = {option.name for option in tables if option.sharding_type not in ROW_KINDS}
        cut, whole = sorted(means - otherwise), sorted(otherwise - by_rows)
        if cut and whole:
            raise ValueError(means_told(f"planner: {tables[0].path}", cut, whole))


def sound_choices(search_space: Sequence[ShardingOption]) -> list[list[ShardingOption]]:
    """Return search spaces in which no proposal mixes kinds beside means: all by rows, or means in no way by rows.

    The whole one where no table pools by mean. Of a table that has no option of the kind all stay.
    """
    names = {key: _means(tables[0]) for key, tables in _by_module(search_space).items()}
    if not any(names.values()):
        return [list(search_space)]

    def is_sound(option: ShardingOption, by_rows: bool) -> bool:
        means = names.get(id(option.module[1]), set())
        is_held = means if by_rows else option.name in means
        return not is_held or (option.sharding_type in ROW_KINDS) is by_rows

    spaces = []
    for by_rows in (True, False):
        fitting = {option.fqn for option in search_space if is_sound(option, by_rows)}
        spaces.append([one for one in search_space if is_sound(one, by_rows) or one.fqn not in fitting])
    return spaces


def _by_module(options: Iterable[ShardingOption]) -> dict[int, list[ShardingOption]]:
    """Return the options of pooled native tables, by the collection that holds them."""
    found: dict[int, list[ShardingOption]] = {}
    for option in options:
        if isinstance(option.module[1], RemappedEmbeddingBagCollection):
            found.setdefault(id(option.module[1]), []).append(option)
    return found


def _means(option: ShardingOption) -> set[str]:
    """Return the tables of an option's collection that pool by mean, by the names that a plan has for them."""
    part = option.module[1]
    assert isinstance(part, RemappedEmbeddingBagCollection)
    means = {config.name for config in part.native.embedding_bag_configs() if config.pooling == PoolingType.MEAN}
    return {entry.planned for entry in part.remaps if entry.native_table in means}
