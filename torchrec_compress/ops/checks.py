"""What `codebook_bags` is given, checked in Python for the tiers whose operators do not: those of FBGEMM and torch.

Shapes and types alone: values are looked at where they are followed, ids and offsets before a kernel, codes by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_compress.ops.codebooks import num_escape_codes, packed_width
from torchrec_compress.ops.types import BagLookup, IdBags, Span

INDICES = (torch.int32, torch.int64)
_ROWS_AT_ONCE = 65536


def check_one_device(where: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device: a kernel follows addresses, wherever they lead.

    A tensor on the meta device has none, and torch takes a call with one for a question about shapes: its answer is
    memory that nobody has written.

    Args:
        where: names the look-up in the error.
        tensors: by name; None is left out.

    Example:
        >>> check_one_device("table 'user'", {"ids": torch.ones(1), "weights": None})
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{where}: all tensors must be on one device, got {found}; move them to one")


def first_infinite(values: Tensor, dtype: torch.dtype) -> tuple[int, float] | None:
    """Return the first row that would be infinite in a dtype, and its largest value that is finite yet; or None.

    Args:
        values: (L, D) floating point.
        dtype: floating point.

    Example:
        >>> first_infinite(torch.tensor([[65504.0], [65519.0], [-7e4]]), torch.float16)
        (2, 70000.0)
    """
    if not values.numel() or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return None
    for start, block in zip(range(0, len(values), _ROWS_AT_ONCE), values.split(_ROWS_AT_ONCE), strict=True):
        lost = (block.to(dtype).isinf() & block.isfinite()).any(dim=1)
        if bool(lost.any()):
            first = int(lost.nonzero()[0])
            row = block[first]
            return start + first, float(row[row.isfinite()].abs().max())
    return None


def first_not_finite(values: Tensor) -> int | None:
    """Return the first row that holds NaN or infinity, or None.

    Args:
        values: (L, ...) floating point.

    Example:
        >>> first_not_finite(torch.tensor([[1.0], [float("nan")], [float("inf")]]))
        1
    """
    if not values.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):  # no copy of a table
        return None
    return int((~torch.isfinite(values).reshape(len(values), -1).all(dim=1)).nonzero()[0])


def check_index(name: str, index: Tensor, where: str) -> None:
    """Raise ValueError unless ids or offsets are of a type that kernels read.

    Args:
        name: of the tensor.
        index: of any type and shape.
        where: names the look-up in the error.

    Example:
        >>> check_index("ids", torch.tensor([3]), "table 'user'")
    """
    if index.dtype not in INDICES or index.dim() != 1:
        raise ValueError(f"{where}: {name} must be int32 or int64 with 1 dimension, got {_kind(index)}")


def check_weight_count(weights: Tensor, num_ids: int, where: str) -> None:
    """Raise ValueError unless there is one weight per id: a single one would be repeated for all of them.

    Inside `torch.compile` only the dimensions are checked.

    Args:
        weights: of any shape.
        num_ids: L.
        where: names the look-up in the error.

    Example:
        >>> check_weight_count(torch.ones(2), 2, "table 'user'")
    """
    if weights.dim() != 1 or (not torch.compiler.is_compiling() and weights.shape[0] != num_ids):
        raise ValueError(
            f"{where}: weights must be one per id, {num_ids}, got shape {list(weights.shape)}; give one per id"
        )


def check_inputs(
    lookups: Sequence[BagLookup],
    spans: Sequence[Span],
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    hot_rows: Sequence[Tensor | None],
    batch: IdBags,
) -> None:
    """Raise ValueError where types, devices or shapes do not fit; arguments as in `codebook_bags`.

    Inside `torch.compile` sizes of the batch are not compared: they would become bounds on later batches.
    """
    check_one_device(
        "codebook_bag",
        {
            **{f"codes of look-up {number}": rows for number, rows in enumerate(codes)},
            **{f"codebooks {number}": books for number, books in enumerate(codebooks)},
            **{f"hot_rows {number}": rows for number, rows in enumerate(hot_rows)},
            **{"ids": batch.ids, "offsets": batch.offsets, "weights": batch.weights},
        },
    )
    for name, index in (("ids", batch.ids), ("offsets", batch.offsets)):
        if index is not None:
            check_index(name, index, "codebook_bag")
    for lookup, rows in zip(lookups, codes, strict=True):
        books = codebooks[lookup.table]
        num_codes = _check_codes(lookup, rows, books)
        hot = hot_rows[lookup.table]
        if hot is not None:
            _check_hot_rows(lookup, num_codes, books, hot)
    if not torch.compiler.is_compiling():
        _check_lengths(spans, codes, batch)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def _check_codes(lookup: BagLookup, codes: Tensor, books: Tensor) -> int:
    """Check codes and codebooks of a look-up, and return its codes per id."""
    is_integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
    if not is_integer or codes.dim() != 2 or codes.shape[1] < 1:
        raise ValueError(
            f"codebook_bag: codes must be integers of shape (rows, M), M at least 1, got {_kind(codes)}; give them as "
            "the fit made them"
        )
    if not books.is_floating_point() or books.dim() != 2:
        raise ValueError(f"codebook_bag: codebooks must be floating point with 2 dimensions, got {_kind(books)}")
    num_codes = lookup.num_packed or codes.shape[1]
    if books.shape[0] == 0 or books.shape[0] % num_codes:
        raise ValueError(
            "codebook_bag: codebooks must hold the same number of codewords, at least one, for each of "
            f"{num_codes} codes, got {books.shape[0]} in all"
        )
    if lookup.num_packed and (codes.dtype != torch.uint8 or codes.shape[1] != packed_width(num_codes)):
        raise ValueError(
            f"codebook_bag: packed codes must be uint8, {packed_width(num_codes)} for {num_codes} codes, got "
            f"{_kind(codes)}"
        )
    if lookup.num_packed and books.shape[0] // num_codes > 16:
        raise ValueError(
            f"codebook_bag: packed codes must be of at most 16 codewords, got {books.shape[0] // num_codes}"
        )
    return num_codes


def _check_hot_rows(lookup: BagLookup, num_codes: int, books: Tensor, rows: Tensor) -> None:
    """Check the hot rows of a look-up; the width of low-bit ones when they become floats."""
    if rows.dim() != 2 or not (rows.is_floating_point() or rows.dtype == torch.uint8):
        raise ValueError(f"codebook_bag: hot_rows must be floating point or uint8 with 2 dimensions, got {_kind(rows)}")
    dim = books.shape[1] * (num_codes if lookup.structure == "product" else 1)
    if rows.is_floating_point() and rows.shape[1] != dim:
        raise ValueError(f"codebook_bag: hot_rows must be {dim} wide, got {rows.shape[1]}")
    size = books.shape[0] // num_codes
    if not torch.compiler.is_compiling() and num_escape_codes(rows.shape[0], num_codes, size) > size:
        raise ValueError(
            "codebook_bag: hot_rows must be at most what the first codebook's escapes reach, got "
            f"{rows.shape[0]} with {num_codes} codes of {size}"
        )


def _check_lengths(spans: Sequence[Span], codes: Sequence[Tensor], batch: IdBags) -> None:
    """Check that there are ids, bags, weights and gathered codes as far as the look-ups reach."""
    last = max([0, *(span.first_id + span.num_ids for span in spans)])
    num_ids = last if batch.ids is None else batch.ids.shape[0]
    if last > num_ids:
        raise ValueError(f"codebook_bag: ids must be at least {last}, got {num_ids}; mend the spans")
    if batch.weights is not None:
        check_weight_count(batch.weights, num_ids, "codebook_bag")
    for span, rows in zip(spans, codes, strict=True):
        if not span.is_gathered and batch.ids is None:
            raise ValueError("codebook_bag: ids must be given with a code table, got none")
        if span.is_gathered and rows.shape[0] != span.num_ids:
            raise ValueError(
                f"codebook_bag: gathered codes must be one row per id, {span.num_ids}, got {rows.shape[0]}"
            )
        num_bags = span.num_ids if batch.offsets is None else batch.offsets.shape[0] - 1 - span.first_bag
        if num_bags < span.num_bags:
            raise ValueError(f"codebook_bag: there must be {span.num_bags} bags, got {num_bags}; mend the offsets")
