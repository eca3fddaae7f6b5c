"""Rows become codes, the hottest of them hot rows, and what is learned becomes what a decoder holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.metric import Metric
from torchrec_compress.methods.base import TableState
from torchrec_compress.methods.codebook_decoder import float_rows
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.learned_codes import LearnedCodes
from torchrec_compress.methods.low_bit_rows import quantize_table_rows, warn_of_rough_rows
from torchrec_compress.methods.shared_row import SharedRow
from torchrec_compress.methods.width import Directions
from torchrec_compress.ops import code_dtype, coded_rows, hash_codes, hot_row_codes, is_packed, pack_codes
from torchrec_compress.ops.lowbit import RowDtype

CodebookDtype: TypeAlias = Literal["fp32", "int8"]


class CodeFormat(NamedTuple):
    """How codes, codebooks and hot rows of a table are stored, see `CodebookConfig`; rows have `row_width` numbers."""

    num_codes: int
    codebook_size: int
    row_width: int
    hot_dtype: RowDtype
    codebook_dtype: CodebookDtype


def stored_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Return codes, (L, M) in [0, K), as a code table stores them."""
    return pack_codes(codes) if is_packed(codebook_size) else codes.to(code_dtype(codebook_size))


def start_codes(ids: Tensor, num_codes: int, codebook_size: int, salt: int, first_size: int) -> Tensor:
    """Return hashed codes as a code table stores them; arguments as in `ops.hash_codes`."""
    return stored_codes(hash_codes(ids, num_codes, codebook_size, salt, first_size), codebook_size)


class CodedTable(Learned):
    """Encode rows as codes, hot ones as escape codes.

    Args:
        form: how they are stored.
        table: the user's config.
        learned: encoder and codebooks.
        weights: (N,) float32, of every id in the refit; zero for hot ones.
        hot: (H,) int64 ids of the hot rows, in their order.
        needs_rows: whether blocks have rows.
        directions: that coded rows keep, or None: they are coded whole.
        metric: codes were learned from rows that it has whitened; None: from rows as they are.
        shared: the row of ids without codes of their own; None: all have.
    """

    def __init__(
        self,
        form: CodeFormat,
        table: BaseEmbeddingConfig,
        learned: LearnedCodes,
        weights: Tensor,
        hot: Tensor,
        needs_rows: bool,
        directions: Directions | None,
        metric: Metric | None = None,
        shared: SharedRow | None = None,
    ) -> None:
        super().__init__(table)
        self._shared, self._index = shared, None if shared is None else shared.index()
        self.needs_rows, self._directions = needs_rows, directions
        self._form, self._learned, self._weights, self._hot = form, learned, weights, hot
        self._metric = metric
        self._sorted_hot, self._hot_numbers = hot.sort()
        self._hot_rows = torch.zeros(len(hot), form.row_width)

    @property
    def num_rows(self) -> int:
        """Rows of the code table."""
        return super().num_rows if self._shared is None else int(self._shared.is_coded.count_nonzero()) + 1

    def row_numbers(self, ids: Tensor) -> Tensor:
        """Return which rows of the code table ids have."""
        return ids if self._index is None else coded_rows(self._index, ids)

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        encoder, _, refit = self._learned
        if self._shared is not None:
            assert rows is not None
            rows = self._shared.in_place(ids, rows)
        if self._directions is not None:
            assert rows is not None
            rows = self._directions.narrow(rows)
        seen = rows if rows is None or self._metric is None else self._metric.whiten(rows)
        codes = encoder(ids, seen)
        if refit is not None:
            assert seen is not None
            refit.add(codes, seen, self._weights[ids])
        if len(self._hot):
            assert rows is not None
            place = torch.searchsorted(self._sorted_hot, ids).clamp(max=len(self._hot) - 1)
            is_hot = self._sorted_hot[place] == ids
            numbers = self._hot_numbers[place[is_hot]]
            escapes = hot_row_codes(len(self._hot), self._form.num_codes, self._form.codebook_size)
            codes[is_hot] = escapes[numbers]
            self._hot_rows[numbers] = rows[is_hot]
        return stored_codes(codes, self._form.codebook_size)

    def _sums(self) -> list[Tensor]:
        """Return what the refit of the codebooks needs, and the hot rows: each of one rank, zeros of the others."""
        refit = self._learned.refit
        return [*([] if refit is None else refit.sums()), self._hot_rows]

    def _finish(self) -> TableState:
        """Return codebooks, hot rows and projection."""
        _, codebooks, refit = self._learned
        books = codebooks if refit is None else refit.codebooks()
        books = books if self._metric is None else self._metric.restore_codebooks(books)
        decoder = {"codebooks": _stored_codewords(self._table, books, self._form.codebook_dtype)}
        if len(self._hot):
            decoder["hot_rows"] = _stored_hot_rows(self._table, self._hot_rows, self._form.hot_dtype, self._hot)
        if self._directions is not None:
            decoder["projection"] = self._directions.projection
        if self._index is not None:
            decoder["coded_ids"] = self._index
        return TableState(decoder=decoder)


def stored_otherwise(
    table: BaseEmbeddingConfig, decoder: Mapping[str, Tensor], old: CodeFormat, new: CodeFormat
) -> dict[str, Tensor]:
    """Return what a decoder holds with codebooks and hot rows in other dtypes, and the rest of it as it is.

    Args:
        table: the user's config.
        decoder: what it holds by name.
        old: how that is stored.
        new: how it shall be stored; of equal sizes.

    Raises:
        ValueError: codewords or hot rows have no float16 scale.
    """
    found = dict(decoder)
    if old.codebook_dtype != new.codebook_dtype:
        books = float_rows(decoder["codebooks"], old.codebook_dtype)
        found["codebooks"] = _stored_codewords(table, books, new.codebook_dtype)
    if "hot_rows" in decoder and old.hot_dtype != new.hot_dtype:
        rows = float_rows(decoder["hot_rows"], old.hot_dtype)
        found["hot_rows"] = _stored_hot_rows(table, rows, new.hot_dtype, torch.arange(len(rows)), "hot row")
    return found


def _stored_codewords(table: BaseEmbeddingConfig, books: Tensor, dtype: CodebookDtype) -> Tensor:
    """Return codebooks in float32 as a decoder holds them."""
    return _stored(table, books, dtype, torch.arange(len(books)), "codeword", "codewords")


def _stored_hot_rows(
    table: BaseEmbeddingConfig, rows: Tensor, dtype: RowDtype, ids: Tensor, what: str = "id"
) -> Tensor:
    """Return hot rows in float32 as a decoder holds them; `ids` name them in errors, by what they are."""
    return _stored(table, rows, dtype, ids, what, "rows")


def _stored(table: BaseEmbeddingConfig, rows: Tensor, dtype: RowDtype, ids: Tensor, one: str, many: str) -> Tensor:
    if dtype == "fp32":
        return rows
    found, rough = quantize_table_rows(table, rows, dtype, ids, one)
    warn_of_rough_rows(table, rough, len(rows), dtype, many)
    return found
