"""The rows of trained tables, whole or read by ids, as budgets are measured on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.learned import RowReader, check_trained_rows
from torchrec_compress.names import kind_of


@runtime_checkable
class Compressed(Protocol):
    """A collection whose rows are read by ids: `CompressedEmbeddingBagCollection` and its twin."""

    def table_configs(self) -> list[Any]:
        """Return the user's configs."""
        ...

    def methods(self) -> dict[str, MethodConfig]:
        """Return the method of every table."""
        ...

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of one table, (L, D) float32."""
        ...


@dataclass(frozen=True)
class Rows:
    """The rows of one trained table.

    Attributes:
        table: its name, rows N and width D.
        rank: directions that rows lie in; below D those of a narrow table.
        read: rows of ids, (L,) int64: (L, D) floating point.
    """

    table: EmbeddingBagConfig
    rank: int
    read: RowReader


def rows_of(where: str, tables: Any) -> dict[str, Rows]:
    """Return the rows by table name, in the host's memory or read into it.

    Args:
        where: the call, for errors.
        tables: a trained collection, compressed or not, or rows, (N, D) by table name.

    Raises:
        ValueError: it is none of these, or rows are no matrix or not finite.
    """
    if isinstance(tables, Compressed):
        return {table.name: _read_from(tables, table) for table in tables.table_configs()}
    stored: Any = tables
    if isinstance(tables, EmbeddingBagCollection | EmbeddingCollection):
        modules: Any = tables.embeddings if isinstance(tables, EmbeddingCollection) else tables.embedding_bags
        stored = {name: module.weight for name, module in modules.items()}
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"{where}: tables must be an EmbeddingBagCollection, an EmbeddingCollection, a compressed one, or rows by "
            f"table name, got {kind_of(tables, EmbeddingBagCollection, EmbeddingCollection)}"
        )
    found = {}
    for name, rows in stored.items():
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            raise ValueError(f"{where}: table {name!r}: rows must be a tensor (N, D), got {type(rows).__name__}")
        table = _table(name, *rows.shape)
        check_trained_rows(table, rows)
        kept = rows.detach().float().cpu()
        found[name] = Rows(table, table.embedding_dim, kept.__getitem__)
    return found


def _read_from(tables: Compressed, given: BaseEmbeddingConfig) -> Rows:
    table = _table(given.name, given.num_embeddings, given.embedding_dim)
    name, device = table.name, getattr(tables, "device", None)

    def read(ids: Tensor) -> Tensor:
        return tables.table_rows(name, ids.to(device)).detach().float().cpu()

    return Rows(table, tables.methods()[name].rank(table), read)


def _table(name: str, num_rows: int, width: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=num_rows, embedding_dim=width, feature_names=[name])
