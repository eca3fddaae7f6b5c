"""Codebooks, hot rows and projection: what turns codes into embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import init_like
from torchrec_compress.methods.decoders import TableDecoder
from torchrec_compress.methods.width import projection_length
from torchrec_compress.ops import BagLookup, Rows, codebook_bag, is_packed, quantized_row_bytes
from torchrec_compress.ops.lowbit import RowDtype
from torchrec_compress.ops.types import Structure

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("codebook_bag")


class CodebookDecoder(TableDecoder):
    """Codebooks, with tiers the hot rows, with a width the projection.

    Args:
        table: the user's config.
        num_codes, codebook_size, structure, num_hot_rows, hot_dtype, width: as in `CodebookConfig`.
        device: of parameters and buffers.

    Attributes:
        codebooks: parameter, (M * K, r / M) product or (M * K, r) residual, float32; r is the width, or D.
        hot_rows: (H, r) float32 parameter, or (H, bytes per row) uint8 buffer; None without tiers.
        projection: (r, D) float32 parameter; None without a width.
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
        width: int | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self._table, self._num_codes = table, num_codes
        self._row = table.embedding_dim if width is None else width
        self.structure: Structure = structure
        self.num_packed = num_codes if is_packed(codebook_size) else 0
        self.has_low_bit_rows = num_hot_rows > 0 and hot_dtype != "fp32"

        def floats(num_rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_rows, columns, dtype=torch.float32, device=device))

        columns = self._row // (num_codes if structure == "product" else 1)
        self.codebooks = floats(num_codes * codebook_size, columns)
        self.hot_rows: Tensor | None
        if not num_hot_rows:
            self.hot_rows = None
        elif hot_dtype == "fp32":
            self.hot_rows = floats(num_hot_rows, self._row)
        else:
            row_bytes = quantized_row_bytes(self._row, hot_dtype)
            hot = torch.zeros(num_hot_rows, row_bytes, dtype=torch.uint8, device=device)
            self.register_buffer("hot_rows", hot)
        self.projection: Tensor | None = None if width is None else floats(width, table.embedding_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise codebooks (and float hot rows) so that a row has the spread of the user's table.

        Low-bit hot rows, which no start code reaches, become zeros. The projection is that of `NarrowConfig`.
        """
        if self.codebooks.device.type == "meta":
            return
        with torch.no_grad():
            init_like(self._table, self.codebooks)
            if self.structure == "residual":
                self.codebooks /= self._num_codes**0.5
            if isinstance(self.hot_rows, nn.Parameter):
                init_like(self._table, self.hot_rows)
            elif self.hot_rows is not None:
                self.hot_rows.zero_()
            if self.projection is not None:
                nn.init.orthogonal_(self.projection, projection_length(*self.projection.shape))

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
            self.codebooks,
            offsets,
            structure=self.structure,
            weights=weights,
            hot_rows=self.hot_rows,
            num_packed=self.num_packed,
        )
        return pooled if self.projection is None else pooled @ self.projection
