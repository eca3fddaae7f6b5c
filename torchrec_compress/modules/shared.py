"""What several of the user's tables have together: what these agree in, how it starts, whose the bytes are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import MethodConfig
from torchrec_compress.methods.start import SeededInit
from torchrec_compress.methods.storage import NativePart, Parts
from torchrec_compress.names import check_table_names
from torchrec_compress.ops import stable_salt

_AGREE = ("num_embeddings", "embedding_dim", "data_type", "init_fn", "decay")


def seeded_init(seed: int, part: NativePart) -> SeededInit:
    """Return how a shared part of a collection with this seed starts."""
    assert part.shared is not None
    return SeededInit(stable_salt(seed, part.shared), part.num_embeddings, part.embedding_dim, part.init_fn)


def check_shared(tables: Sequence[BaseEmbeddingConfig], parts: Mapping[str, Parts]) -> None:
    """Check parts that share a table.

    Args:
        tables: the user's configs.
        parts: by the user's table.

    Raises:
        ValueError: they do not agree, or a user's table says how it starts, which the others would have to as well.
    """
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for table in tables:
        stored = parts[table.name]
        for part in stored.native:
            if part.shared is None:
                continue
            where = f"shared native table {part.shared!r}"
            if part.init_fn is None and _says_how_it_starts(table):
                raise ValueError(
                    f"{where}: table {table.name!r} must not say how it starts, got init_fn {table.init_fn}; leave "
                    "init_fn, weight_init_min and weight_init_max out, since others share its rows"
                )
            mine = {name: getattr(part, name) for name in _AGREE}
            mine["use"] = "bags" if part in stored.bags else "rows"
            mine["pooling"] = getattr(table, "pooling", None) if part in stored.bags else None
            other, theirs = first.setdefault(part.shared, (table.name, mine))
            differ = [name for name in mine if mine[name] != theirs[name]]
            if differ:
                raise ValueError(
                    f"{where}: tables {other!r} and {table.name!r} must agree in {differ}, got "
                    f"{[theirs[name] for name in differ]} and {[mine[name] for name in differ]}; let them share under "
                    "two names, or make them agree"
                )


def check_shared_decoders(
    tables: Sequence[BaseEmbeddingConfig], methods: Mapping[str, MethodConfig], parts: Mapping[str, Parts]
) -> None:
    """Check decoders that tables share.

    Args:
        tables: the user's configs.
        methods, parts: by the user's table.

    Raises:
        ValueError: tables do not agree, or a name is unfit for a module, or that of something else.
    """
    first: dict[str, tuple[str, dict[str, object]]] = {}
    for table in tables:
        mine = methods[table.name].shared_decoder(table)
        if mine is None:
            continue
        other, theirs = first.setdefault(mine.name, (table.name, mine.terms))
        differ = [name for name in mine.terms if theirs.get(name) != mine.terms[name]]
        if differ:
            raise ValueError(
                f"shared decoder {mine.name!r}: tables {other!r} and {table.name!r} must agree in {differ}, got "
                f"{[theirs.get(name) for name in differ]} and {[mine.terms[name] for name in differ]}; let them share "
                "under two names, or make them agree"
            )
    check_table_names(sorted(first), "compressed collection: shared decoder")
    taken = {table.name for table in tables}
    taken |= {name for stored in parts.values() for name in stored.shared}
    if taken & set(first):
        raise ValueError(
            f"compressed collection: shared decoders must not be called as tables are, got {sorted(taken & set(first))}"
        )


def _says_how_it_starts(table: BaseEmbeddingConfig) -> bool:
    """Return whether a user's init differs from the one that TorchRec writes into every config."""
    plain = replace(table, init_fn=None, weight_init_min=None, weight_init_max=None)
    mine, default = (
        (init.func, init.args, init.keywords) if isinstance(init, partial) else init
        for init in (table.init_fn, plain.init_fn)
    )
    return mine is not None and mine != default


def cut(total: int, weights: Iterable[int]) -> list[int]:
    """Return shares of a number of bytes by weight, whole numbers that sum up to it.

    Example:
        >>> cut(10, [1, 1, 1])
        [3, 3, 4]
    """
    ends = [0, *accumulate(weights)]
    return [total * last // ends[-1] - total * first // ends[-1] for first, last in pairwise(ends)]
