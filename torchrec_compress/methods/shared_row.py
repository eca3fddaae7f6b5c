"""One row for all ids that are too rare for codes of their own: codes of length zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.lookups import is_hottest
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods.learned import TableData
from torchrec_compress.ops import index_coded_ids


class SharedRow(NamedTuple):
    """The row that ids without codes of their own are served, in place of theirs.

    Attributes:
        is_coded: (N,) bool, which ids have codes of their own.
        row: (D,) float32.
    """

    is_coded: Tensor
    row: Tensor

    def in_place(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return rows, (L, D), of ids, (L,), with this one for those that share it."""
        return torch.where(self.is_coded[ids].unsqueeze(1), rows, self.row)

    def index(self) -> Tensor:
        """Return which ids have codes, as the decoder holds it: see `ops.index_coded_ids`."""
        return index_coded_ids(self.is_coded)


def check_num_coded(table: BaseEmbeddingConfig, num_coded: int, least: int, unfitted: str) -> None:
    """Raise ValueError unless so many ids of a table can have codes of their own.

    Args:
        table: the user's config.
        num_coded: ids.
        least: what codewords and hot rows want.
        unfitted: the method where it is not fitted to rows, else "".
    """
    where = f"table {table.name!r}"
    if unfitted:
        raise ValueError(
            f"{where}: num_coded must be left out with {unfitted!r}, which is not fitted to rows, got {num_coded}"
        )
    if not max(least, 1) <= num_coded < table.num_embeddings:
        raise ValueError(
            f"{where}: num_coded must be in [{max(least, 1)}, {table.num_embeddings}), enough for the codewords of a "
            f"codebook and all hot rows, got {num_coded}; leave it out for codes of all ids"
        )


def learn_shared_row(table: BaseEmbeddingConfig, data: TableData, num_coded: int) -> SharedRow:
    """Return the mean, as look-ups weigh it, of the rows of all ids but the `num_coded` most often looked up.

    Args:
        table: the user's config.
        data: with rows, all of them or a sample, and counts.
        num_coded: ids with codes of their own.
    """
    assert data.counts is not None
    is_coded = is_hottest(data.counts, num_coded)
    rows, weights = data.trained_rows(table), data.row_weights(popularity_weights(data.counts, "count", len(is_coded)))
    rare = (weights * ~is_coded[data.row_ids(table)]).double()
    if not bool(rare.sum() > 0):  # none of them is in the sample
        rare = weights.double()
    return SharedRow(is_coded, (rare @ rows.double() / rare.sum()).float())
