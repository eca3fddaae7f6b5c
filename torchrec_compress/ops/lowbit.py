"""Row-wise low-bit rows as FBGEMM's inference tables hold them: float16 scale and bias of a row, then its values.

They are the bytes that TorchRec's quantised tables (`torchrec.quant`) serve on a CPU, for int8 and int4 alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowDtype = Literal["fp32", "int8", "int4"]
SCALE_BYTES = 4  # of scale and bias
_BITS = {"int8": 8, "int4": 4}


def quantized_row_bytes(embedding_dim: int, dtype: RowDtype) -> int:
    """Return the bytes that one row of `embedding_dim` values takes.

    Example:
        >>> [quantized_row_bytes(64, dtype) for dtype in ("fp32", "int8", "int4")]
        [256, 68, 36]
    """
    if dtype == "fp32":
        return embedding_dim * 4
    return embedding_dim * _BITS[dtype] // 8 + SCALE_BYTES


def low_bit_width(rows: Tensor, dtype: Literal["int8", "int4"]) -> int:
    """Return the values, D, of each of these rows, (N, bytes per row).

    Raises:
        ValueError: they are not rows of `quantize_rows`.

    Example:
        >>> low_bit_width(torch.zeros(1, 36, dtype=torch.uint8), "int4")
        64
    """
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] <= SCALE_BYTES:
        raise ValueError(
            f"low-bit rows: must be uint8 of shape (rows, more than {SCALE_BYTES}), got {rows.dtype} of shape "
            f"{list(rows.shape)}; make them by quantize_rows"
        )
    return (rows.shape[1] - SCALE_BYTES) * 8 // _BITS[dtype]


def low_bit_dtype(row_bytes: int, embedding_dim: int) -> Literal["int8", "int4"]:
    """Return what rows are quantised to that take `row_bytes` each.

    Raises:
        ValueError: no row of `embedding_dim` values takes so many bytes.

    Example:
        >>> low_bit_dtype(68, 64), low_bit_dtype(36, 64)
        ('int8', 'int4')
    """
    found: dict[int, Literal["int8", "int4"]] = {
        quantized_row_bytes(embedding_dim, "int4"): "int4",
        quantized_row_bytes(embedding_dim, "int8"): "int8",
    }
    if row_bytes not in found:
        raise ValueError(
            f"low-bit rows: rows of {embedding_dim} values must take {' or '.join(map(str, found))} bytes, got "
            f"{row_bytes}; make them by quantize_rows"
        )
    return found[row_bytes]


def quantize_rows(rows: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Quantise rows, each with its own scale and bias.

    Args:
        rows: (N, D) floating point, quantised from float32; D a multiple of 2 for int8 and of 4 for int4.
        dtype: "int8" or "int4".

    Returns:
        (N, D + 4) uint8 for int8, (N, D / 2 + 4) uint8 for int4.

    Raises:
        ValueError: rows are of another type or shape.

    Example:
        >>> quantize_rows(torch.randn(3, 64), "int4").shape
        torch.Size([3, 36])
    """
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    multiple = 16 // _BITS[dtype]
    if not rows.is_floating_point() or rows.dim() != 2 or rows.shape[1] == 0 or rows.shape[1] % multiple:
        raise ValueError(
            f"quantize_rows: rows must be floating point of shape (rows, a multiple of {multiple}) for {dtype}, got "
            f"{rows.dtype} of shape {list(rows.shape)}"
        )
    # the kernel takes any tensor for float32 in one piece
    plain = rows.float().contiguous()
    # the fused format has scale and bias behind the values
    return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(plain, _BITS[dtype]).roll(SCALE_BYTES, dims=1)


def dequantize_rows(rows: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Invert `quantize_rows`.

    Args:
        rows: (L, bytes per row) uint8.
        dtype: "int8" or "int4".

    Returns:
        (L, D) float32.

    Raises:
        ValueError: rows are not those of `quantize_rows`.

    Example:
        >>> x = torch.linspace(-1, 1, 64).view(1, 64)
        >>> (dequantize_rows(quantize_rows(x, "int8"), "int8") - x).abs().max() < 0.005
        tensor(True)
    """
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    low_bit_width(rows, dtype)
    # roll() copies, so that the kernel reads one piece of memory
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows.roll(-SCALE_BYTES, dims=1), _BITS[dtype])
