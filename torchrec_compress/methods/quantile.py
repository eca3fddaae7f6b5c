"""Quantile codes: codes from co-occurrence alone, no pre-trained table (RecJPQ, Petrov and Macdonald, WSDM 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import FittedCodes, refit_codebooks
from torchrec_compress.fit.quantile import quantile_codes
from torchrec_compress.methods.base import TableData, init_like, register
from torchrec_compress.methods.codebook import CodebookConfig, tail_weights


@register
@dataclass(frozen=True, kw_only=True)
class QuantileCodesConfig(CodebookConfig):
    """Codes are quantile bins of the ids' co-occurrence factors, so every codeword serves equally many ids.

    For tables too large to pre-train: codes need only pairs (id, context id), codebooks are then trained with the
    model. Where a pre-trained table is at hand as well, it starts the codebooks. Bytes: see `CodebookConfig`.

    Example:
        >>> QuantileCodesConfig(num_codes=4).method
        'quantile'
    """

    method: ClassVar[str] = "quantile"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "contexts"

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError without contexts, too."""
        super().check_fit(table, data)
        if data.contexts is None:
            raise ValueError(
                f"table {table.name!r}: quantile codes must come with contexts, got none; pass "
                "contexts={table: (ids, context ids)} to compress()"
            )

    def fit_codes(self, table: BaseEmbeddingConfig, data: TableData, hot: Tensor) -> FittedCodes:
        """Bin the leading singular vectors of the id by context matrix."""
        assert data.contexts is not None
        codes = quantile_codes(
            *data.contexts,
            num_rows=table.num_embeddings,
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            seed=data.seed,
        )
        codes[:, 0].clamp_(max=self.first_size - 1)  # the last bins join their neighbour where escapes take codes
        if data.rows is None:
            width = table.embedding_dim // (self.num_codes if self.structure == "product" else 1)
            words = torch.empty(self.num_codes * self.codebook_size, width)
            with torch.random.fork_rng(devices=[]):  # one seed, one result, whatever the process drew before
                torch.manual_seed(data.seed)
                init_like(table, words)
            return FittedCodes(codes=codes, codebooks=words, kind=self.structure)
        weights = tail_weights(table, data, hot, "none" if data.counts is None else "count")
        codebooks = refit_codebooks(
            codes, data.trained_rows(table), weights, codebook_size=self.codebook_size, kind=self.structure
        )
        return FittedCodes(codes=codes, codebooks=codebooks, kind=self.structure)
