"""Row-wise int8 and int4: every row quantised with its own scale and bias, as TorchRec's quantised tables are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import (
    MethodConfig,
    TableData,
    TableDecoder,
    TableState,
    init_like,
    register,
)
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.low_bit_rows import check_low_bit_width, quantize_table_rows, warn_of_rough_rows
from torchrec_compress.methods.storage import CodePart, Parts
from torchrec_compress.ops import Rows, hash_ids, low_bit_bag, quantize_rows, quantized_row_bytes, stable_salt

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("low_bit_bag")

_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class LowBitConfig(MethodConfig):
    """Store quantised rows; they are fitted to a pre-trained table and then frozen.

    The bytes of a row are a row of the code table, in FBGEMM's own format (`torchrec.quant` serves the same bytes), so
    low-bit rows are sharded and sent like codes. A collection that was never fitted serves the quantised rows that its
    tables would start from, a pure function of (seed, table name, id): they do not train, and that is logged.
    """

    dtype: ClassVar[Literal["int8", "int4"]]
    new_ids: ClassVar[str] = "its untrained row until the next fit"
    makes_rows: ClassVar[bool] = False

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for a row that does not end on FBGEMM's two-byte boundary."""
        super().check(table)
        check_low_bit_width(table, self.dtype)

    def fits_by_counts(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether look-ups change the fit: no, each row is rounded alone."""
        return False

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the code table of quantised rows."""
        start = partial(_start_rows, table=table, dtype=self.dtype, salt=stable_salt(seed, table.name))
        width = quantized_row_bytes(table.embedding_dim, self.dtype)
        return Parts(codes=CodePart(width, torch.uint8, start, unfitted="untrained rows, which do not train"))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> LowBitDecoder:
        """Return the dequantiser."""
        return LowBitDecoder(self.dtype)

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LowBitTable:
        """Learn nothing: every row has a scale of its own."""
        self.check_fit(table, data)
        return LowBitTable(table, self.dtype)


class LowBitTable(Learned):
    """Quantise rows.

    Args:
        table: the user's config.
        dtype: of the rows.
    """

    def __init__(self, table: BaseEmbeddingConfig, dtype: Literal["int8", "int4"]) -> None:
        super().__init__(table)
        self._dtype: Literal["int8", "int4"] = dtype
        self._seen = torch.zeros(2, dtype=torch.int64)  # rows, and rough ones among them

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        found, rough = quantize_table_rows(self._table, rows, self._dtype, ids)
        self._seen += torch.tensor([len(ids), rough])
        return found

    def _sums(self) -> list[Tensor]:
        """Return how many rows there were, and how many rough ones."""
        return [self._seen]

    def _finish(self) -> TableState:
        """Return nothing more, and log how many rows are rough."""
        num_rows, rough = self._seen.tolist()
        warn_of_rough_rows(self._table, rough, num_rows, self._dtype)
        return TableState()


def _start_rows(ids: Tensor, table: BaseEmbeddingConfig, dtype: Literal["int8", "int4"], salt: int) -> Tensor:
    """Return the quantised untrained rows of ids: (L,) int64 -> (L, bytes per row) uint8.

    Rows are drawn in fixed blocks, each from its own seed, so that any shard draws the same ones.

    Raises:
        ValueError: the table's init_fn does not fill a block of rows.
    """
    ordered, order = ids.cpu().sort()
    numbers, counts = torch.unique_consecutive(ordered // _BLOCK_ROWS, return_counts=True)
    rows = torch.empty(len(ids), quantized_row_bytes(table.embedding_dim, dtype), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for number, mine, places in zip(
            numbers.tolist(), ordered.split(counts.tolist()), order.split(counts.tolist()), strict=True
        ):
            torch.manual_seed(int(hash_ids(torch.tensor([number]), 2**62, salt)))
            block = torch.empty(_BLOCK_ROWS, table.embedding_dim, dtype=torch.float32)
            try:
                init_like(table, block)
            except RuntimeError as error:
                raise ValueError(
                    f"table {table.name!r}: init_fn must fill any number of rows for {dtype} rows that were never "
                    f"fitted, got {error} for {_BLOCK_ROWS}; give the collection will_fit=True and fit it, or mend it"
                ) from error
            rows[places] = quantize_rows(block, dtype)[mine - number * _BLOCK_ROWS]
    return rows.to(ids.device)


@register
@dataclass(frozen=True, kw_only=True)
class Int8Config(LowBitConfig):
    """Store int8 rows with a float16 scale and bias each.

    Bytes: N (D + 4).

    Example:
        >>> Int8Config().to_dict()
        {'method': 'int8'}
    """

    method: ClassVar[str] = "int8"
    dtype: ClassVar[Literal["int8", "int4"]] = "int8"


@register
@dataclass(frozen=True, kw_only=True)
class Int4Config(LowBitConfig):
    """Store int4 rows with a float16 scale and bias each.

    Bytes: N (D / 2 + 4).

    Example:
        >>> Int4Config().to_dict()
        {'method': 'int4'}
    """

    method: ClassVar[str] = "int4"
    dtype: ClassVar[Literal["int8", "int4"]] = "int4"


class LowBitDecoder(TableDecoder):
    """Dequantise rows and pool them.

    Attributes:
        row_dtype: "int8" or "int4".
    """

    has_low_bit_rows = True
    row_dtype: Literal["int8", "int4"]

    def __init__(self, dtype: Literal["int8", "int4"]) -> None:
        super().__init__()
        self.row_dtype = dtype

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `codes` are (L, bytes per row) uint8."""
        assert codes is not None
        return low_bit_bag(codes, self.row_dtype, offsets, weights=weights)
