"""Codebooks, hot rows and projection: what turns codes into embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import init_like
from torchrec_compress.methods.decoders import TableDecoder
from torchrec_compress.methods.width import projection_length
from torchrec_compress.ops import (
    BagLookup,
    Rows,
    codebook_bag,
    coded_ids_shape,
    dequantize_rows,
    is_packed,
    quantize_rows,
    quantized_row_bytes,
    stable_salt,
)
from torchrec_compress.ops.lowbit import RowDtype
from torchrec_compress.ops.types import Structure

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("codebook_bag")
torch.fx.wrap("dequantize_rows")


class CodebookDecoder(TableDecoder):
    """Codebooks, with tiers the hot rows, with a width the projection.

    Args:
        table: the user's config.
        num_codes, codebook_size, structure, num_hot_rows, hot_dtype, codebook_dtype, width, num_coded: as in
            `CodebookConfig`.
        device: of parameters and buffers.

    Attributes:
        codebooks: (M * K, r / M) product or (M * K, r) residual, float32 parameter, or (M * K, bytes per row) uint8
            buffer; r is the width, or D.
        hot_rows: (H, r) float32 parameter, or (H, bytes per row) uint8 buffer; None without tiers.
        projection: (r, D) float32 parameter; None without a width.
        coded_ids: (N / 128, 20) uint8 buffer, which ids have codes of their own (`ops.index_coded_ids`); absent where
            all have.
        structure: whether rows are codewords side by side or their sum.
        num_packed: codes per row where two share a byte, or 0 where every integer is a code.
    """

    def __init__(
        self,
        table: BaseEmbeddingConfig,
        *,
        num_codes: int,
        codebook_size: int,
        structure: Structure,
        num_hot_rows: int,
        hot_dtype: RowDtype,
        codebook_dtype: Literal["fp32", "int8"],
        width: int | None,
        num_coded: int | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self._table, self._num_codes = table, num_codes
        self._row = table.embedding_dim if width is None else width
        self._in_int8 = codebook_dtype == "int8"
        self.structure: Structure = structure
        self.num_packed = num_codes if is_packed(codebook_size) else 0
        self.has_low_bit_rows = self._in_int8 or (num_hot_rows > 0 and hot_dtype != "fp32")

        def floats(num_rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_rows, columns, dtype=torch.float32, device=device))

        def rows(name: str, num_rows: int, columns: int, dtype: RowDtype) -> None:
            if dtype == "fp32":
                self.register_parameter(name, floats(num_rows, columns))
                return
            row_bytes = quantized_row_bytes(columns, dtype)
            self.register_buffer(name, torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=device))

        self._columns = self._row // (num_codes if structure == "product" else 1)
        self.codebooks: Tensor
        self.hot_rows: Tensor | None
        rows("codebooks", num_codes * codebook_size, self._columns, codebook_dtype)
        if num_hot_rows:
            rows("hot_rows", num_hot_rows, self._row, hot_dtype)
        else:
            self.hot_rows = None
        self.projection: Tensor | None = None if width is None else floats(width, table.embedding_dim)
        if num_coded is not None:
            index = torch.zeros(coded_ids_shape(table.num_embeddings), dtype=torch.uint8, device=device)
            self.register_buffer("coded_ids", index)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise codebooks (and float hot rows) so that a row has the spread of the user's table.

        Codebooks in int8, integers that a mark covers, are the same in every process; low-bit hot rows, which no start
        code reaches, become zeros. The projection is that of `NarrowConfig`.
        """
        if self.codebooks.device.type == "meta":
            return
        with torch.no_grad():
            if self._in_int8:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(stable_salt(0, self._table.name))
                    start = self._start(torch.empty(len(self.codebooks), self._columns))
                self.codebooks.copy_(quantize_rows(start, "int8"))
            else:
                self._start(self.codebooks)
            if isinstance(self.hot_rows, nn.Parameter):
                init_like(self._table, self.hot_rows)
            elif self.hot_rows is not None:
                self.hot_rows.zero_()
            if (index := self._buffers.get("coded_ids")) is not None:
                index.zero_()  # all ids share a row until a fit
            if self.projection is not None:
                nn.init.orthogonal_(self.projection, projection_length(*self.projection.shape))

    def _start(self, codebooks: Tensor) -> Tensor:
        """Fill codebooks as they start, and return them."""
        init_like(self._table, codebooks)
        return codebooks.div_(self._num_codes**0.5) if self.structure == "residual" else codebooks

    def codewords(self) -> Tensor:
        """Return the codebooks in floating point, (M * K, r / M) or (M * K, r)."""
        if not self._in_int8:
            return self.codebooks
        found = dequantize_rows(self.codebooks, "int8")
        return found if self.projection is None else found.to(self.projection.dtype)

    def bag_lookup(self, number: int, feature: str, where: str, is_mean: bool) -> BagLookup:
        """Return the look-up that pools its rows with those of all other codebooks."""
        return BagLookup(number, feature, where, self.structure, is_mean, self.num_packed)

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `codes` are rows of the code table, (L, M) or packed."""
        assert codes is not None
        pooled = codebook_bag(
            codes,
            self.codewords(),
            offsets,
            structure=self.structure,
            weights=weights,
            hot_rows=self.hot_rows,
            num_packed=self.num_packed,
        )
        return pooled if self.projection is None else pooled @ self.projection


def float_rows(rows: Tensor, dtype: RowDtype) -> Tensor:
    """Return codebooks or hot rows in float32: those of few bits, (n, bytes per row) uint8, decoded."""
    return rows.detach() if dtype == "fp32" else dequantize_rows(rows, dtype)


def fold_codewords(codebooks: Tensor, projection: Tensor, num_slices: int) -> Tensor:
    """Return the codewords whose sums are those of `codebooks`, put side by side and projected.

    Args:
        codebooks: (M * K, r / num_slices) float32.
        projection: (r, D) float32.
        num_slices: of a row, M where codewords lie side by side, 1 where they add up.

    Returns:
        (M * K, D) float32, rounded once.

    Example:
        >>> fold_codewords(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 10.0], [5.0, 50.0]]), num_slices=2)
        tensor([[  1.,  10.],
                [ 10., 100.]])
    """
    width, embedding_dim = projection.shape
    slices = projection.detach().double().view(num_slices, width // num_slices, embedding_dim)
    books = codebooks.detach().double().view(num_slices, -1, width // num_slices)
    return (books @ slices).view(-1, embedding_dim).float()
