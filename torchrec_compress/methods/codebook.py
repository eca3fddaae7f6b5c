"""Codes and codebooks: what every method shares whose rows are M codewords picked by M small integers."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import decode
from torchrec_compress.fit.lookups import by_lookups
from torchrec_compress.fit.metric import Metric
from torchrec_compress.fit.popularity import PopularityKind, popularity_weights
from torchrec_compress.methods.base import (
    CODE_LENGTHS,
    NO_PROJECTION,
    NUM_LEVELS,
    MethodConfig,
    TableData,
    TableState,
    dense_bytes,
)
from torchrec_compress.methods.codebook_decoder import CodebookDecoder, float_rows, fold_codewords
from torchrec_compress.methods.coded_table import CodedTable, CodeFormat, start_codes, stored_otherwise
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, Seen
from torchrec_compress.methods.low_bit_rows import check_codebook_dtype, check_low_bit_width, quantize_table_rows
from torchrec_compress.methods.shared_row import check_num_coded, learn_shared_row
from torchrec_compress.methods.storage import CodePart, Parts
from torchrec_compress.methods.width import LANES, check_width, learn_directions, narrowed
from torchrec_compress.ops import (
    code_dtype,
    coded_ids_bytes,
    dequantize_rows,
    is_packed,
    num_escape_codes,
    packed_width,
    quantized_row_bytes,
    stable_salt,
)
from torchrec_compress.ops.lowbit import RowDtype
from torchrec_compress.ops.types import Structure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(MethodConfig):
    """Store M codes per row and M codebooks of K codewords.

    Bytes: N M (one byte per code up to K = 256, two up to 32,768; up to K = 16 two codes share a byte, N ceil(M / 2))
    + 4 K D (product) or 4 M K D (residual), and with tiers the hot rows. With a width r, codewords and hot rows
    are those of rows of r numbers (r for D above), and the projection takes 4 r D. Codebooks in int8 take a quarter,
    and 4 bytes a codeword: K (D + 4 M) or M K (D + 4). Where only C ids have codes of their own, C + 1 rows of codes
    and 1.25 bits an id take the place of N rows.

    Args:
        num_codes: codes per row, M.
        codebook_size: codewords per codebook, K.
        structure: "product": a row is M codewords of D / M values side by side; "residual": the sum of M codewords of
            D values.
        num_hot_rows: the most often looked-up rows that are stored apart (tiers), reached by escape codes of the first
            codebook. Needs counts to fit.
        hot_dtype: "fp32" hot rows are trained; "int8" and "int4" ones are frozen.
        codebook_dtype: "fp32" codebooks are trained; "int8" ones are frozen, as a fit made them. Of short rows and few
            ids codebooks are much of a table's bytes.
        width: numbers that codewords add up to (or make side by side), r; one projection, (r, D), follows the pooling
            and is trained with the codebooks. A multiple of 4 below D, with "product" of num_codes too. None: D, and no
            projection. Rows of rank r, as those of a narrow table, lose nothing by it.
        num_coded: ids with codes of their own, those that were looked up most often; all others are served one row, the
            mean of theirs. None: every id has codes. Needs counts to fit, and a method that is fitted to rows.
    """

    new_ids: ClassVar[str] = "its hashed start codes until the next fit"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "sample"
    num_codes: int
    codebook_size: int = 256
    structure: Structure = "product"
    num_hot_rows: int = 0
    hot_dtype: RowDtype = "int8"
    codebook_dtype: Literal["fp32", "int8"] = "fp32"
    width: int | None = None
    num_coded: int | None = None

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError when codes, codebooks or hot rows do not fit the table."""
        super().check(table)
        where = f"table {table.name!r}"
        if self.structure not in ("product", "residual"):
            raise ValueError(f"{where}: structure must be 'product' or 'residual', got {self.structure!r}")
        if self.num_codes < 1:
            raise ValueError(f"{where}: num_codes must be at least 1, got {self.num_codes}")
        if self.width is not None:
            product = self.structure == "product"
            step = math.lcm(LANES, self.num_codes) if product else LANES
            why = f"num_codes={self.num_codes} side by side" if product else "residual codes"
            check_width(table, self.width, table.embedding_dim - 1, why, step)
        elif self.structure == "product" and table.embedding_dim % self.num_codes:
            raise ValueError(
                f"{where}: embedding_dim must be a multiple of num_codes = {self.num_codes}, "
                f"got {table.embedding_dim}; choose a divisor, or structure='residual'"
            )
        if not 2 <= self.codebook_size <= table.num_embeddings:
            raise ValueError(
                f"{where}: codebook_size must be in [2, {table.num_embeddings}] (its rows), got {self.codebook_size}; "
                "choose fewer codewords, or leave the table dense"
            )
        if not 0 <= self.num_hot_rows < table.num_embeddings:
            raise ValueError(f"{where}: num_hot_rows must be in [0, {table.num_embeddings}), got {self.num_hot_rows}")
        if self.hot_dtype not in ("fp32", "int8", "int4"):
            raise ValueError(f"{where}: hot_dtype must be 'fp32', 'int8' or 'int4', got {self.hot_dtype!r}")
        if self.num_hot_rows:
            check_low_bit_width(self.coded(table), self.hot_dtype)
        unfitted = "" if self.needs == "rows" else self.method
        if self.num_coded is not None:
            check_num_coded(table, self.num_coded, max(self.codebook_size - 1, self.num_hot_rows), unfitted)
        check_codebook_dtype(where, self.codebook_dtype, self.codeword_width(table), unfitted)
        if self.first_size < 1:
            raise ValueError(
                f"{where}: num_hot_rows = {self.num_hot_rows} must leave the first codebook a codeword, but needs "
                f"{self.codebook_size - self.first_size} escape codes of {self.codebook_size}; use more codes per row"
            )

    def codeword_width(self, table: BaseEmbeddingConfig) -> int:
        """Return the numbers of a codeword: those of a row, or its share of them side by side."""
        return self.coded(table).embedding_dim // (1 if self.sums_codewords else self.num_codes)

    def coded(self, table: BaseEmbeddingConfig) -> BaseEmbeddingConfig:
        """Return the config of the table that codes stand for: the user's, with rows of `width` numbers."""
        return table if self.width is None else narrowed(table, self.width)

    @property
    def first_size(self) -> int:
        """Codewords of the first codebook; its other codes are escapes."""
        return self.codebook_size - num_escape_codes(self.num_hot_rows, self.num_codes, self.codebook_size)

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: always, to how codes are used."""
        return True

    @property
    def codewords(self) -> int:
        """Codewords of a codebook, K."""
        return self.codebook_size

    @property
    def codewords_per_id(self) -> int:
        """Codewords that a row is made of, M."""
        return self.num_codes

    @property
    def sums_codewords(self) -> bool:
        """Whether a row is the sum of its codewords; else they lie side by side."""
        return self.structure == "residual"

    @property
    def num_packed(self) -> int:
        """Codes per row where two share a byte, or 0 where every integer is a code."""
        return self.num_codes if is_packed(self.codebook_size) else 0

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough for the codewords of a codebook."""
        return self.codebook_size <= table.num_embeddings

    def rank(self, table: BaseEmbeddingConfig) -> int:
        """Return the width, or the embedding's."""
        return self.coded(table).embedding_dim

    def smaller(self, level: int) -> CodebookConfig | None:
        """Return the same with fewer codes; they begin where int8 and int4 rows end."""
        place = level - (NUM_LEVELS - len(CODE_LENGTHS))
        return replace(self, num_codes=CODE_LENGTHS[place]) if place >= 0 else None

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of codes, and codewords in powers of two up to its own."""
        codewords = [size for size in (16, 32, 64, 128) if size < self.codebook_size]
        for size in (*codewords, self.codebook_size):
            yield from (replace(self, num_codes=m, codebook_size=size) for m in range(1, table.embedding_dim + 1))

    def serve_lengths(
        self, table: BaseEmbeddingConfig, data: TableData, lengths: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield rows as codes of several lengths serve them, hot ones too, from as few and short fits as will do.

        An estimate, for comparisons before a fit; here each length has a fit of its own, without the last pass over
        all rows.

        Args:
            table: the user's config.
            data: with rows, all of them or a sample.
            lengths: numbers of codes, ascending.

        Yields:
            Length and rows, (N, D) float32, or (S, D) of a sample.
        """
        for length in lengths:
            config = replace(self, num_codes=length)
            seen = config._see(table, data, config.learning_weights(table, data))
            encoder, books, refit = config.learn_codes(config.coded(table), data, seen.sample)
            codes = encoder(seen.sample.ids, seen.sample.rows)
            if refit is not None:
                refit.add(codes, seen.sample.rows, seen.sample.weights)
                books = refit.codebooks()
            yield length, seen.restore(decode(codes, books, self.structure))

    def serve_hot(self, table: BaseEmbeddingConfig, data: TableData) -> Tensor:
        """Return rows as they would all be served if they were hot, (N, D) float32, or (S, D) of a sample."""
        rows, directions = data.trained_rows(table), None
        if self.width is not None:
            directions = learn_directions(table, data, self.width)
            rows = directions.narrow(rows)
        if self.hot_dtype != "fp32":
            stored, _ = quantize_table_rows(table, rows, self.hot_dtype, data.row_ids(table))
            rows = dequantize_rows(stored, self.hot_dtype)
        return rows if directions is None else rows @ directions.projection

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the code table; it starts from hashed codes."""
        start = partial(
            start_codes,
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            salt=stable_salt(seed, table.name),
            first_size=self.first_size,
        )
        width, dtype = self.num_codes, code_dtype(self.codebook_size)
        if self.num_packed:
            width, dtype = packed_width(self.num_packed), torch.uint8
        unfitted = "" if self.needs == "nothing" else "codes that are hashes of the ids"
        if self.num_coded is not None:
            unfitted = "one row for all ids"
        return Parts(codes=CodePart(width, dtype, start, self.num_packed, unfitted, num_coded=self.num_coded))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> CodebookDecoder:
        """Return codebooks, hot rows and projection."""
        return CodebookDecoder(
            table,
            num_codes=self.num_codes,
            codebook_size=self.codebook_size,
            structure=self.structure,
            num_hot_rows=self.num_hot_rows,
            hot_dtype=self.hot_dtype,
            codebook_dtype=self.codebook_dtype,
            width=self.width,
            num_coded=self.num_coded,
            device=device,
        )

    def trains_decoder(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether codebooks, hot rows or projection are trained."""
        return (
            self.codebook_dtype == "fp32"
            or self.width is not None
            or (self.num_hot_rows > 0 and self.hot_dtype == "fp32")
        )

    def projected_width(self, table: BaseEmbeddingConfig) -> int | None:
        """Return the width, if there is one."""
        return self.width

    def unprojected(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return the same codes, codebooks and hot rows as those of a table of `width` numbers."""
        decoder = {name: tensor for name, tensor in state.decoder.items() if name != "projection"}
        return replace(self, width=None), TableState(codes=state.codes, decoder=decoder)

    def why_unfolded(self, table: BaseEmbeddingConfig, in_float32: bool) -> str | None:
        """Return what would be rounded again, or that the codes would save nothing."""
        if self.width is None:
            return NO_PROJECTION
        kept = {"codebooks": self.codebook_dtype, "hot rows": self.hot_dtype if self.num_hot_rows else "fp32"}
        rounded = [name for name, dtype in kept.items() if dtype != "fp32"]
        if rounded and not in_float32:
            return (
                f"its {' and '.join(rounded)} of few bits would be rounded once more; pass in_float32=True to make "
                "float32 ones of them"
            )
        stored, dense = self._folded_form().stored_bytes(table), dense_bytes(table)
        return None if stored < dense else f"it would take {stored} bytes, the dense table {dense}"

    def folded(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return codewords of D numbers that add up to rows, and hot rows of D numbers, both in float32."""
        projection, decoder = state.decoder["projection"], {}
        books = float_rows(state.decoder["codebooks"], self.codebook_dtype)
        decoder["codebooks"] = fold_codewords(books, projection, 1 if self.sums_codewords else self.num_codes)
        if self.num_hot_rows:
            hot = float_rows(state.decoder["hot_rows"], self.hot_dtype)
            decoder["hot_rows"] = fold_codewords(hot, projection, 1)
        if self.num_coded is not None:
            decoder["coded_ids"] = state.decoder["coded_ids"]
        return self._folded_form(), TableState(codes=state.codes, decoder=decoder)

    def dequantized(self) -> CodebookConfig:
        """Return the same with codebooks and hot rows in float32."""
        return replace(self, codebook_dtype="fp32", hot_dtype="fp32" if self.num_hot_rows else self.hot_dtype)

    def stored_as(self, table: BaseEmbeddingConfig, state: TableState, other: MethodConfig) -> TableState:
        """Return codebooks and hot rows in the dtypes of the other; codes are the same tensor."""
        assert isinstance(other, CodebookConfig)
        decoder = stored_otherwise(table, state.decoder, self._format(table), other._format(table))
        return TableState(codes=state.codes, decoder=decoder)

    def _folded_form(self) -> CodebookConfig:
        """Return what codes of a width are with each codeword projected: sums, also of what lay side by side."""
        hot_dtype = "fp32" if self.num_hot_rows else self.hot_dtype
        return replace(self, width=None, structure="residual", codebook_dtype="fp32", hot_dtype=hot_dtype)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of codebooks, hot rows and projection."""
        codeword = quantized_row_bytes(self.codeword_width(table), self.codebook_dtype)
        projection = 0 if self.width is None else 4 * self.width * table.embedding_dim
        hot_row = quantized_row_bytes(self.coded(table).embedding_dim, self.hot_dtype)
        index = 0 if self.num_coded is None else coded_ids_bytes(table.num_embeddings)
        return self.num_codes * self.codebook_size * codeword + projection + self.num_hot_rows * hot_row + index

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> CodedTable:
        """Learn codes and codebooks for the tail and set the hot head apart."""
        self.check_fit(table, data)
        hot, weights = self.hot_ids(table, data), self.learning_weights(table, data)
        seen = self._see(table, data, weights) if data.rows is not None or self.needs_rows else None
        if seen is None:
            learned = self.learn_codes(self.coded(table), data, None)
            return CodedTable(self._format(table), table, learned, weights, hot, False, None)
        learned = self.learn_codes(self.coded(table), data, seen.sample)
        form, (_, directions, metric, shared) = self._format(table), seen
        return CodedTable(form, table, learned, weights, hot, True, directions, metric, shared)

    def _format(self, table: BaseEmbeddingConfig) -> CodeFormat:
        """Return how what is learned is stored."""
        row = self.coded(table).embedding_dim
        return CodeFormat(self.num_codes, self.codebook_size, row, self.hot_dtype, self.codebook_dtype)

    def _see(self, table: BaseEmbeddingConfig, data: TableData, weights: Tensor) -> Seen:
        """Return the rows, of these weights, as codes are learned: narrowed to a width, whitened in a metric."""
        rows, directions, metric, shared = data.trained_rows(table), None, None, None
        if self.num_coded is not None:
            shared = learn_shared_row(table, data, self.num_coded)
            rows = shared.in_place(data.row_ids(table), rows)
        if self.width is not None:
            directions = learn_directions(table, data, self.width)
            rows = directions.narrow(rows)
        if self.uses_curvature and data.curvature is not None:
            felt = data.curvature if directions is None else directions.curvature(data.curvature)
            if felt is None:
                told = "table %r: codes are fitted to squared error, not to the loss: it feels nothing of their width"
                logger.warning(told, table.name)
            else:
                metric = Metric.of(felt, 1 if self.sums_codewords else self.num_codes)
                rows = metric.whiten(rows)
        return Seen(Sample(data.row_ids(table), rows, data.row_weights(weights)), directions, metric, shared)

    def learning_weights(self, table: BaseEmbeddingConfig, data: TableData) -> Tensor:
        """Return what each id weighs, (N,) float32: hot ones, of which no codeword is learned, nothing."""
        weights = popularity_weights(data.counts, self.weighs_by(data), table.num_embeddings)
        return weights.index_fill_(0, self.hot_ids(table, data), 0.0)

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where hot rows, or ids that are chosen to have codes, come without counts, too."""
        super().check_fit(table, data)
        for name, chosen in (("num_hot_rows", self.num_hot_rows), ("num_coded", self.num_coded)):
            if chosen and data.counts is None:
                raise ValueError(
                    f"table {table.name!r}: {name} = {chosen} must come with counts, got none; pass "
                    "counts={table: look-ups per id} to compress()"
                )

    @property
    def needs_rows(self) -> bool:
        """Whether a fit must have pre-trained rows; where not, they start the codebooks if there are any."""
        return self.needs != "contexts" or self.num_hot_rows > 0

    def weighs_by(self, data: TableData) -> PopularityKind:
        """Return how look-ups weigh a row in the fit."""
        return "none" if data.counts is None else "count"

    @abstractmethod
    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Learn what codes mean from rows, (S, D), in a metric whitened; those of hot ids weigh nothing.

        Where there is a width, `table` is `coded` and rows have that width, which is D here; those of `data` do not.
        """

    def hot_ids(self, table: BaseEmbeddingConfig, data: TableData) -> Tensor:
        """Return the ids of the hot rows: (H,) int64, the most often looked-up first."""
        if not self.num_hot_rows:
            return torch.empty(0, dtype=torch.int64)
        self.check_fit(table, data)
        assert data.counts is not None
        return by_lookups(data.counts, self.num_hot_rows)


def as_codebook(method: object) -> CodebookConfig | None:
    """Return a method of codes as what it is, or None for anything else."""
    return method if isinstance(method, CodebookConfig) else None
