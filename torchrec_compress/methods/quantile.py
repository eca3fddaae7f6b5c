"""Quantile codes: codes from co-occurrence alone, no pre-trained table (RecJPQ, Petrov and Macdonald, WSDM 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import SeenEncoder
from torchrec_compress.fit.quantile import learn_quantiles
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.context_codes import ContextCodesConfig


@register
@dataclass(frozen=True, kw_only=True)
class QuantileCodesConfig(ContextCodesConfig):
    """Codes are quantile bins of the ids' co-occurrence factors, so every codeword serves equally many ids.

    For tables too large to pre-train: codes need only pairs (id, context id), codebooks are then trained with the
    model. Where a pre-trained table is at hand as well, it starts the codebooks. Bytes: see `CodebookConfig`.

    Example:
        >>> QuantileCodesConfig(num_codes=4).method
        'quantile'
    """

    method: ClassVar[str] = "quantile"

    def learn_encoder(self, table: BaseEmbeddingConfig, data: TableData) -> SeenEncoder:
        """Bin the leading singular vectors of the id by context matrix."""
        assert isinstance(data.contexts, tuple | list)
        return learn_quantiles(
            *data.contexts,
            num_rows=table.num_embeddings,
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            seed=data.seed,
            first_size=self.first_size,
        )
