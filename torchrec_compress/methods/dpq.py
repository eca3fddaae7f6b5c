"""Differentiable product quantisation: codes and codebooks that are trained with the model (arXiv 1908.09756)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.product import learn_product
from torchrec_compress.methods.base import MethodConfig, TableData, TableDecoder, TableState, init_like, register
from torchrec_compress.methods.coded_table import stored_codes
from torchrec_compress.methods.learned import BLOCK_ROWS, Learned
from torchrec_compress.methods.pq import PQConfig
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.ops import Rows, gathered, pool_rows, quantize_slices, slice_codes

_MOST_CODEWORDS = 32768  # of a codebook; codes take two bytes
_MOST_BOUND = 1e3


@register
@dataclass(frozen=True, kw_only=True)
class DPQConfig(MethodConfig):
    """Train codes from the start: an id has a query of D numbers, each slice served as its nearest codeword.

    Queries are a stock TorchRec table with a fused optimizer, looked up one by one; codebooks are replicated and
    trained by the dense optimizer. Of what was trained `export_codes` keeps the numbers of the nearest codewords:
    method "pq", rows the same to the bit.

    The gradient of a slice goes to its codeword, and straight through to the query, as if that were served itself:
    DPQ-VQ (section 2 of the paper) without the terms that it adds to the loss, which no table knows; codewords learn
    from the loss itself. The paper's DPQ-SX was worse (docs/log.md). Distances are not batch normalised, as codes would
    be a matter of the batch. No l2 pulls queries.

    Bytes in training: 4 (N + K) D, more than the dense table's, which footprints and plans count. Served: those of
    "pq", N M (one byte per code up to K = 256, two above, half of one up to 16) + 4 K D.

    Args:
        num_codes: codes per row, M; a divisor of the embedding's width.
        codebook_size: codewords per codebook, K.
        bound: codewords start uniform in +-bound; None: like rows of the user's table. Queries that leave all codewords
            behind share the few outermost, so it should be what a query's first step is: with Adagrad the learning rate
            of tables. That of codebooks must let them follow.

    Example:
        >>> DPQConfig(num_codes=4).exported().method
        'pq'
    """

    method: ClassVar[str] = "dpq"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the codewords nearest to its untrained query"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "sample"
    num_codes: int
    codebook_size: int = 256
    bound: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for settings that no table can have."""
        super().__post_init__()
        if self.num_codes < 1:
            raise ValueError(f"dpq: num_codes must be at least 1, got {self.num_codes}; the nearest is 1")
        if not 2 <= self.codebook_size <= _MOST_CODEWORDS:
            nearest = min(max(self.codebook_size, 2), _MOST_CODEWORDS)
            raise ValueError(
                f"dpq: codebook_size must be in [2, {_MOST_CODEWORDS}], got {self.codebook_size}; the nearest is "
                f"{nearest}"
            )
        if self.bound is not None and not 0 < self.bound <= _MOST_BOUND:
            raise ValueError(
                f"dpq: bound must be above 0 and at most {_MOST_BOUND:g}, got {self.bound!r}; leave it out for that of "
                "the table"
            )

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError where codes do not fit the table, and name the nearest ones that do."""
        super().check(table)
        where, width = f"table {table.name!r}", table.embedding_dim
        if width % self.num_codes:
            divisors = [number for number in range(1, width + 1) if width % number == 0]
            nearest = min(divisors, key=lambda number: abs(number - self.num_codes))
            raise ValueError(
                f"{where}: num_codes must divide embedding_dim = {width}, got {self.num_codes}; the nearest is "
                f"{nearest}"
            )
        if self.codebook_size > table.num_embeddings:
            raise ValueError(
                f"{where}: codebook_size must be in [2, {table.num_embeddings}] (its rows), got {self.codebook_size}; "
                "choose fewer codewords, or leave the table dense"
            )

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: to a fit, which weighs rows by them, and to how codes are used."""
        return True

    @property
    def codewords(self) -> int:
        """Codewords of a codebook, K."""
        return self.codebook_size

    @property
    def codewords_per_id(self) -> int:
        """Codewords that a row is made of, M."""
        return self.num_codes

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough for the codewords of a codebook."""
        return self.codebook_size <= table.num_embeddings

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same at the sizes that "pq" has."""
        for each in self.exported().resized(table):
            assert isinstance(each, PQConfig)
            yield replace(self, num_codes=each.num_codes, codebook_size=each.codebook_size)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the queries, which start as rows of the user's table."""
        size, kind = (table.num_embeddings, table.embedding_dim), native_type(table)
        # l2 towards 0 would gather all of them around the codewords that lie there
        return Parts(rows=(NativePart("queries", *size, Remap(), table.init_fn, decay=False, data_type=kind),))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> DPQDecoder:
        """Return the codebooks."""
        return DPQDecoder(table, self.num_codes, self.codebook_size, self.bound, device)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the codebooks."""
        return 4 * self.codebook_size * table.embedding_dim

    def exported(self) -> PQConfig:
        """Return codes and codebooks as method "pq" stores them."""
        return PQConfig(num_codes=self.num_codes, codebook_size=self.codebook_size)

    def stored_as(self, table: BaseEmbeddingConfig, state: TableState, other: MethodConfig) -> TableState:
        """Return the codes of all queries, and the codebooks."""
        assert other == self.exported()
        books = state.decoder["codewords"].detach()
        blocks = state.native["queries"].detach().split(BLOCK_ROWS)
        codes = torch.cat([stored_codes(slice_codes(block, books), self.codebook_size) for block in blocks])
        return TableState(codes=codes, decoder={"codebooks": books})

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> DPQTable:
        """Cluster the rows slice by slice, weighted by counts; queries are the rows themselves."""
        self.check_fit(table, data)
        rows = data.trained_rows(table)
        weights = data.row_weights(self.learning_weights(table, data))
        _, books = learn_product(rows, self.num_codes, self.codebook_size, weights=weights, seed=data.seed)
        return DPQTable(table, books)


class DPQTable(Learned):
    """Keep rows as queries.

    Args:
        table: the user's config.
        codewords: (M * K, D / M) float32.
    """

    kept_as = ("native", "queries")

    def __init__(self, table: BaseEmbeddingConfig, codewords: Tensor) -> None:
        super().__init__(table)
        self._codewords = codewords

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        return rows

    def _finish(self) -> TableState:
        """Return the codebooks."""
        return TableState(decoder={"codewords": self._codewords})


class DPQDecoder(TableDecoder):
    """Put the nearest codewords in the place of each query's slices, and pool.

    Args:
        table: the user's config.
        num_codes, codebook_size, bound: as in `DPQConfig`.
        device: of the parameter.

    Attributes:
        codewords: parameter, (M * K, D / M) float32, M codebooks one below the other.
    """

    def __init__(
        self,
        table: BaseEmbeddingConfig,
        num_codes: int,
        codebook_size: int,
        bound: float | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self._table, self._bound = table, bound
        size = (num_codes * codebook_size, table.embedding_dim // num_codes)
        self.codewords = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw codewords uniformly, or like slices of rows of the user's table."""
        if self.codewords.is_meta:
            return
        with torch.no_grad():
            if self._bound is None:
                init_like(self._table, self.codewords)
            else:
                nn.init.uniform_(self.codewords, -self._bound, self._bound)

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are the queries, (L, D)."""
        return pool_quantized(rows, offsets, weights, self.codewords)


@torch.fx.wrap
def pool_quantized(rows: list[Rows], offsets: Tensor | None, weights: Tensor | None, codewords: Tensor) -> Tensor:
    """Return the sums over bags, (B, D), of queries, (L, D), as their nearest codewords."""
    (queries,) = gathered(rows)
    return pool_rows(quantize_slices(queries, codewords), offsets, weights)
