"""Integer state: codes and low-bit rows mean nothing once they are averaged, blended or cast, so that has to show."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_compress.ops.ids import mix

# what a code table's flag holds beside the mark of its integers: nothing has filled it; filled, but not summed yet
NOT_FILLED, NOT_SUMMED = 0, 1
# A mark has 20 bits and its top one is set: averages in float32 that are rounded leave it alone, as they leave codes,
# and averages that are cut off do not bring it down to the values above.
_MARK_BITS = 20
_BLOCK_WORDS = 2**15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLED = 64


def checksum(rows: Tensor, first_row: int = 0) -> int:
    """Sum integers, each times a random odd factor of its place; the sums of shards add up to that of the table.

    Args:
        rows: (n, M) integer: rows [first_row, first_row + n) of a table.
        first_row: of the shard in its table.

    Returns:
        The sum modulo 2**64; rows of zeros add nothing.

    Example:
        >>> rows = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
        >>> (checksum(rows[:1]) + checksum(rows[1:], first_row=1)) % 2**64 == checksum(rows)
        True
    """
    size = math.gcd(rows.shape[1] * rows.element_size(), 8)
    words = rows.shape[1] * rows.element_size() // size
    block = max(1, _BLOCK_WORDS // max(words, 1))
    factors = mix(torch.arange(block * words, device=rows.device), 1) | 1
    sums, row = [], 0
    while row < len(rows):
        number, skipped = divmod(first_row + row, block)
        taken = min(block - skipped, len(rows) - row)
        part = rows[row : row + taken].clone(memory_format=torch.contiguous_format).view(_WORDS[size]).view(-1)
        of_block = mix(torch.tensor([number], device=rows.device), 2) | 1
        sums.append((part * factors[skipped * words : (skipped + taken) * words]).sum() * of_block)
        row += taken
    return int(torch.cat(sums).sum()) % 2**64 if sums else 0


def mark_of(total: int) -> int:
    """Return what a code table's flag holds when its integers have this checksum: 2**19 to 2**20 - 1."""
    half = 2 ** (_MARK_BITS - 1)
    return half + (total ^ total >> 19 ^ total >> 38) % half


class _Seen(NamedTuple):
    """A tensor as it was when a value was computed of it; its version counts what has written to it since."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    view: Tensor | None
    sample: Tensor | None
    value: int


_SEEN: dict[int, _Seen] = {}
# by the identity of a flag: the tensors that were last found intact with it, and their versions
_INTACT: dict[int, list[tuple[weakref.ref[Tensor], int]]] = {}


def num_writes(tensor: Tensor) -> int:
    """Return torch's count of what has written to a tensor; that of inference tensors is not known."""
    return -1 if tensor.is_inference() else tensor._version


def _is_unwritten(tensor: Tensor, seen: _Seen) -> bool:
    """Return whether nothing has written to a tensor since it was seen; 64 of its values are compared on a CPU.

    What writes through `.data`, past torch's count of versions, shows in these alone.
    """
    if seen.tensor() is not tensor or seen.version != num_writes(tensor) or seen.address != tensor.data_ptr():
        return False
    return seen.view is None or seen.sample is None or torch.equal(seen.view, seen.sample)


