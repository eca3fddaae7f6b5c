"""The sharders of a model with compressed tables, with the settings that the user gave to TorchRec's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseQuantEmbeddingSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import get_default_sharders as get_stock_sharders
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress.modules.outputs import dtype_asked
from torchrec_compress.sharding.managed_sharders import ManagedBagRowsSharder, ManagedCollectionSharder
from torchrec_compress.sharding.sharders import (
    CodeTableCollectionSharder,
    DecoderSharder,
    RemappedEmbeddingBagCollectionSharder,
    RemappedEmbeddingBagRowsSharder,
    RemappedEmbeddingCollectionSharder,
)
from torchrec_compress.sharding.trained_sharders import TrainedBagsSharder, TrainedCollectionSharder

Sharders = list[ModuleSharder[nn.Module]]
Registry = dict[str, QuantizedCommCodecs]
_OUTPUT = "output_dtype"


def compressed_sharders(
    stock: Iterable[ModuleSharder[Any]] | None = None,
    *,
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: Registry | None = None,
) -> Sharders:
    """Return the sharders of the parts of compressed collections, to be put beside the user's own.

    TorchRec shows a sharder none of its neighbours, so native tables can only take settings that are handed over here.
    Native tables of a pooled collection take those of the sharder of `EmbeddingBagCollection`, of an unpooled one
    those of `EmbeddingCollection`, and where the list lacks one of them, those of the other.

    Args:
        stock: the user's own sharders, subclasses too; of several for one class the last counts, as in TorchRec.
        fused_params: of native tables, instead of `stock`; an empty dict for FBGEMM's defaults.
        qcomm_codecs_registry: of native tables, instead of `stock`. Codes always travel as they are.

    Raises:
        ValueError: neither or both are given, the list has no sharder to take settings from, or fused parameters are
            none that FBGEMM's tables take.

    Example:
        >>> mine = [EmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})]
        >>> [sharder.fused_params for sharder in compressed_sharders(mine)][1]
        {'learning_rate': 0.1}
    """
    _check_registry("compressed_sharders", qcomm_codecs_registry)
    is_stated = fused_params is not None or qcomm_codecs_registry is not None
    if (stock is None) != is_stated:
        raise ValueError(
            "compressed_sharders: the settings of native tables must be given once, as the list of the sharders beside "
            f"these or as fused_params and qcomm_codecs_registry, got {'both' if is_stated else 'neither'}; pass "
            "sharders=[*mine, *compressed_sharders(mine)], or sharders=get_default_sharders(fused_params=...)"
        )
    if stock is None:
        stock = [
            EmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry),
            EmbeddingCollectionSharder(fused_params, qcomm_codecs_registry),
        ]
    bags, rows = _of_both(stock)
    native = [  # first, for they look at the settings
        RemappedEmbeddingBagCollectionSharder(bags),
        RemappedEmbeddingCollectionSharder(rows),
        RemappedEmbeddingBagRowsSharder(bags),
        ManagedCollectionSharder(rows),
        ManagedBagRowsSharder(bags),
        TrainedCollectionSharder(rows),
        TrainedBagsSharder(bags),
    ]
    outputs = _of_outputs(bags, rows)
    return [
        CodeTableCollectionSharder(fused_params=outputs),
        *native,
        DecoderSharder(_of_tables(rows) | _of_tables(bags), outputs),
    ]  # type: ignore[list-item]


def _check_registry(where: str, registry: object) -> None:
    """Raise ValueError unless codecs are by the name of what travels, or None."""
    if registry is not None and not isinstance(registry, Mapping):
        raise ValueError(f"{where}: qcomm_codecs_registry must be a dict of codecs by name, got {registry!r:.80}")


def _of_both(stock: Iterable[ModuleSharder[Any]]) -> tuple[Any, Any]:
    """Return the sharders of pooled and unpooled collections; where the list lacks one, one with the other's settings.

    Raises:
        ValueError: it lacks both.
    """
    by_type: dict[type[nn.Module], Any] = {sharder.module_type: sharder for sharder in stock}
    bags, rows = by_type.get(EmbeddingBagCollection), by_type.get(EmbeddingCollection)
    either = bags or rows
    if either is None:
        raise ValueError(
            "compressed_sharders: the list must have a sharder of EmbeddingBagCollection or EmbeddingCollection, whose "
            f"settings native tables take, got {sorted(type(sharder).__name__ for sharder in by_type.values())}; pass "
            "fused_params= instead, {} for the defaults"
        )
    return (
        bags or EmbeddingBagCollectionSharder(either.fused_params, either.qcomm_codecs_registry),
        rows or EmbeddingCollectionSharder(either.fused_params, either.qcomm_codecs_registry),
    )


def _of_tables(sharder: Any) -> dict[str, Any]:
    """Return the settings that matter to native tables alone."""
    return {name: value for name, value in (sharder.fused_params or {}).items() if name != _OUTPUT}


def _of_outputs(bags: Any, rows: Any) -> dict[str, Any]:
    """Return the setting of what look-ups return, which code tables of pooled and unpooled collections have alike.

    Raises:
        ValueError: the two sharders have different ones, or one that embeddings cannot have.
    """
    found = [(sharder.fused_params or {}).get(_OUTPUT) for sharder in (bags, rows)]
    if found[0] != found[1]:
        raise ValueError(
            f"compressed_sharders: {_OUTPUT} must be the same in the sharders of EmbeddingBagCollection and of "
            f"EmbeddingCollection, got {found[0]} and {found[1]}; give both the same"
        )
    dtype_asked("compressed_sharders", found[0])
    return {} if found[0] is None else {_OUTPUT: found[0]}


def get_default_sharders(
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: Registry | None = None,
    use_index_dedup: bool = False,
) -> Sharders:
    """Return TorchRec's default sharders and those of compressed collections, all with the same settings.

    Args:
        fused_params: of every trained table: optimizer, learning rate, cache and the like, as in TorchRec. Parameters
            that `apply_optimizer_in_backward` marked keep what it was given.
        qcomm_codecs_registry: codecs of what native tables send. Codes always travel as they are.
        use_index_dedup: of the sharders of `EmbeddingCollection`.

    Raises:
        ValueError: fused parameters are none that FBGEMM's tables take.

    Example:
        >>> [type(sharder).__name__ for sharder in get_default_sharders()][-1]
        'DecoderSharder'
    """
    _check_registry("get_default_sharders", qcomm_codecs_registry)
    settings: dict[str, Any] = {"fused_params": fused_params, "qcomm_codecs_registry": qcomm_codecs_registry}
    rows = {**settings, "use_index_dedup": use_index_dedup}
    settings |= {
        **rows,
        "ebc_sharder": EmbeddingBagCollectionSharder(**settings),
        "ec_sharder": EmbeddingCollectionSharder(**rows),
    }
    stock = [_made_anew(sharder, settings) for sharder in get_stock_sharders()]
    return [*stock, *compressed_sharders(stock)]


def _made_anew(sharder: ModuleSharder[nn.Module], settings: dict[str, Any]) -> ModuleSharder[nn.Module]:
    """Return one of TorchRec's default sharders with the settings that it takes; those of inference take none."""
    if isinstance(sharder, BaseQuantEmbeddingSharder):
        return sharder
    takes = inspect.signature(type(sharder)).parameters
    return type(sharder)(**{name: value for name, value in settings.items() if name in takes})
