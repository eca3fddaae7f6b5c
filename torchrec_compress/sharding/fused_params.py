"""What may be said in a sharder's `fused_params`: what FBGEMM's tables take as arguments, and TorchRec's own words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from torchrec.distributed.batched_embedding_kernel import (
    RES_ENABLED_TABLES_STR,
    RES_STORE_SHARDS_STR,
    SplitTableBatchedEmbeddingBagsCodegen,
    SSDTableBatchedEmbeddingBags,
)
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.fused_params import FUSED_PARAM_IS_SSD_TABLE, FUSED_PARAM_SSD_TABLE_LIST
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import DataType

# what TorchRec reads of them itself, and takes out before it makes a table
_TORCHRECS = {
    RES_ENABLED_TABLES_STR,
    RES_STORE_SHARDS_STR,
    USE_ONE_TBE_PER_TABLE,
    FUSED_PARAM_IS_SSD_TABLE,
    FUSED_PARAM_SSD_TABLE_LIST,
    "embedding_cache_mode",
    "kvzch_tbe_config",
    "max_l1_cache_size",
}
# what it says of a table itself; given twice, it is Python's TypeError on the ranks that hold one
_SAID = {"self", "embedding_specs", "feature_table_map", "pooling_mode", "device", "table_names"}
_PRECISION = "weights_precision"  # of a table in memory it says it too, by the table's data type
# of which TorchRec takes its own data types as well
_DATA_TYPES = {"output_dtype", "cache_precision"}


def check_fused_params(where: str, fused_params: object) -> None:
    """Raise ValueError for fused parameters that no table of TorchRec's takes, or of another type than it takes.

    FBGEMM says so deep in `DistributedModelParallel`, on the ranks that hold such a table, and nobody does where all
    tables are codes.

    Args:
        where: names the sharder in errors.
        fused_params: of a sharder: a dict by name, or None.

    Example:
        >>> check_fused_params("sharder", {"learning_rate": 0.1, "eps": 1e-8})
    """
    if fused_params is None:
        return
    if not isinstance(fused_params, Mapping):
        raise ValueError(
            f"{where}: fused_params must be a dict of settings by name, got {fused_params!r}; give {{'learning_rate': "
            "0.1} or the like"
        )
    known = _accepted()
    for name, value in fused_params.items():
        if name not in known:
            near = [] if name in _SAID else get_close_matches(str(name), known)
            raise ValueError(
                f"{where}: fused_params must be arguments of FBGEMM's tables that TorchRec does not give them itself, "
                f"got {name!r}; " + (f"give one of {near}" if near else "leave it out")
            )
        kinds = known[name]
        if kinds and not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(dict.fromkeys(_told(kind) for kind in kinds))
            raise ValueError(f"{where}: fused_params[{name!r}] must be {wanted}, got {value!r}; mend its type")


def check_kernels(where: str, fused_params: Mapping[str, Any] | None, plan: Mapping[str, ParameterSharding]) -> None:
    """Raise ValueError, on every rank alike, for parameters that FBGEMM's tables on an SSD alone take, of others.

    FBGEMM, or Python, says so by a TypeError on the ranks that hold such a table.

    Args:
        where: names the module in errors.
        fused_params: that `check_fused_params` has seen.
        plan: by table name.
    """
    only = sorted((fused_params or {}).keys() & _of_ssd())
    others = sorted(name for name, each in plan.items() if each.compute_kernel.startswith("fused"))
    if only and others:
        told = "the table's data_type says it" if only == [_PRECISION] else "leave them out, or constrain the kernel"
        raise ValueError(
            f"{where}: fused_params {only} must be of tables on an SSD (kernel key_value), got tables {others} in "
            f"memory; {told}"
        )


@cache
def _of_ssd() -> frozenset[str]:
    """Return what tables on an SSD alone take."""
    in_memory, on_ssd = (
        set(inspect.signature(kind.__init__).parameters)
        for kind in (SplitTableBatchedEmbeddingBagsCodegen, SSDTableBatchedEmbeddingBags)
    )
    return frozenset(on_ssd - in_memory - _TORCHRECS | {_PRECISION})


@cache
def _accepted() -> dict[str, list[Any]]:
    """Return the types that each known setting may have, by its name; none where any may be."""
    found: dict[str, list[Any]] = {name: [] for name in _TORCHRECS}
    for kind in (SplitTableBatchedEmbeddingBagsCodegen, SSDTableBatchedEmbeddingBags):
        for name, argument in inspect.signature(kind.__init__).parameters.items():
            if name in _SAID:
                continue
            kinds = found.setdefault(name, [DataType] if name in _DATA_TYPES else [])
            kinds += [argument.annotation, *([bool] if isinstance(argument.default, bool) else [])]
    return {name: kinds if all(_is_known(kind) for kind in kinds) else [] for name, kinds in found.items()}


def _is_known(kind: Any) -> bool:
    """Return whether an annotation can be held against a value: it is there, and no text."""
    return kind is not inspect.Parameter.empty and kind is not Any and not isinstance(kind, str)


def _fits(value: object, kind: Any) -> bool:
    """Return whether a value is of the type that an argument is annotated with; members of containers may be any."""
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, NoneType if kind is None else get_origin(kind) or kind)


def _told(kind: Any) -> str:
    """Return the name of a type as errors say it."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_told(each) for each in get_args(kind))
    name = "None" if kind in (None, NoneType) else getattr(get_origin(kind) or kind, "__name__", str(kind))
    return f"a member of {name}" if isinstance(kind, type) and issubclass(kind, Enum) else name
