"""Look-ups of codes on the C++ kernels of a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_compress.ops.checks import INDICES
from torchrec_compress.ops.cpp.operators import EagerCodebookBags
from torchrec_compress.ops.types import GATHERED, MEAN, ODD, PACKED, RESIDUAL, BagLookup, IdBags, Span

# what the kernels read; all else goes to FBGEMM or to the reference
CODES = (torch.uint8, torch.int16, torch.int32)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_cpp_input(
    codes: Sequence[Tensor], codebooks: Sequence[Tensor], hot_rows: Sequence[Tensor | None], batch: IdBags
) -> bool:
    """Return whether the C++ kernels read these tensors; their operator checks the rest of them."""
    return (
        codebooks[0].dtype in FLOATS
        and all(books.is_cpu for books in codebooks)
        and all(rows.is_cpu and rows.dtype in CODES and rows.dim() == 2 for rows in codes)
        and all(rows is None or rows.is_cpu for rows in hot_rows)
        and all(index is None or (index.is_cpu and index.dtype in INDICES) for index in (batch.ids, batch.offsets))
        and (batch.weights is None or batch.weights.is_cpu)
    )


def cpp_codebook_bags(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> Tensor:
    """Pool on the C++ kernels; everything is as in `codebook_bags`, of tensors that `is_cpp_input` takes."""
    ids, offsets, weights, is_flat = batch
    # float() leaves a float32 tensor as it is; lower dtypes are summed in float32 from a copy of the codebooks
    rows = [table if table.dtype == torch.uint8 else table.float() for table in hot_rows if table is not None]
    books = [table.float() for table in codebooks]
    is_trained = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*books, *rows, weights)
    )
    plan, saved_bytes = _plan(lookups, spans, codes, hot_rows)
    inputs = (
        list(codes),
        books,
        rows,
        ids,
        offsets,
        weights,
        plan,
        [number for span in spans for number in (span.first_bag, span.num_bags)],
        saved_bytes if is_trained else 0,
        is_flat,
        "\n".join(lookup.where for lookup in lookups),
    )
    if torch.compiler.is_compiling():
        out, _ = torch.ops.torchrec_compress.codebook_bags.default(*inputs)
    elif is_trained:
        out = EagerCodebookBags.apply(inputs, weights, *books, *rows)
    else:
        out, _ = torch.ops.torchrec_compress.codebook_bags_forward.default(*inputs)
    return out.to(codebooks[0].dtype)


def _plan(
    lookups: Sequence[BagLookup], spans: Sequence[Span], codes: Sequence[Tensor], hot_rows: Sequence[Tensor | None]
) -> tuple[list[int], int]:
    """Return four numbers per look-up, see csrc/codebook_bags.cpp, and the bytes of codes kept per id.

    Look-ups of one feature keep their codes side by side.
    """
    numbers, num_hot = [], 0
    for rows in hot_rows:
        numbers.append(-1 if rows is None else num_hot)
        num_hot += rows is not None
    plan: list[int] = []
    taken: dict[str, int] = {}
    widest = 1
    for (table, feature, _, structure, is_mean, num_packed), span, rows in zip(lookups, spans, codes, strict=True):
        flags = RESIDUAL * (structure == "residual") + MEAN * is_mean + GATHERED * span.is_gathered
        if num_packed:
            flags += PACKED + ODD * (num_packed % 2)
        code_bytes = rows.element_size()
        widest = max(widest, code_bytes)
        place = taken.get(feature, 0)
        place += -place % code_bytes
        plan += (table, numbers[table], flags, place)
        if not span.is_gathered:
            taken[feature] = place + (num_packed or rows.shape[1]) * code_bytes
    saved_bytes = max([0, *taken.values()])
    return plan, saved_bytes + -saved_bytes % widest
