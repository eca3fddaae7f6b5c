"""Rows of a table in int8 and int4: what can be stored so, and how."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.ops import SCALE_BYTES, quantize_rows

logger = logging.getLogger(__name__)

_LEVELS = {"int8": 255, "int4": 15}


def check_low_bit_width(table: BaseEmbeddingConfig, dtype: str) -> None:
    """Raise ValueError where quantised rows would not end on the two-byte boundary that FBGEMM asks for."""
    multiple = {"int8": 2, "int4": 4}.get(dtype, 1)
    if table.embedding_dim % multiple:
        raise ValueError(
            f"table {table.name!r}: embedding_dim must be a multiple of {multiple} for {dtype} rows, "
            f"got {table.embedding_dim}"
        )


def quantize_table_rows(
    table: BaseEmbeddingConfig, rows: Tensor, dtype: Literal["int8", "int4"], ids: Tensor, what: str = "id"
) -> tuple[Tensor, int]:
    """Return low-bit rows of a table as `ops.quantize_rows` makes them, and how many of them are rough.

    A rough row varies by less than a float16 scale can tell.

    Args:
        table: the user's config.
        rows: (L, D) float32.
        dtype: of the result.
        ids: (L,) of the rows.
        what: the ids are of, for errors.

    Returns:
        (L, bytes per row) uint8, and the number, for `warn_of_rough_rows`.

    Raises:
        ValueError: a row is not a number somewhere, or has no float16 scale and bias; the id is named.
    """
    unknown = rows.isnan().any(dim=1).nonzero()
    if len(unknown):
        raise ValueError(
            f"table {table.name!r}: {dtype} rows must be finite, got NaN in the row of {what} "
            f"{int(ids[int(unknown[0])])}; lower the learning rates"
        )
    found = quantize_rows(rows, dtype)
    scale, bias = found[:, :SCALE_BYTES].contiguous().view(torch.float16).float().unbind(1)
    wrong = (~(torch.isfinite(scale) & torch.isfinite(bias))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"table {table.name!r}: {dtype} rows must have a float16 scale and bias, got values up to "
            f"{float(rows[row].abs().max()):.3g} in the row of {what} {int(ids[row])}; store the "
            "table as codes or dense, or train it smaller"
        )
    # float16 has steps of 2**-24 near zero: there a scale may be off by more than half a value's own step
    levels = _LEVELS[dtype]
    low, high = torch.aminmax(rows, dim=1)
    return found, int(((high > low) & ((high - low) / levels < levels * 2.0**-24)).sum())


def warn_of_rough_rows(
    table: BaseEmbeddingConfig, rough: int, num_rows: int, dtype: Literal["int8", "int4"], what: str = "rows"
) -> None:
    """Log how many of a table's low-bit rows, or of `what` else, are rough, where some are."""
    if rough:
        logger.warning(
            "table %r: %d of %d %s vary by less than %.1g, which a float16 scale cannot tell: %s serves them roughly",
            table.name,
            rough,
            num_rows,
            what,
            _LEVELS[dtype] ** 2 * 2.0**-24,
            dtype,
        )


def check_codebook_dtype(where: str, dtype: str, width: int, unfitted: str) -> None:
    """Raise ValueError where codewords of so many numbers cannot be stored as asked.

    Args:
        where: names the table.
        dtype: of codebooks.
        width: numbers of a codeword.
        unfitted: the method where it is not fitted to rows, else "".
    """
    if dtype not in ("fp32", "int8"):
        raise ValueError(f"{where}: codebook_dtype must be 'fp32' or 'int8', got {dtype!r}")
    if dtype == "int8" and unfitted:
        raise ValueError(
            f"{where}: codebook_dtype must be 'fp32' with {unfitted!r}, which trains its codebooks, got 'int8'"
        )
    if dtype == "int8" and width % 2:
        raise ValueError(
            f"{where}: codewords must have an even number of values in int8, got {width}; choose fewer codes, or "
            "codebook_dtype='fp32'"
        )
