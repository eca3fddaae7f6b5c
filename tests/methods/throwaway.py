"""Methods that no release has, to try out what tables can be stored as; `registered` knows them for a test."""

from __future__ import annotations

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
    TableState,
)
from torchrec_compress.methods.learned import LearnedWhole
from torchrec_compress.methods.storage import Remap


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


@dataclass(frozen=True, kw_only=True)
class SharedHashConfig(HashConfig):
    """Hashed rows that all tables share."""

    method: ClassVar[str] = "shared_hash"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the buckets."""
        (bag,) = super().parts(table, seed).bags
        return Parts(bags=(replace(bag, shared="memory"),))
