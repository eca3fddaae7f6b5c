"""MEC: codes of a pre-trained table by a regularised, contrastive product-quantised auto-encoder (arXiv 2502.15355)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.mec import MECFit, learn_mec
from torchrec_compress.fit.popularity import PopularityKind
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit
from torchrec_compress.methods.popularity import check_popularity, check_popularity_counts
from torchrec_compress.methods.pq import PQConfig


@register
@dataclass(frozen=True, kw_only=True)
class MECConfig(CodebookConfig):
    """Codes by MEC's auto-encoder. Bytes: see `CodebookConfig`.

    The paper weighs rows by log2 of their count; raw counts, the default here, are the error that a look-up sees and
    are better where popularity is steep. The tiers (`num_hot_rows`) are an extension of the paper.

    Args:
        popularity: how often a row was looked up weighs it as its raw "count", as "log2" of it, or not at all.
        fit_options: the auto-encoder's terms and training, each a switch.

    Example:
        >>> MECConfig(num_codes=4).to_dict()["popularity"]
        'count'
    """

    method: ClassVar[str] = "mec"
    popularity: Literal["count", "log2", "none"] = "count"
    fit_options: MECFit = field(default_factory=MECFit)

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for an unknown popularity, or residual codes, which MEC's auto-encoder does not learn."""
        super().check(table)
        check_popularity(table, self.popularity)
        if self.structure != "product":
            raise ValueError(
                f"table {table.name!r}: structure must be 'product' with method 'mec', got {self.structure!r}; "
                "use method 'pq' for residual codes"
            )

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where popularity comes without counts, too."""
        super().check_fit(table, data)
        check_popularity_counts(table, data, self.popularity)

    def weighs_by(self, data: TableData) -> PopularityKind:
        """Return the popularity asked for."""
        return self.popularity

    def _folded_form(self) -> PQConfig:
        """Return residual codes as method 'pq' stores them; MEC's lie side by side."""
        return PQConfig(
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            structure="residual",
            num_hot_rows=self.num_hot_rows,
            hot_dtype="fp32" if self.num_hot_rows else self.hot_dtype,
            num_coded=self.num_coded,
            popularity=self.popularity,
        )

    @property
    def uses_curvature(self) -> bool:
        """Whether errors count as the loss feels them: yes, of product codes within each slice."""
        return True

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Train the auto-encoder, keep its codes, and refit the codebooks to the table itself."""
        assert sample is not None
        encoder, start = learn_mec(
            sample.rows,
            self.num_codes,
            self.codebook_size,
            first_size=self.first_size,
            weights=sample.weights,
            options=self.fit_options,
            seed=data.seed,
            progress=data.progress,
        )
        return with_refit(encoder, start, sample, self.codebook_size, "product")
