"""Rows of fewer numbers than the embedding: which widths work, and how such rows start."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.fit.subspace import leading_subspace
from torchrec_compress.methods.base import init_like
from torchrec_compress.methods.learned import TableData

LANES = 4  # FBGEMM takes row widths that are multiples of it


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


def learn_projection(table: BaseEmbeddingConfig, data: TableData, width: int) -> Tensor:
    """Return the directions that hold most of the rows of a fit, as look-ups weigh them: (width, D) float32.

    The one place where the subspace of rows is chosen. From a sample, hot rows, which it has none of, weigh nothing.
    """
    kind = "none" if data.counts is None else "count"
    weights = data.row_weights(popularity_weights(data.counts, kind, table.num_embeddings))
    return leading_subspace(data.trained_rows(table), weights, width)


@torch.no_grad()
def init_narrow(table: BaseEmbeddingConfig, weight: Tensor, width: int) -> None:
    """Initialise what rows of `width` numbers are made of, in place.

    Behind a projection with orthonormal rows, rows then have the spread of the user's table.
    """
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)
        weight *= (table.embedding_dim / width) ** 0.5
