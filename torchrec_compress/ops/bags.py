"""The look-up of codes in codebooks, pooled into bags."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.ops.codebooks import Structure
from torchrec_compress.ops.dispatch import cpp_serves
from torchrec_compress.ops.reference import reference_codebook_bag

# what the C++ kernels read; all else goes to the reference
CPP_CODES = (torch.uint8, torch.int16)


def codebook_bag(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    *,
    structure: Structure = "product",
    weights: Tensor | None = None,
    hot_rows: Tensor | None = None,
) -> Tensor:
    """Sum, bag by bag, the rows that codes stand for.

    Nothing of size (L, D) is made, forward or backward. uint8 and int16 codes with float32 codebooks on a CPU are
    served by the C++ kernels, if they can be built here (see `tiers`), with the same bits for any number of threads;
    everything else by the reference in PyTorch.

    Args:
        codes: (L, M) integer, each in [0, K).
        codebooks: (M * K, D / M) for "product" (a row is the M codewords side by side) or (M * K, D) for "residual"
            (a row is their sum); floating point.
        offsets: (B + 1,) int32 or int64, from 0 up to L; bag b is codes[offsets[b]:offsets[b+1]]. None: every id is a
            bag of its own.
        structure: "product" or "residual".
        weights: (L,) per-id factors, or None.
        hot_rows: (H, D) rows reached by escape codes (see `hot_row_codes`), or None.

    Returns:
        (B, D), dtype of `codebooks`; an empty bag is zeros. Differentiable in codebooks, hot_rows and weights.

    Raises:
        ValueError: offsets decrease or do not run from 0 to L (CPU), or, from the kernels, a code is out of range or
            shapes do not fit.
        RuntimeError: from the reference: a code points behind the last codebook. Other codes out of range are not
            looked for there: each look-up would pay for it.

    Example:
        >>> codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
        >>> codebook_bag(codes, torch.arange(4.0).view(4, 1), torch.tensor([0, 2, 3])).tolist()
        [[1.0, 5.0], [1.0, 3.0]]
    """
    is_kernel_input = codebooks.device.type == "cpu" and codebooks.dtype == torch.float32 and codes.dtype in CPP_CODES
    if not is_kernel_input or not cpp_serves():
        return reference_codebook_bag(codes, codebooks, offsets, structure, weights, hot_rows)
    return torch.ops.torchrec_compress.codebook_bag(
        codes.contiguous(),
        codebooks.contiguous(),
        None if offsets is None else offsets.long().contiguous(),
        None if weights is None else weights.float().contiguous(),
        None if hot_rows is None else hot_rows.float().contiguous(),
        structure == "residual",
    )
