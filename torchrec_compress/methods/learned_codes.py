"""Codes that were learned: an encoder of rows, codebooks, and the sums that refit them to all rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_compress.fit.codes import CodeKind, Encoder
from torchrec_compress.fit.kmeans import sample_points, train_size
from torchrec_compress.fit.metric import Metric
from torchrec_compress.fit.refit import RefitSums, refit_codebooks
from torchrec_compress.methods.shared_row import SharedRow
from torchrec_compress.methods.width import Directions

_MAX_POINTS_PER_CODEWORD = 256


class Sample(NamedTuple):
    """Rows to learn from.

    Attributes:
        ids: (S,) int64.
        rows: (S, D) float32.
        weights: (S,) float32; those of hot rows are zero.
    """

    ids: Tensor
    rows: Tensor
    weights: Tensor


class Seen(NamedTuple):
    """A sample as the learning of codes sees it.

    Attributes:
        sample: rows narrowed to the width, then whitened.
        directions: that narrow rows keep, or None: they are coded whole.
        metric: that they are whitened in, or None: they are coded as they are.
        shared: the row that stands for those of ids without codes of their own, or None: all have.
    """

    sample: Sample
    directions: Directions | None
    metric: Metric | None
    shared: SharedRow | None

    def restore(self, rows: Tensor) -> Tensor:
        """Return rows of the user's table, (S, D), for such as the sample has."""
        rows = rows if self.metric is None else self.metric.restore(rows)
        return rows if self.directions is None else rows @ self.directions.projection


class LearnedCodes(NamedTuple):
    """What makes codes, and what they mean.

    Attributes:
        encoder: of rows.
        codebooks: (M * K, width) float32; where there is a refit, only its start.
        refit: sums over all rows as they are encoded, from which the codebooks come in the end, or None.
    """

    encoder: Encoder
    codebooks: Tensor
    refit: RefitSums | None = None


def with_refit(encoder: Encoder, start: Tensor, sample: Sample, codebook_size: int, kind: CodeKind) -> LearnedCodes:
    """Return codes whose codebooks are refitted to all rows as they are encoded.

    Where there are too many codewords for that (`RefitSums.fits`), codebooks are refitted to the sample, at once.

    Args:
        encoder: of rows.
        start: (M * K, width) float32 codebooks that unused codewords keep.
        sample: what was learned from.
        codebook_size: K.
        kind: "product" or "residual".
    """
    if RefitSums.fits(len(start), kind):
        return LearnedCodes(encoder, start, RefitSums(start, len(start) // codebook_size, kind))
    ids, rows, weights = sample
    size = train_size(codebook_size, _MAX_POINTS_PER_CODEWORD)
    if len(rows) > size:
        few, weights = sample_points(weights, size, torch.Generator().manual_seed(0))
        ids, rows = ids[few], rows[few]
    codes = encoder(ids, rows)
    books = refit_codebooks(codes, rows, weights, codebook_size=codebook_size, kind=kind, start=start)
    return LearnedCodes(encoder, books)
