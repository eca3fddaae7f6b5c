"""Rows of fewer numbers than the embedding: which widths work, and which directions they keep."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.fit.subspace import leading_subspace
from torchrec_compress.methods.learned import TableData

LANES = 4  # FBGEMM takes row widths that are multiples of it
# the share of a curvature that is one of narrow rows; below it the whole's metric is plain squared error in them
_FELT = 1e-6


def check_width(table: BaseEmbeddingConfig, width: int, most: int, why: str, step: int = LANES) -> None:
    """Raise ValueError unless a width is a multiple of `step` in [step, most], and name the nearest one.

    Args:
        table: the user's config.
        width: numbers per row.
        most: the largest width that saves any.
        why: what bounds the width, for the message.
        step: multiple of 4.
    """
    most = most // step * step
    if most < step:
        raise ValueError(
            f"table {table.name!r}: width must be a multiple of {step} below its embedding_dim, {table.embedding_dim}, "
            f"with {why}, got {width} and there is none; leave width out"
        )
    if width % step or not step <= width <= most:
        nearest = min(most, max(step, round(width / step) * step))
        raise ValueError(
            f"table {table.name!r}: width must be a multiple of {step} in [{step}, {most}], with {why} and "
            f"embedding_dim {table.embedding_dim}, got {width}; the nearest is {nearest}"
        )


def narrowed(table: BaseEmbeddingConfig, width: int) -> BaseEmbeddingConfig:
    """Return the config of the same table with rows of `width` numbers."""
    found = copy.copy(table)
    found.embedding_dim = width
    return found


def projection_length(width: int, embedding_dim: int, rate: float = 1.0) -> float:
    """Return the length of a row of a projection; sqrt(D / r) makes up for the numbers that there are fewer of.

    So what is projected starts like rows of the user's table, and a step moves embeddings as far as full rows, times
    `rate`.
    """
    return rate * (embedding_dim / width) ** 0.5


@dataclass(frozen=True)
class Directions:
    """The directions that narrow rows keep of full ones.

    Attributes:
        encode: (D, r) float32, what narrows rows; without a metric `matrix` transposed.
        matrix: (r, D) float32, orthonormal rows.
        length: of the rows of the projection that is stored; narrow rows are as much shorter.
    """

    encode: Tensor
    matrix: Tensor
    length: float

    def narrow(self, rows: Tensor) -> Tensor:
        """Return (L, r) narrow rows of (L, D) full ones."""
        return rows @ self.encode / self.length

    def curvature(self, full: Tensor) -> Tensor | None:
        """Return how the loss bends in narrow rows, (r, r) float64, given how it does in full ones, (D, D).

        None where it does not, but by rounding: a metric of that would be noise.
        """
        matrix = self.projection.double()
        narrow = matrix @ full @ matrix.T
        felt = float(narrow.trace()) > _FELT * self.length**2 * float(full.trace())
        return narrow if felt else None

    @property
    def projection(self) -> Tensor:
        """What turns narrow rows into full ones again, (r, D)."""
        return self.matrix * self.length


def learn_directions(
    table: BaseEmbeddingConfig, data: TableData, width: int, rate: float = 1.0, among: Tensor | None = None
) -> Directions:
    """Return the directions that hold most of the rows of a fit, weighed by look-ups and, where known, by the loss.

    The one place where the subspace of rows is chosen. From a sample, hot rows, which it has none of, weigh nothing.

    Args:
        table: the user's config.
        data: of the fit, with rows.
        width: r.
        rate: see `projection_length`.
        among: (N,) bool, of the ids whose rows count, unless a sample has none of them; None: all.
    """
    kind = "none" if data.counts is None else "count"
    weights = data.row_weights(popularity_weights(data.counts, kind, table.num_embeddings))
    if among is not None:
        mine = weights * among[data.row_ids(table)]
        weights = mine if bool(mine.any()) else weights
    encode, matrix = leading_subspace(data.trained_rows(table), weights, width, data.curvature)
    return Directions(encode, matrix, projection_length(width, table.embedding_dim, rate))
