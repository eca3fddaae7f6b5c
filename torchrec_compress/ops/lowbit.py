"""Row-wise low-bit rows in FBGEMM's own format: the quantised values of a row, then its scale and bias.

It is the format of TorchRec's quantised tables (`torchrec.quant`): int8 rows end in a float32 scale and bias (8 bytes),
int4 rows in a float16 scale and bias (4 bytes).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowDtype = Literal["fp32", "int8", "int4"]


def quantized_row_bytes(embedding_dim: int, dtype: RowDtype) -> int:
    """Return the bytes that one row of `embedding_dim` values takes.

    Example:
        >>> [quantized_row_bytes(64, dtype) for dtype in ("fp32", "int8", "int4")]
        [256, 72, 36]
    """
    return {"fp32": embedding_dim * 4, "int8": embedding_dim + 8, "int4": embedding_dim // 2 + 4}[dtype]


def quantize_rows(rows: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Quantise rows, each with its own scale and bias.

    Args:
        rows: (N, D) float32, D a multiple of 4 for int4.
        dtype: "int8" or "int4".

    Returns:
        (N, D + 8) uint8 for int8, (N, D / 2 + 4) uint8 for int4.

    Example:
        >>> quantize_rows(torch.randn(3, 64), "int4").shape
        torch.Size([3, 36])
    """
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    if dtype == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows)
    return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)


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

    if dtype == "int8":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4)
