"""Constraints that name the user's tables, translated to what the parts of compressed tables can do."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from numbers import Real
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_compress.modules.code_tables import CodeTableCollection
from torchrec_compress.modules.decoder import Decoder
from torchrec_compress.modules.managed import ManagedBagRows, ManagedCollection
from torchrec_compress.modules.remapped import (
    RemappedEmbeddingBagCollection,
    RemappedEmbeddingBagRows,
    RemappedEmbeddingCollection,
    RemappedFeature,
)
from torchrec_compress.modules.trained import TrainedBags, TrainedCollection
from torchrec_compress.planner.lookups import Lookups
from torchrec_compress.sharding import get_default_sharders

logger = logging.getLogger(__name__)

_PARTS: dict[type[nn.Module], str] = {
    CodeTableCollection: "code table",
    RemappedEmbeddingBagCollection: "native table of pooled rows",
    RemappedEmbeddingCollection: "native table of unpooled rows",
    RemappedEmbeddingBagRows: "native table of unpooled rows",
    ManagedCollection: "table with a manager",
    ManagedBagRows: "table with a manager",
    TrainedCollection: "table of trained rows",
    TrainedBags: "table of trained rows",
    Decoder: "replicated decoder",
}
# what to do instead, nearest first: what a sharding type is wished for is how it spreads bytes and traffic
_INSTEAD: dict[str, tuple[str, ...]] = {
    ShardingType.COLUMN_WISE.value: ("row_wise", "table_wise", "data_parallel"),
    ShardingType.TABLE_COLUMN_WISE.value: ("column_wise", "row_wise", "table_wise", "data_parallel"),
    ShardingType.TABLE_ROW_WISE.value: ("row_wise", "table_wise", "data_parallel"),
    ShardingType.GRID_SHARD.value: ("table_row_wise", "row_wise", "table_wise", "data_parallel"),
    ShardingType.ROW_WISE.value: ("table_wise", "data_parallel"),
    ShardingType.TABLE_WISE.value: ("row_wise", "data_parallel"),
    ShardingType.DATA_PARALLEL.value: ("table_wise", "row_wise"),
}
# of the fields of `ParameterConstraints`, what means anything for integers without a fused kernel
_FOR_CODES = {
    "sharding_types",
    "compute_kernels",
    "pooling_factors",
    "num_poolings",
    "batch_sizes",
    "is_weighted",
    "feature_names",
    "device_group",
    "output_dtype",
}
_NO_LOOKUPS: dict[str, Any] = {
    name: getattr(ParameterConstraints(), name)
    for name in ("pooling_factors", "num_poolings", "batch_sizes", "feature_names")
}


def shardable_modules(
    module: nn.Module, sharders: Sequence[ModuleSharder[Any]]
) -> Iterator[tuple[str, nn.Module, ModuleSharder[Any]]]:
    """Yield (path, module, its sharder) in the way that the planner finds them."""
    by_name = {sharder_name(sharder.module_type): sharder for sharder in sharders}
    queue = [("", module)]
    while queue:
        path, child = queue.pop()
        sharder = by_name.get(sharder_name(type(child)))
        if sharder is not None:
            yield path, child, sharder
        else:
            queue += [(f"{path}.{name}" if path else name, part) for name, part in child.named_children()]


def translate_constraints(
    module: nn.Module,
    constraints: Mapping[str, ParameterConstraints] | None,
    compute_device: str,
    sharders: Sequence[ModuleSharder[Any]] | None = None,
) -> dict[str, ParameterConstraints]:
    """Return constraints that every part of every compressed table can meet; each change is logged as a warning.

    A part keeps of its table's `sharding_types` and `compute_kernels` what it can do. Where nothing is left, it gets
    the nearest that it can do: row-wise for a code table that was to be cut by columns, the plain kernel for one that
    was to be cached. Pooling factors and batch sizes, one per feature, reach all parts as they are. A native table that
    several tables share gets the pooling factors of all of them, and what else they wish for, which must be the same.

    Args:
        module: the model, before it is sharded.
        constraints: by table name; they are copied, never written to. "table.tensor" names a decoder's tensor, and
            "table.part" one of several native tables, which else gets its table's; one that is shared has its own name.
        compute_device: of the topology: "cpu", "cuda" or "mtia".
        sharders: as for the planner, default `torchrec_compress.sharding.get_default_sharders()`.

    Raises:
        ValueError: a sharding type or kernel that TorchRec does not know, or none of those that a table of TorchRec's
            has; look-ups that are no numbers of at least 0; tables that share one differ in their wishes.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress import PQEmbeddingBagCollection
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10_000, embedding_dim=64, feature_names=["user"])
        >>> model = PQEmbeddingBagCollection([table], device="meta")
        >>> wish = {"user": ParameterConstraints(sharding_types=["column_wise"], pooling_factors=[20.0])}
        >>> found = translate_constraints(model, wish, "cuda")["user"]
        >>> found.sharding_types, found.pooling_factors
        (['row_wise'], [20.0])
    """
    wishes = dict(constraints or {})
    for name, wish in wishes.items():
        _check_wish(f"constraints[{name!r}]", wish)
    wishes |= _of_shared(module, wishes)
    found: dict[str, list[ParameterConstraints]] = {}
    used = set()
    for path, part, sharder in shardable_modules(module, get_default_sharders() if sharders is None else sharders):
        for name in sharder.shardable_parameters(part):
            asked = name if name in wishes else _table_of(part, name)
            if asked in wishes:
                used.add(asked)
                kind = _PARTS.get(type(part))
                where = f"table {name!r}, {kind} {path!r}"
                can = {
                    how: sharder.compute_kernels(how, compute_device) for how in sharder.sharding_types(compute_device)
                }
                if kind is None:
                    _check_can(asked, wishes[asked], can)
                mine = wishes[asked] if kind is None else _translate(wishes[asked], can, where)
                found.setdefault(name, []).append(_for_codes(mine, where) if kind == "code table" else mine)
    used |= {name for _, entries in _shared(module) for entry in entries for name in (entry.table, entry.planned)}
    unknown = sorted(set(wishes) - used)
    if unknown:
        logger.warning("constraints: no table or tensor is called %s; they have no effect", unknown)
    return {**wishes, **{name: _together(of_parts) for name, of_parts in found.items()}}


def _shared(module: nn.Module) -> Iterator[tuple[str, list[RemappedFeature]]]:
    """Yield the name and the look-ups of every native table that the user's tables share."""
    for part in module.modules():
        if isinstance(part, RemappedEmbeddingBagCollection | RemappedEmbeddingCollection):
            found: dict[str, list[RemappedFeature]] = {}
            for entry in part.remaps:
                if entry.is_shared:
                    found.setdefault(entry.planned, []).append(entry)
            yield from found.items()


