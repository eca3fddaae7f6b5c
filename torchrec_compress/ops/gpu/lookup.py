"""The way from `codebook_bags` to the GPU operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_compress.ops.checks import INDICES
from torchrec_compress.ops.gpu.operators import codebook_bags_gpu
from torchrec_compress.ops.types import GATHERED, MEAN, RESIDUAL, BagLookup, IdBags, Span

CODES = (torch.uint8, torch.int16, torch.int32)
WORDS = (torch.float32, torch.bfloat16, torch.float16)


def is_gpu_input(codes: Sequence[Tensor], codebooks: Sequence[Tensor], batch: IdBags) -> bool:
    """Return whether the GPU kernels read these tensors; see `codebook_bags` for the arguments."""
    return (
        all(table.dtype in CODES and table.is_cuda for table in codes)
        and all(books.dtype in WORDS and books.is_cuda for books in codebooks)
        and all(index is None or index.dtype in INDICES for index in (batch.ids, batch.offsets))
    )


def pool_on_gpu(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
    tier: str,
) -> Tensor:
    """Pool all look-ups with the kernels of a tier, "cuda" or "triton"; the rest is as in `codebook_bags`.

    Raises:
        ValueError: shapes do not fit. Values that do not fit, such as a code out of range, end the process's work on
            the GPU with a device-side assertion, as in torch's own kernels.
    """
    ids, offsets, weights, is_flat = batch
    if ids is None and not all(span.is_gathered for span in spans):
        raise ValueError("codebook_bag: ids must be given where codes are not gathered, got None")
    dtype = codebooks[0].dtype
    places, plan = _places(hot_rows), []
    for lookup, span in zip(lookups, spans, strict=True):
        flags = RESIDUAL * (lookup.structure == "residual") + MEAN * lookup.is_mean + GATHERED * span.is_gathered
        plan += [lookup.table, places[lookup.table], flags]
    return codebook_bags_gpu(
        [table.contiguous() for table in codes],
        [books.contiguous() for books in codebooks],
        [rows.to(dtype).contiguous() for rows in hot_rows if rows is not None],
        None if ids is None else ids.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if weights is None else weights.float().contiguous(),
        plan,
        [number for span in spans for number in span[:4]],
        is_flat,
        tier,
    )


def _places(hot_rows: Sequence[Tensor | None]) -> list[int]:
    """Return where each table's hot rows stand among those that there are, or -1."""
    places, count = [], 0
    for rows in hot_rows:
        places.append(-1 if rows is None else count)
        count += rows is not None
    return places
