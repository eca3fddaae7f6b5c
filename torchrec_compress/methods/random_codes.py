"""Random codes: the control that every learned code must beat at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import HashEncoder
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit
from torchrec_compress.ops import stable_salt


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

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Keep the hashed start codes and fit the codebooks to the pre-trained rows by least squares."""
        assert sample is not None
        salt = stable_salt(data.seed, table.name)
        encoder = HashEncoder(self.num_codes, self.codebook_size, salt, self.first_size)
        width = table.embedding_dim // (self.num_codes if self.structure == "product" else 1)
        start = torch.zeros(self.num_codes * self.codebook_size, width)
        return with_refit(encoder, start, sample, self.codebook_size, self.structure)
