"""Codes of what ids occur with, learned without a trained table: codebooks then train with the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import Encoder
from torchrec_compress.methods.base import TableData, init_like
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit


@dataclass(frozen=True, kw_only=True)
class ContextCodesConfig(CodebookConfig):
    """What methods share whose codes need pairs (id, context id) alone; a pre-trained table starts their codebooks."""

    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "contexts"

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError without contexts, too."""
        super().check_fit(table, data)
        if data.contexts is None:
            raise ValueError(
                f"table {table.name!r}: {self.method} codes must come with contexts, got none; pass "
                "contexts={table: (ids, context ids)} to compress()"
            )

    @abstractmethod
    def learn_encoder(self, table: BaseEmbeddingConfig, data: TableData) -> Encoder:
        """Learn codes from the pairs, which are there and checked."""

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Learn codes from the pairs, and codebooks from rows where there are any."""
        encoder = self.learn_encoder(table, data)
        width = table.embedding_dim // (self.num_codes if self.structure == "product" else 1)
        words = torch.zeros(self.num_codes * self.codebook_size, width)
        if sample is not None:
            return with_refit(encoder, words, sample, self.codebook_size, self.structure)
        with torch.random.fork_rng(devices=[]):  # one seed, one result, whatever the process drew before
            torch.manual_seed(data.seed)
            init_like(table, words)
        return LearnedCodes(encoder, words)
