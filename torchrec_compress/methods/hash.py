"""Hash: several ids share one row (the hashing trick, Weinberger et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import MethodConfig, TableData, TableState, register, spread
from torchrec_compress.methods.buckets import BucketSums
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.ops import stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class HashConfig(MethodConfig):
    """Store `num_buckets` rows; an id is hashed to one of them.

    Bytes: 4 num_buckets D, in a table of FP16 half of it. There is no state per id.

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

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of buckets."""
        return (replace(self, num_buckets=number) for number in spread(table.num_embeddings))

    def smaller(self, level: int) -> HashConfig:
        """Return the same with half the buckets, a quarter, and so on."""
        return HashConfig(num_buckets=max(1, self.num_buckets >> (level + 1)))

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return one native table of buckets."""
        size, remap = (self.num_buckets, table.embedding_dim), self._remap(table, seed)
        return Parts(bags=(NativePart("buckets", *size, remap, data_type=native_type(table)),))

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> HashedTable:
        """Learn nothing: a row is the mean of its bucket's."""
        self.check_fit(table, data)
        return HashedTable(table, self.num_buckets, self._remap(table, data.seed), data.counts)

    def _remap(self, table: BaseEmbeddingConfig, seed: int) -> Remap:
        return Remap("hash", self.num_buckets, stable_salt(seed, table.name))


class HashedTable(Learned):
    """Fill every bucket with the count-weighted mean of its rows.

    Args:
        table: the user's config.
        num_buckets: rows that are stored.
        remap: ids to buckets.
        counts: (N,) look-ups per id, or None for equal weights.
    """

    def __init__(self, table: BaseEmbeddingConfig, num_buckets: int, remap: Remap, counts: Tensor | None) -> None:
        super().__init__(table)
        self._remap, self._counts = remap, counts
        self._buckets = BucketSums(num_buckets, table.embedding_dim)

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        self._buckets.add(rows, self._remap(ids), None if self._counts is None else self._counts[ids])

    def _sums(self) -> list[Tensor]:
        """Return the sums of the buckets."""
        return self._buckets.sums()

    def _finish(self) -> TableState:
        """Return the buckets."""
        return TableState(native={"buckets": self._buckets.means()})
