"""Hash: several ids share one row (the hashing trick, Weinberger et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import MethodConfig, TableData, TableState, bucket_means, register
from torchrec_compress.methods.storage import NativePart, Parts, Remap
from torchrec_compress.ops import stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class HashConfig(MethodConfig):
    """Store `num_buckets` rows; an id is hashed to one of them.

    Bytes: 4 num_buckets D. There is no state per id.

    Args:
        num_buckets: rows that are stored.

    Example:
        >>> HashConfig(num_buckets=1000).to_dict()
        {'method': 'hash', 'num_buckets': 1000}
    """

    method: ClassVar[str] = "hash"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the row of its bucket"
    num_buckets: int

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless 1 <= num_buckets <= num_embeddings."""
        super().check(table)
        if not 1 <= self.num_buckets <= table.num_embeddings:
            raise ValueError(
                f"table {table.name!r}: num_buckets must be in [1, {table.num_embeddings}], got {self.num_buckets}"
            )

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are as many rows as buckets."""
        return self.num_buckets <= table.num_embeddings

    def smaller(self, level: int) -> HashConfig:
        """Return the same with half the buckets, a quarter, and so on."""
        return HashConfig(num_buckets=max(1, self.num_buckets >> (level + 1)))

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return one native table of buckets."""
        return Parts(bags=(NativePart("buckets", self.num_buckets, table.embedding_dim, self._remap(table, seed)),))

    def fit(self, table: BaseEmbeddingConfig, data: TableData) -> TableState:
        """Fill every bucket with the count-weighted mean of its rows."""
        self.check_fit(table, data)
        buckets = self._remap(table, data.seed)(torch.arange(table.num_embeddings))
        return TableState(
            native={"buckets": bucket_means(data.trained_rows(table), buckets, self.num_buckets, data.counts)}
        )

    def _remap(self, table: BaseEmbeddingConfig, seed: int) -> Remap:
        return Remap("hash", self.num_buckets, stable_salt(seed, table.name))
