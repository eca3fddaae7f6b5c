"""Methods that no release has, to try out what tables can be stored as; `registered` knows them for a test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec import DataType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import (
    METHODS,
    BagDecoder,
    HashConfig,
    MEmComConfig,
    MethodConfig,
    NativePart,
    Parts,
    TableData,
    TableDecoder,
    TableState,
)
from torchrec_compress.methods.buckets import BucketSums
from torchrec_compress.methods.learned import LearnedWhole
from torchrec_compress.methods.storage import Remap
from torchrec_compress.ops import Rows, TableRows, pool_rows, stable_salt


@contextmanager
def registered(*methods: type[MethodConfig]) -> Iterator[None]:
    """Know methods by their names, as `register` does, until the end of a block."""
    METHODS.update({method.method: method for method in methods})
    try:
        yield
    finally:
        for method in methods:
            del METHODS[method.method]


@dataclass(frozen=True, kw_only=True)
class HalfHashConfig(HashConfig):
    """Hashed rows in half precision, pooled natively."""

    method: ClassVar[str] = "half_hash"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the buckets."""
        stored = super().parts(table, seed)
        return replace(stored, bags=tuple(replace(bag, data_type=DataType.FP16) for bag in stored.bags))


@dataclass(frozen=True, kw_only=True)
class HalfMEmComConfig(MEmComConfig):
    """MEmCom's rows in half precision, its scalars in float32."""

    method: ClassVar[str] = "half_memcom"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the rows and the scalars."""
        buckets, *rest = super().parts(table, seed).rows
        return Parts(rows=(replace(buckets, data_type=DataType.FP16), *rest))


class Projection(BagDecoder):
    """Multiply pooled rows of few values by a matrix."""

    def __init__(self, width: int, embedding_dim: int, device: torch.device | None) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(width, embedding_dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrix."""
        if not self.projection.is_meta:
            nn.init.normal_(self.projection, std=self.projection.shape[0] ** -0.5)

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return (B, D) of one (B, width)."""
        (pooled,) = bags
        return pooled @ self.projection


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(MethodConfig):
    """Rows of few values, and a matrix that all of them are multiplied by after pooling."""

    method: ClassVar[str] = "low_rank"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its untrained row"
    width: int

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the rows."""
        return Parts(bags=(NativePart("factors", table.num_embeddings, self.width, Remap()),))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> Projection:
        """Return the matrix."""
        return Projection(self.width, table.embedding_dim, device)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the matrix."""
        return 4 * self.width * table.embedding_dim

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Return the best rows and matrix, by singular values."""
        self.check_fit(table, data)
        left, values, right = torch.linalg.svd(data.all_rows(table), full_matrices=False)
        rows = left[:, : self.width] * values[: self.width]
        state = TableState(native={"factors": rows}, decoder={"projection": right[: self.width]})
        return LearnedWhole(table, state)


class Sum(BagDecoder):
    """Add two pooled rows."""

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return (B, D) of two (B, D)."""
        first, second = bags
        return first + second


@dataclass(frozen=True, kw_only=True)
class QuotientRemainderConfig(MethodConfig):
    """A row of the quotient of an id plus one of its remainder (arXiv 1909.02107, section 3, with a sum)."""

    method: ClassVar[str] = "quotient_remainder"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "a row of two that others trained"
    divisor: int

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the two tables."""
        quotients = math.ceil(table.num_embeddings / self.divisor)
        sizes = (("quotient", quotients, "div"), ("remainder", self.divisor, "mod"))
        return Parts(
            bags=tuple(NativePart(name, n, table.embedding_dim, Remap(kind, self.divisor)) for name, n, kind in sizes)
        )

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> Sum:
        """Return the sum."""
        return Sum()

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Return the mean row of every quotient, and of what is left of every remainder."""
        self.check_fit(table, data)
        quotient, remainder = self.parts(table, data.seed).bags
        ids, rows = torch.arange(table.num_embeddings), data.all_rows(table)
        first = _means(rows, quotient, ids)
        rest = rows - first[quotient.remap(ids)]
        second = _means(rest, remainder, ids)
        return LearnedWhole(table, TableState(native={"quotient": first, "remainder": second}))


def _means(rows: Tensor, part: NativePart, ids: Tensor) -> Tensor:
    """Return the mean of the rows that share each row of a part."""
    sums = BucketSums(part.num_embeddings, rows.shape[1])
    sums.add(rows, part.remap(ids), None)
    return sums.means()


@dataclass(frozen=True, kw_only=True)
class SharedHashConfig(HashConfig):
    """Hashed rows that all tables share."""

    method: ClassVar[str] = "shared_hash"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the buckets."""
        (bag,) = super().parts(table, seed).bags
        return Parts(bags=(replace(bag, shared="memory"),))


class SideBySide(TableDecoder):
    """Lay the rows of an id side by side, and pool."""

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags."""
        found = torch.cat([part.gather() if isinstance(part, TableRows) else part for part in rows], dim=1)
        if offsets is not None:
            return pool_rows(found, offsets, weights)
        return found


@dataclass(frozen=True, kw_only=True)
class SharedPiecesConfig(MethodConfig):
    """Rows of two pieces each, all of one memory that all tables share (ROBE, arXiv 2108.02191, in blocks)."""

    method: ClassVar[str] = "shared_pieces"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "pieces that others trained"
    num_pieces: int

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return two ways into the memory."""
        return Parts(
            rows=tuple(
                NativePart(
                    name,
                    self.num_pieces,
                    table.embedding_dim // 2,
                    Remap("hash", self.num_pieces, stable_salt(seed, f"{table.name}:{name}")),
                    shared="memory",
                )
                for name in ("left", "right")
            )
        )

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> SideBySide:
        """Return what puts rows together."""
        return SideBySide()

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Return nothing: the memory is trained."""
        self.check_fit(table, data)
        return LearnedWhole(table, TableState())
