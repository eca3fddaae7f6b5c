"""Plain codes of a pre-trained table: product quantisation (Jegou, Douze, Schmid 2011) or residual quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import FittedCodes
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.residual import fit_residual
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import (
    CodebookConfig,
    check_popularity,
    check_popularity_counts,
    tail_weights,
)


@register
@dataclass(frozen=True, kw_only=True)
class PQConfig(CodebookConfig):
    """Codes by k-means on a pre-trained table. Bytes: see `CodebookConfig`.

    Args:
        popularity: how often a row was looked up weighs it in k-means as its raw "count", as "log2" of it, or not.

    Example:
        >>> PQConfig(num_codes=4).to_dict()["popularity"]
        'none'
    """

    method: ClassVar[str] = "pq"
    popularity: Literal["count", "log2", "none"] = "none"

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for an unknown popularity as well."""
        super().check(table)
        check_popularity(table, self.popularity)

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where popularity comes without counts, too."""
        super().check_fit(table, data)
        check_popularity_counts(table, data, self.popularity)

    def fit_codes(self, table: BaseEmbeddingConfig, data: TableData, hot: Tensor) -> FittedCodes:
        """Cluster the rows chunk by chunk (product) or stage by stage (residual)."""
        fit = fit_product if self.structure == "product" else fit_residual
        return fit(
            data.trained_rows(table),
            self.num_codes,
            self.codebook_size,
            first_size=self.first_size,
            weights=tail_weights(table, data, hot, self.popularity),
            seed=data.seed,
        )
