"""Random codes: the control that every learned code must beat at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import FittedCodes, refit_codebooks
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import CodebookConfig, tail_weights
from torchrec_compress.ops import hash_codes, stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class RandomCodesConfig(CodebookConfig):
    """Codes are hashes of the id (compositional embeddings); only the codebooks know the table.

    Bytes: see `CodebookConfig`.

    Example:
        >>> RandomCodesConfig(num_codes=4).method
        'random'
    """

    method: ClassVar[str] = "random"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its hashed codes, as every other id"

    def fit_codes(self, table: BaseEmbeddingConfig, data: TableData, hot: Tensor) -> FittedCodes:
        """Keep the hashed start codes and fit the codebooks to the pre-trained rows by least squares."""
        rows = data.trained_rows(table)
        codes = hash_codes(
            torch.arange(table.num_embeddings),
            self.num_codes,
            self.codebook_size,
            stable_salt(data.seed, table.name),
            self.first_size,
        )
        weights = tail_weights(table, data, hot, "none" if data.counts is None else "count")
        codebooks = refit_codebooks(codes, rows, weights, codebook_size=self.codebook_size, kind=self.structure)
        return FittedCodes(codes=codes, codebooks=codebooks, kind=self.structure)
