"""Narrow rows: few numbers per id, and one projection for all ids behind the pooling (factorised embeddings)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import CHUNK_ROWS
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods.base import BagDecoder, MethodConfig, TableData, TableState, init_like, register
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import NativePart, Parts, Remap

_LANES = 4  # FBGEMM takes row widths that are multiples of it


@register
@dataclass(frozen=True, kw_only=True)
class NarrowConfig(MethodConfig):
    """Store `width` numbers per id and a projection to the embedding's width: row(i) = z_i P.

    Trained from the start: what one id teaches the projection serves all (MLET, arXiv 2309.15881; per table as in mixed
    dimension embeddings, arXiv 1909.11810). Rows are a stock TorchRec table with a fused optimizer, pooled and sent as
    `width` numbers; sums, means and weights commute with the projection, which comes after them and is trained by the
    dense optimizer.

    P starts with orthonormal rows and z so large that embeddings have the spread of the
    user's table. Gradients reach z through P with their own length, so the rows' learning rate is that of a full table.

    Bytes: 4 N r + 4 r D; held in training: an element-wise optimizer as much again, a row-wise one 4 N more.

    Args:
        width: numbers per id, r; a multiple of 4 below the embedding's width.

    Example:
        >>> NarrowConfig(width=16).to_dict()
        {'method': 'narrow', 'width': 16}
    """

    method: ClassVar[str] = "narrow"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its untrained row"
    width: int

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless the width is a multiple of 4 below the embedding's, and name the nearest one."""
        super().check(table)
        most = (table.embedding_dim - 1) // _LANES * _LANES
        if most < _LANES:
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be above {_LANES} with narrow rows, got "
                f"{table.embedding_dim}; leave the table dense"
            )
        if self.width % _LANES or not _LANES <= self.width <= most:
            nearest = min(most, max(_LANES, round(self.width / _LANES) * _LANES))
            raise ValueError(
                f"table {table.name!r}: width must be a multiple of {_LANES} in [{_LANES}, {most}], below its "
                f"embedding_dim {table.embedding_dim}, got {self.width}; the nearest is {nearest}"
            )

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: to a fit, which weighs rows by them."""
        return True

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough to make up for the projection; a width too large is an error instead."""
        saved = (table.embedding_dim - self.width) * table.num_embeddings
        return saved <= 0 or saved > self.width * table.embedding_dim

    def smaller(self, level: int) -> NarrowConfig | None:
        """Return the same at half the width, a quarter, and so on."""
        width = (self.width >> (level + 1)) // _LANES * _LANES
        return NarrowConfig(width=width) if width >= _LANES else None

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the narrow rows."""
        start = partial(_init_rows, table)
        return Parts(bags=(NativePart("rows", table.num_embeddings, self.width, Remap(), start),))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> Projection:
        """Return the projection."""
        return Projection(self.width, table.embedding_dim, device)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the projection."""
        return 4 * self.width * table.embedding_dim

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> NarrowTable:
        """Find the directions that hold most of the rows, weighted by counts: their leading right singular vectors."""
        self.check_fit(table, data)
        rows, kind = data.trained_rows(table), "none" if data.counts is None else "count"
        weights = data.row_weights(popularity_weights(data.counts, kind, table.num_embeddings))
        moments = torch.zeros(table.embedding_dim, table.embedding_dim, dtype=torch.float64)
        for first in range(0, len(rows), CHUNK_ROWS):  # chunks bound the float64 copies
            chunk = slice(first, first + CHUNK_ROWS)
            exact = rows[chunk].to(torch.float64)
            moments += (exact * weights[chunk, None]).T @ exact
        _, vectors = torch.linalg.eigh(moments)  # ascending
        leading = vectors[:, -self.width :].flip(1).T
        # a singular vector is known up to its sign: the largest entry is positive, whatever the solver returned
        top = leading.gather(1, leading.abs().argmax(dim=1, keepdim=True))
        return NarrowTable(table, (leading * top.sign()).float().contiguous())


class NarrowTable(Learned):
    """Project rows to the directions that were learned.

    Args:
        table: the user's config.
        projection: (r, D) float32 with orthonormal rows.
    """

    def __init__(self, table: BaseEmbeddingConfig, projection: Tensor) -> None:
        super().__init__(table)
        self._projection = projection
        self._rows = torch.empty(table.num_embeddings, len(projection))

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        self._rows.index_copy_(0, ids, rows @ self._projection.T)

    def _finish(self) -> TableState:
        """Return narrow rows and projection."""
        return TableState(native={"rows": self._rows}, decoder={"projection": self._projection})


@torch.no_grad()
def _init_rows(table: BaseEmbeddingConfig, weight: Tensor) -> None:
    """Initialise narrow rows in place, so that projected ones have the spread of the user's table."""
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)
        weight *= (table.embedding_dim / weight.shape[1]) ** 0.5


class Projection(BagDecoder):
    """Multiply pooled narrow rows by a matrix.

    Args:
        width: r.
        embedding_dim: D.
        device: of the parameter.

    Attributes:
        projection: parameter, (r, D) float32.
    """

    def __init__(self, width: int, embedding_dim: int, device: torch.device | None) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(width, embedding_dim, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a matrix with orthonormal rows."""
        if not self.projection.is_meta:
            nn.init.orthogonal_(self.projection)

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return embeddings, (B, D), of one (B, r)."""
        (pooled,) = bags
        return pooled @ self.projection