def _of_shared(module: nn.Module, wishes: Mapping[str, ParameterConstraints]) -> dict[str, ParameterConstraints]:
    """Return the constraints of native tables that tables share, by name; of two collections' the more look-ups."""
    found: dict[str, ParameterConstraints] = {}
    for name, entries in _shared(module):
        mine = _with_lookups(wishes.get(name) or _agreed(name, entries, wishes), name, entries, wishes)
        if name not in found or sum(mine.pooling_factors) > sum(found[name].pooling_factors):
            found[name] = mine
    return found


def _agreed(
    name: str, entries: list[RemappedFeature], wishes: Mapping[str, ParameterConstraints]
) -> ParameterConstraints:
    """Return what tables wish that share a native table, but for their look-ups.

    Raises:
        ValueError: they wish for different things.
    """
    mine = {entry.table: wishes[entry.table] for entry in entries if entry.table in wishes}
    plain = {table: dataclasses.replace(wish, **_NO_LOOKUPS) for table, wish in mine.items()}
    first = next(iter(plain), "")
    for table, wish in plain.items():
        if wish != plain[first]:
            raise ValueError(
                f"constraints: tables {first!r} and {table!r} share the native table {name!r} and must wish for the "
                f"same, but for their look-ups, got {mine[first]} and {mine[table]}; name {name!r} instead"
            )
    return plain.get(first, ParameterConstraints())


def _with_lookups(
    wish: ParameterConstraints, name: str, entries: list[RemappedFeature], wishes: Mapping[str, ParameterConstraints]
) -> ParameterConstraints:
    """Return a shared native table's constraints with the look-ups of all its tables, unless they say their own.

    Raises:
        ValueError: some tables have batch sizes, others none.
    """
    if dataclasses.replace(wish, **_NO_LOOKUPS) != wish:
        return wish
    factors: list[float] = []
    poolings: list[float] = []
    batches: list[int] = []
    for table in dict.fromkeys(entry.table for entry in entries):
        mine = [entry.feature for entry in entries if entry.table == table]
        of_table = Lookups.of(table, wishes, 0)
        times = len(mine) // len(set(mine))  # the parts of the table that share it
        factors += of_table.pooling_factors * times
        poolings += of_table.num_poolings * times
        batches += of_table.batch_sizes * times
    if any(batches) and not all(batches):
        raise ValueError(
            f"constraints: tables that share the native table {name!r} must all have batch_sizes, or none, got "
            f"{batches} by look-up; add the missing ones"
        )
    return dataclasses.replace(
        wish, pooling_factors=factors, num_poolings=poolings, batch_sizes=batches if all(batches) else None
    )