def known(tensor: Tensor, compute: Callable[[Tensor], int]) -> int:
    """Return a value of a tensor that is computed anew only where something has written to it since.

    Args:
        tensor: integer.
        compute: always the same for a tensor.
    """
    key = id(tensor)
    seen = _SEEN.get(key)
    if seen is not None and _is_unwritten(tensor, seen):
        return seen.value
    value, view = compute(tensor), None
    if tensor.is_cpu and tensor.numel() > 1:  # elsewhere a comparison would wait for the device
        values = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()  # of a view, whole rows
        view = values[:: max(1, -(-len(values) // _SAMPLED))]
    sample = None if view is None else view.clone()
    seen = _Seen(weakref.ref(tensor, partial(_forget, key)), num_writes(tensor), tensor.data_ptr(), view, sample, value)
    _SEEN[key] = seen
    return value


def _forget(key: int, ref: weakref.ref[Tensor]) -> None:
    if key in _SEEN and _SEEN[key].tensor is ref:  # not another tensor in the same place
        del _SEEN[key]
        _INTACT.pop(key, None)


def flag_of(is_set: Tensor) -> int:
    """Return the value of a code table's flag; a GPU is waited for only where something has written to it."""
    return known(is_set, int)


def can_check(is_set: Tensor) -> bool:
    """Return whether state may be read: not while a graph is compiled or captured, nor on the meta device."""
    if torch.compiler.is_compiling() or is_set.is_meta:
        return False
    return not (is_set.is_cuda and torch.cuda.is_current_stream_capturing())


def total_of(integers: Sequence[Tensor]) -> int:
    """Return the checksum of a table's whole tensors, see `known`."""
    return sum([known(tensor, checksum) for tensor in integers]) % 2**64


def check_intact(integers: Sequence[Tensor], is_set: Tensor, table: str, is_sampled: bool = True) -> None:
    """Raise where the integers of a table are not those that its flag marks; note the mark where it has none yet.

    Inside `torch.compile`, on the meta device and while a CUDA graph is captured nothing is checked.

    Args:
        integers: (N, M) code table and, where there are some, low-bit rows of it.
        is_set: (1,) int32, the table's flag.
        table: its name, for the error.
        is_sampled: whether values are looked at even where torch counts no write, which takes 5 us for 1.

    Raises:
        ValueError: something other than a fit or a checkpoint has changed the integers.

    Example:
        >>> codes, flag = torch.tensor([[1], [2]], dtype=torch.uint8), torch.ones(1, dtype=torch.int32)
        >>> check_intact([codes], flag, "user")
        >>> codes.copy_(codes * 0.5)
        tensor([[0],
                [1]], dtype=torch.uint8)
        >>> check_intact([codes], flag, "user")
        Traceback (most recent call last):
        ValueError: table 'user': codes and low-bit rows must be those that a fit or a checkpoint gave it, got ...
    """
    if not can_check(is_set):
        return
    held = [is_set, *integers]
    last = () if is_sampled else _INTACT.get(id(is_set), ())
    if len(last) == len(held) and all(
        [ref() is tensor and version == num_writes(tensor) for (ref, version), tensor in zip(last, held, strict=True)]
    ):
        return
    flag = flag_of(is_set)
    if flag == NOT_FILLED:
        return
    mark = mark_of(total_of(integers))
    if flag == NOT_SUMMED:
        with torch.no_grad():
            is_set.fill_(mark)
    elif flag != mark:
        raise ValueError(changed(table))
    _INTACT[id(is_set)] = [(weakref.ref(tensor), num_writes(tensor)) for tensor in held]


def changed(table: str) -> str:
    """Return the error of a table whose integers have another checksum than they had."""
    return (
        f"table {table!r}: codes and low-bit rows must be those that a fit or a checkpoint gave it, got others (their "
        "checksum differs), as an average over models, over steps or a blend of state dicts leaves them; average "
        "parameters only (AveragedModel's default, use_buffers=False, copies buffers as they are) and load the "
        "checkpoint again, or write codes by load_table()"
    )


def keep_integers(fn: Callable[[Tensor], Tensor], where: str) -> Callable[[Tensor], Tensor]:
    """Return a function for `nn.Module._apply` that refuses to change the dtype of integers.

    Example:
        >>> keep_integers(lambda tensor: tensor.half(), "decoder")(torch.ones(1, dtype=torch.uint8))
        Traceback (most recent call last):
        ValueError: decoder: integers must keep their dtype, torch.uint8, got a cast to torch.float16; ...
    """

    def kept(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        if new.dtype != tensor.dtype and not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{where}: integers must keep their dtype, {tensor.dtype}, got a cast to {new.dtype}; use .half(), "
                ".bfloat16(), .double() or .to(dtype), which cast floating-point tensors alone"
            )
        return new

    return kept
