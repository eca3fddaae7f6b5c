"""The checks that every fit makes of its input, in one place, so that every message reads the same."""

from numbers import Integral

import torch
from torch import Tensor

_BLOCK = 2**18  # numbers that are looked at together


def check_rows(where: str, rows: Tensor) -> None:
    """Refuse rows that no fit can use.

    Args:
        where: name of the caller, the first word of the message.
        rows: [N, D] float32.

    Raises:
        ValueError: not two-dimensional, not float32, empty, or a value is NaN or infinite.

    Example:
        >>> check_rows("example", torch.zeros(3, 2))
    """
    if rows.dim() != 2 or rows.dtype != torch.float32 or rows.numel() == 0:
        raise ValueError(
            f"{where}: rows must be a non-empty float32 tensor [N, D], got {rows.dtype} {list(rows.shape)}; "
            "convert with .float()"
        )
    # A sum is finite iff every term is, up to overflow; the exact test runs only where the cheap one fails.
    if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
        first = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(f"{where}: rows must be finite, got NaN or infinity in row {first}; repair or drop that row")


def check_weights(where: str, weights: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    """Return the weights of the rows as float32 [N]; None means one for every row.

    Args:
        where: name of the caller, the first word of the message.
        weights: [N] of any real dtype, >= 0, or None.
        num_rows: N.
        device: device of the rows.

    Raises:
        ValueError: wrong shape, a NaN, infinite or negative weight, or no weight above zero.

    Example:
        >>> check_weights("example", None, 2, torch.device("cpu"))
        tensor([1., 1.])
    """
    if weights is None:
        return torch.ones(num_rows, device=device)
    if tuple(weights.shape) != (num_rows,):
        raise ValueError(f"{where}: weights must have shape [{num_rows}], one per row, got {list(weights.shape)}")
    weights = weights.to(device=device, dtype=torch.float32)
    first = first_wrong(weights)
    if first is not None:
        raise ValueError(f"{where}: weights must be finite and >= 0, got {float(weights[first])} for row {first}")
    if not (weights > 0).any():
        raise ValueError(
            f"{where}: at least one weight must be above 0, got all zeros; pass weights=None to weigh rows alike"
        )
    return weights


def first_wrong(values: Tensor) -> int | None:
    """Return the place of the first of many numbers that is NaN, infinite or negative, or None; looked at in blocks.

    Args:
        values: [N] of any real dtype.

    Example:
        >>> first_wrong(torch.tensor([1.0, -2.0, float("nan")]))
        1
    """
    for first in range(0, len(values), _BLOCK):
        block = values[first : first + _BLOCK]
        wrong = ~(torch.isfinite(block) & (block >= 0))
        if wrong.any():
            return first + int(wrong.nonzero()[0])
    return None


def check_sizes(where: str, num_rows: int, num_codes: int, codebook_size: int, first_size: int | None) -> int:
    """Check M, K and first_size against the table; return the first codebook's size.

    Args:
        where: name of the caller, the first word of the message.
        num_rows: N.
        num_codes: M.
        codebook_size: K, at most 65,536 (codes are stored in at most two bytes).
        first_size: codewords the first codebook may use, in [1, K]; None means K.

    Raises:
        ValueError: a size is out of its range, or K is larger than the rows.

    Example:
        >>> check_sizes("example", num_rows=1000, num_codes=2, codebook_size=256, first_size=255)
        255
    """
    if num_codes < 1:
        raise ValueError(f"{where}: num_codes must be at least 1, got {num_codes}")
    if not 1 <= codebook_size <= 65536:
        raise ValueError(f"{where}: codebook_size must be in [1, 65536], got {codebook_size}")
    if codebook_size > num_rows:
        raise ValueError(
            f"{where}: codebook_size must be at most the number of rows, got K = {codebook_size} larger than the rows "
            f"({num_rows}); lower codebook_size, or keep so small a table dense"
        )
    if first_size is None:
        return codebook_size
    if not 1 <= first_size <= codebook_size:
        raise ValueError(f"{where}: first_size must be in [1, codebook_size = {codebook_size}], got {first_size}")
    return first_size


def check_seed(where: str, seed: object) -> int:
    """Return a seed that every generator of random numbers takes.

    Args:
        where: name of the caller, the first word of the message.
        seed: an int in [0, 2**63).

    Raises:
        ValueError: no integer, negative or too large.

    Example:
        >>> check_seed("example", 7)
        7
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ValueError(f"{where}: seed must be an int in [0, 2**63), got {seed!r}")
    return int(seed)


_COUNTS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def check_counts(where: str, counts: object, num_rows: int) -> Tensor:
    """Return look-ups per id on the CPU.

    Args:
        where: the table, the first word of the message.
        counts: [N] integer or floating point, finite and >= 0.
        num_rows: N.

    Raises:
        ValueError: no tensor, another shape or dtype, a count is NaN, infinite or negative, or they are shares.

    Example:
        >>> check_counts("table 'user'", torch.tensor([0, 3]), 2)
        tensor([0, 3])
    """
    if not isinstance(counts, Tensor) or tuple(counts.shape) != (num_rows,) or counts.is_meta:
        got = f"{tuple(counts.shape)} on {counts.device}" if isinstance(counts, Tensor) else repr(type(counts).__name__)
        raise ValueError(f"{where}: counts must be a tensor of shape ({num_rows},), one per id, got {got}")
    if counts.layout != torch.strided or counts.dtype not in _COUNTS:
        raise ValueError(
            f"{where}: counts must be look-ups per id, integers or floats, got {counts.dtype} ({counts.layout})"
        )
    counts = counts.detach().cpu()
    first = first_wrong(counts)
    if first is not None:
        raise ValueError(f"{where}: counts must be finite and >= 0, got {counts[first].item()} for id {first}")
    most = float(counts.max()) if num_rows else 0.0
    if most > 2**53 or 0 < most < 1:
        raise ValueError(
            f"{where}: counts must be look-ups per id, the most of them from 1 to 2**53, got {most}; multiply shares "
            "by the number of look-ups"
        )
    return counts


def check_contexts(where: str, contexts: object, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return pairs of ids and context ids on the CPU.

    Args:
        where: the table, the first word of the message.
        contexts: ([P], [P]) integer: ids in [0, N), context ids >= 0.
        num_rows: N.

    Raises:
        ValueError: no pair of integer vectors of one length above 0, or an id is out of range.

    Example:
        >>> check_contexts("table 'user'", (torch.tensor([1]), torch.tensor([7])), 2)
        (tensor([1]), tensor([7]))
    """
    is_pair = isinstance(contexts, tuple | list) and len(contexts) == 2
    if not is_pair or not all(isinstance(part, Tensor) and part.dim() == 1 for part in contexts):  # type: ignore[union-attr]
        raise ValueError(f"{where}: contexts must be two vectors, (ids, context ids), got {_shapes(contexts)}")
    ids, others = contexts  # type: ignore[misc]
    if len(ids) != len(others) or len(ids) == 0 or ids.is_meta or others.is_meta:
        raise ValueError(f"{where}: contexts must be vectors of one length above 0, got {_shapes(contexts)}")
    for what, part in (("ids", ids), ("context ids", others)):
        if part.dtype.is_floating_point or part.dtype == torch.bool or part.is_complex():
            raise ValueError(f"{where}: contexts' {what} must be integers, got {part.dtype}")
    ids, others = ids.cpu().long(), others.cpu().long()
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= num_rows:
        raise ValueError(
            f"{where}: contexts' ids must be in [0, {num_rows}), got {int(low) if int(low) < 0 else int(high)}"
        )
    if int(others.min()) < 0:
        raise ValueError(f"{where}: contexts' context ids must be >= 0, got {int(others.min())}")
    return ids, others


def _shapes(parts: object) -> str:
    if isinstance(parts, tuple | list):
        return str([tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts])
    return type(parts).__name__
