"""Plain codes of a pre-trained table: product quantisation (Jegou, Douze, Schmid 2011) or residual quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.popularity import PopularityKind
from torchrec_compress.fit.product import fit_product, learn_product
from torchrec_compress.fit.residual import fit_prefixes, learn_residual
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit
from torchrec_compress.methods.popularity import check_popularity, check_popularity_counts

_QUICK_ITERATIONS = 4  # of k-means, for an estimate


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

    def weighs_by(self, data: TableData) -> PopularityKind:
        """Return the popularity asked for."""
        return self.popularity

    def fits_by_counts(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether look-ups change the fit: where rows weigh by them, or chosen ids are stored otherwise."""
        return self.popularity != "none" or self.num_hot_rows > 0 or self.num_coded is not None

    @property
    def uses_curvature(self) -> bool:
        """Whether errors count as the loss feels them: yes, of product codes within each slice."""
        return True

    def serve_lengths(
        self, table: BaseEmbeddingConfig, data: TableData, lengths: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield as `CodebookConfig` says, of a few iterations: residual codes are prefixes of one fit."""
        options = {"num_iterations": _QUICK_ITERATIONS, "seed": data.seed}
        if self.structure == "residual":
            longest = replace(self, num_codes=lengths[-1])
            seen = longest._see(table, data, longest.learning_weights(table, data))
            _, rows, weights = seen.sample
            first = longest.first_size
            for fitted in fit_prefixes(rows, lengths, self.codebook_size, first_size=first, weights=weights, **options):
                yield fitted.num_codes, seen.restore(fitted.reconstruct())
            return
        for length in lengths:
            config = replace(self, num_codes=length)
            seen = config._see(table, data, config.learning_weights(table, data))
            _, rows, weights = seen.sample
            first = config.first_size
            fitted = fit_product(rows, length, self.codebook_size, first_size=first, weights=weights, **options)
            yield length, seen.restore(fitted.reconstruct())

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Cluster the rows chunk by chunk (product) or stage by stage (residual)."""
        assert sample is not None
        learn = learn_product if self.structure == "product" else learn_residual
        encoder, codebooks = learn(
            sample.rows,
            self.num_codes,
            self.codebook_size,
            first_size=self.first_size,
            weights=sample.weights,
            seed=data.seed,
        )
        if self.structure == "product":  # k-means has refitted them already
            return LearnedCodes(encoder, codebooks)
        return with_refit(encoder, codebooks, sample, self.codebook_size, "residual")
