"""Codes of what ids occur with, learned without a trained table: codebooks then train with the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import Encoder
from torchrec_compress.fit.contexts import ContextSketch
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


@dataclass(frozen=True, kw_only=True)
class SketchedCodesConfig(ContextCodesConfig):
    """Codes of pairs that may come as a stream: a sketch of them is all that the fit needs."""

    sketch_type: ClassVar[type[ContextSketch]]

    @abstractmethod
    def sketch_sizes(self, table: BaseEmbeddingConfig, seed: int) -> dict[str, int]:
        """Return what a sketch of the table is made with."""

    @abstractmethod
    def encoder_of(self, sketch: Any, counts: Tensor | None) -> Encoder:
        """Learn codes from a sketch of this table, method and seed that has seen pairs, and look-ups per id or None."""

    def sketch(self, table: BaseEmbeddingConfig, seed: int) -> Any:
        """Return a sketch of the table's pairs, without any yet; `seed` is that of the fit."""
        self.check(table)
        return self._begun(table, seed)

    def _begun(self, table: BaseEmbeddingConfig, seed: int) -> Any:
        kind: Any = self.sketch_type
        return kind(**self.sketch_sizes(table, seed), where=f"table {table.name!r}: sketch")

    def check_contexts(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError unless contexts are pairs, or a sketch of this table, method and seed that has seen some."""
        given = data.contexts
        if not isinstance(given, self.sketch_type):
            super().check_contexts(table, data)
            return
        where = f"table {table.name!r}"
        for what, wanted in self.sketch_sizes(table, data.seed).items():
            if getattr(given, what) != wanted:
                raise ValueError(
                    f"{where}: contexts' sketch must have {what} = {wanted}, got {getattr(given, what)}; make it by "
                    f"sketch() of this method and table, and seed {data.seed}"
                )
        if given.is_empty:
            raise ValueError(f"{where}: contexts' sketch must have seen a pair, got none; add pairs before the fit")

    def learn_encoder(self, table: BaseEmbeddingConfig, data: TableData) -> Encoder:
        """Add the pairs to a sketch, unless they were, and learn codes from it."""
        sketch = data.contexts
        if not isinstance(sketch, ContextSketch):
            assert sketch is not None
            ids, contexts = sketch
            sketch = self._begun(table, data.seed)
            sketch.add(ids, contexts)
        return self.encoder_of(sketch, data.counts)
