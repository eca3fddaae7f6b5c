"""Which method each table gets: one config for all, or one per table name or pattern."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import DenseConfig, MethodConfig, dense_bytes
from torchrec_compress.methods.base import shared_bytes, stored_together

logger = logging.getLogger(__name__)

Compression: TypeAlias = MethodConfig | Mapping[str, MethodConfig]


def resolve(tables: Sequence[BaseEmbeddingConfig], compression: Compression) -> dict[str, MethodConfig]:
    """Choose the method of every table.

    A mapping is read by table name first, then by the first pattern (`*`, `?`, `[...]`) that fits, in its own order.
    A table whose method would not save bytes stays dense, which is logged.

    Args:
        tables: the user's configs.
        compression: one method for all tables, or methods by table name or pattern.

    Returns:
        The method by table name, in the order of `tables`.

    Raises:
        ValueError: no method or mapping of methods, a table fits no key, a key fits no table, or a method cannot store
            its table.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import PQConfig
        >>> tables = [EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=64, feature_names=[name])
        ...           for name, rows in (("user", 100_000), ("weekday", 7))]
        >>> {name: config.method for name, config in resolve(tables, {"*": PQConfig(num_codes=4)}).items()}
        {'user': 'pq', 'weekday': 'dense'}
    """
    by_key = methods_by_key(compression)
    unused = set(by_key)
    chosen = {}
    # plain names fit no other, and a thousand tables have a thousand of them
    patterns = [key for key in by_key if set(key) & set("*?[")]
    for table in tables:
        keys = [table.name] if table.name in by_key else []
        keys += [key for key in patterns if key != table.name and fnmatchcase(table.name, key)]
        unused -= set(keys)
        if not keys:
            raise ValueError(
                f"compression: table {table.name!r} must fit a key, got {sorted(by_key)}; add it, or a '*' for the rest"
            )
        config = by_key[keys[0]]
        chosen[table.name] = _or_dense(table, config)
    _leave_costly_shares({table.name: table for table in tables}, chosen)
    if unused:
        names = sorted(table.name for table in tables)
        raise ValueError(f"compression: every key must fit a table, got {sorted(unused)}; the tables are {names}")
    return chosen


def methods_by_key(compression: Any) -> dict[str, MethodConfig]:
    """Return methods by key, or raise ValueError for what is neither a method nor a mapping of methods."""
    by_key = dict(compression) if isinstance(compression, Mapping) else {"*": compression}
    for key, config in by_key.items():
        where = "compression" if not isinstance(compression, Mapping) else f"compression[{key!r}]"
        if isinstance(config, type) and issubclass(config, MethodConfig):
            raise ValueError(
                f"{where}: must be a method with its options, got the class; call it, {config.__name__}(...)"
            )
        # plain data of one method has the key "method" too, but so may a table be called
        if isinstance(config, Mapping) or (key == "method" and not isinstance(config, MethodConfig)):
            raise ValueError(
                f"{where}: must be a method, got plain data {compression!r}; read it by compression.parse(...)"
            )
        if not isinstance(config, MethodConfig) or not isinstance(key, str):
            raise ValueError(
                f"{where}: must be a method such as PQConfig(num_codes=8), or a mapping of table names or patterns to "
                f"methods, got {config!r}"
            )
    return by_key


def _or_dense(table: BaseEmbeddingConfig, config: MethodConfig) -> MethodConfig:
    """Return the method, or dense where it would not save bytes; checked only where it is used."""
    fits = config.fits(table)
    if fits:
        config.check(table)
    if not config.is_compressed or (fits and _own_bytes(table, config) < dense_bytes(table)):
        return config
    return _dense(table, config)


def _own_bytes(table: BaseEmbeddingConfig, config: MethodConfig) -> int:
    """Return what a table adds, once it was trained, beside what it may share with others."""
    return config.exported().stored_bytes(table) - sum(shared_bytes(config, table).values())


def _leave_costly_shares(tables: Mapping[str, BaseEmbeddingConfig], chosen: dict[str, MethodConfig]) -> None:
    """Make tables dense that take more bytes together, with what they share, than they would dense."""
    shared = {name: shared_bytes(method, tables[name]) for name, method in chosen.items() if method.fits(tables[name])}
    for part in dict.fromkeys(part for mine in shared.values() for part in mine):
        names = [name for name, mine in shared.items() if part in mine and chosen[name].is_compressed]
        together = stored_together((chosen[name], tables[name]) for name in names)
        if together >= sum(dense_bytes(tables[name]) for name in names):
            chosen.update({name: _dense(tables[name], chosen[name]) for name in names})


def _dense(table: BaseEmbeddingConfig, config: MethodConfig) -> MethodConfig:
    logger.info("table %r stays dense: %s would not save bytes", table.name, config.method)
    dense = DenseConfig()
    dense.check(table)
    return dense
