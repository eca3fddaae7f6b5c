"""Quantile codes: codes from co-occurrence alone, no pre-trained table (RecJPQ, Petrov and Macdonald, WSDM 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.quantile import learn_quantiles
from torchrec_compress.methods.base import TableData, init_like, register
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit


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

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Bin the leading singular vectors of the id by context matrix."""
        assert data.contexts is not None
        encoder = learn_quantiles(
            *data.contexts,
            num_rows=table.num_embeddings,
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            seed=data.seed,
            first_size=self.first_size,
        )
        width = table.embedding_dim // (self.num_codes if self.structure == "product" else 1)
        words = torch.zeros(self.num_codes * self.codebook_size, width)
        if sample is not None:
            return with_refit(encoder, words, sample, self.codebook_size, self.structure)
        with torch.random.fork_rng(devices=[]):  # one seed, one result, whatever the process drew before
            torch.manual_seed(data.seed)
            init_like(table, words)
        return LearnedCodes(encoder, words)
