"""Row-wise low-bit rows in FBGEMM's own format: the quantised values of a row, then its float16 scale and bias.

They are the bits that TorchRec's quantised tables (`torchrec.quant`) serve, for int8 and int4 alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowDtype = Literal["fp32", "int8", "int4"]
_BITS = {"int8": 8, "int4": 4}


def quantized_row_bytes(embedding_dim: int, dtype: RowDtype) -> int:
    """Return the bytes that one row of `embedding_dim` values takes.

    Example:
        >>> [quantized_row_bytes(64, dtype) for dtype in ("fp32", "int8", "int4")]
        [256, 68, 36]
    """
    return {"fp32": embedding_dim * 4, "int8": embedding_dim + 4, "int4": embedding_dim // 2 + 4}[dtype]


def quantize_rows(rows: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Quantise rows, each with its own scale and bias.

    Args:
        rows: (N, D) float32, D a multiple of 2 for int8 and of 4 for int4.
        dtype: "int8" or "int4".

    Returns:
        (N, D + 4) uint8 for int8, (N, D / 2 + 4) uint8 for int4.

    Example:
        >>> quantize_rows(torch.randn(3, 64), "int4").shape
        torch.Size([3, 36])
    """
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, _BITS[dtype])


def dequantize_rows(rows: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Invert `quantize_rows`.

    Args:
        rows: (L, bytes per row) uint8.
        dtype: "int8" or "int4".

    Returns:
        (L, D) float32.

    Example:
        >>> x = torch.linspace(-1, 1, 64).view(1, 64)
        >>> (dequantize_rows(quantize_rows(x, "int8"), "int8") - x).abs().max() < 0.005
        tensor(True)
    """
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, _BITS[dtype])