def _table_of(part: nn.Module, name: str) -> str:
    """Return the user's table of a native table that is one of several; what is planned otherwise has its own name."""
    return name.partition(".")[0] if isinstance(part, RemappedEmbeddingBagCollection) else name


def _check_wish(where: str, wish: ParameterConstraints) -> None:
    """Raise ValueError for what no part of any table could be planned by."""
    _check_names(f"{where}.sharding_types", wish.sharding_types, ShardingType)
    _check_names(f"{where}.compute_kernels", wish.compute_kernels, EmbeddingComputeKernel)
    for field in ("pooling_factors", "num_poolings", "batch_sizes"):
        _check_numbers(f"{where}.{field}", getattr(wish, field))


def _check_names(where: str, names: Sequence[str] | None, known: type[Enum]) -> None:
    """Raise ValueError for a name that TorchRec does not know: it would be translated, not refused."""
    values = [each.value for each in known]
    for name in names or []:
        if name not in values:
            close = difflib.get_close_matches(str(name), values, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; they are {values}"
            raise ValueError(f"{where}: must be names that TorchRec knows, got {name!r}{hint}")


def _check_numbers(where: str, numbers: Sequence[float] | None) -> None:
    """Raise ValueError for what is no number of look-ups: it would be counted, below zero too."""
    for number in numbers or ():
        if isinstance(number, bool) or not isinstance(number, Real) or not 0 <= number < 2**63:
            raise ValueError(f"{where}: must be numbers of at least 0 and below 2**63, one a feature, got {number!r}")


def _check_can(name: str, wish: ParameterConstraints, can: Mapping[str, list[str]]) -> None:
    """Raise ValueError where a table of TorchRec's cannot be planned as wished: it is not planned otherwise instead."""
    types = wish.sharding_types or list(can)
    if not any(set(can.get(how, ())) & set(wish.compute_kernels or can.get(how, ())) for how in types):
        has = (
            "; ".join(f"{how}: {_listed(can[how])}" for how in types if how in can) or f"it can be {_listed(list(can))}"
        )
        raise ValueError(
            f"constraints[{name!r}]: sharding_types and compute_kernels must be of its sharder and go together, got "
            f"{wish.sharding_types} and {wish.compute_kernels}; {has}"
        )


def _translate(wish: ParameterConstraints, can: Mapping[str, list[str]], where: str) -> ParameterConstraints:
    """Return the wish with sharding types and kernels that a part can do: `can` is the kernels by sharding type."""
    types = [how for how in wish.sharding_types or can if how in can]
    if not types:
        wished = wish.sharding_types or []
        types = list(dict.fromkeys(next(how for how in _INSTEAD[asked] if how in can) for asked in wished))
        logger.warning("%s cannot be sharded %s; it is planned %s instead", where, _listed(wished), _listed(types))
        wish = dataclasses.replace(wish, sharding_types=types)
    if wish.compute_kernels:
        kernels = list(dict.fromkeys(kernel for how in types for kernel in can[how]))
        if not set(kernels) & set(wish.compute_kernels):
            plain = [kernel for kernel in kernels if kernel in ("fused", "dense")] or kernels
            logger.warning(
                "%s has no kernel %s; it is planned with %s instead",
                where,
                _listed(wish.compute_kernels),
                _listed(plain),
            )
            wish = dataclasses.replace(wish, compute_kernels=plain)
    return wish


def _for_codes(wish: ParameterConstraints, where: str) -> ParameterConstraints:
    """Drop, with a warning, what only tables of trained floats can do."""
    default = ParameterConstraints()
    dropped = {
        field.name: getattr(default, field.name)
        for field in dataclasses.fields(wish)
        if field.name not in _FOR_CODES and getattr(wish, field.name) != getattr(default, field.name)
    }
    if not dropped:
        return wish
    logger.warning("%s has no use for the constraints %s; they are left out", where, sorted(dropped))
    return dataclasses.replace(wish, **dropped)


def _together(wishes: list[ParameterConstraints]) -> ParameterConstraints:
    """Return one constraint for all parts of a name: each part then picks what it can do."""
    first, *rest = wishes
    for other in rest:
        if first.sharding_types and other.sharding_types:
            types = list(dict.fromkeys([*first.sharding_types, *other.sharding_types]))
            first = dataclasses.replace(first, sharding_types=types)
        if first.compute_kernels and other.compute_kernels:
            kernels = list(dict.fromkeys([*first.compute_kernels, *other.compute_kernels]))
            first = dataclasses.replace(first, compute_kernels=kernels)
    return first


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names)
