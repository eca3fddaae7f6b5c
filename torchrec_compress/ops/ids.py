"""Ids: range checks, hashing, and the lookup of an id's codes."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.ops.checks import INDICES, check_index, check_one_device
from torchrec_compress.ops.dispatch import cpp_serves

# Odd 64-bit constants of the splitmix64 finaliser (Steele, Lea, Flood 2014), written as signed integers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def stable_salt(seed: int, name: str) -> int:
    """Return the hash salt of a table: a pure function of (seed, name), equal on every rank and in every process.

    Example:
        >>> stable_salt(0, "user") == stable_salt(0, "user") != stable_salt(0, "item")
        True
    """
    return zlib.crc32(f"{seed}:{name}".encode())


def mix(ids: Tensor, salt: int | Tensor) -> Tensor:
    """Return 62 well-mixed non-negative bits of every id, (L,) int64 -> (L,) int64; the salt may be a (1,) int64."""
    x = ids.long() * _GOLDEN + (salt + 1) * 0x2545F491
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return (x ^ (x >> 31)) & 0x3FFFFFFFFFFFFFFF


def hash_ids(ids: Tensor, num_buckets: int, salt: int | Tensor = 0) -> Tensor:
    """Hash ids into buckets.

    Args:
        ids: (L,) int32 or int64.
        num_buckets: number of buckets.
        salt: picks the hash function, see `stable_salt`; a (1,) int64 where it is a state, which no device waits for.

    Returns:
        (L,) int64 in [0, num_buckets).

    Example:
        >>> hash_ids(torch.arange(1000), 10).bincount(minlength=10).min() > 70
        tensor(True)
    """
    return mix(ids, salt) % num_buckets


def hash_codes(
    ids: Tensor, num_codes: int, codebook_size: int, salt: int | Tensor = 0, first_size: int | None = None
) -> Tensor:
    """Draw the start codes of ids: independent hashes, one per code.

    Args:
        ids: (L,) int32 or int64.
        num_codes: codes per id, M.
        codebook_size: codewords per codebook, K.
        salt: picks the hash functions, as in `hash_ids`.
        first_size: codewords of the first codebook that may be drawn, default K (the rest are escape codes).

    Returns:
        (L, M) int64 in [0, K).

    Example:
        >>> hash_codes(torch.arange(3), num_codes=2, codebook_size=16).shape
        torch.Size([3, 2])
    """
    sizes = [codebook_size if first_size is None else first_size] + [codebook_size] * (num_codes - 1)
    return torch.stack([hash_ids(ids, size, salt + 7919 * m) for m, size in enumerate(sizes)], dim=1)


def check_ids(ids: Tensor, num_embeddings: int, where: str) -> Tensor:
    """Return ids unchanged, or raise when one is out of range.

    On a GPU the check runs asynchronously (`torch._assert_async`), so that it never waits for the device. Inside
    `torch.compile` nothing is checked here: the lookup itself then raises.

    Args:
        ids: (L,) int32 or int64.
        num_embeddings: ids must lie in [0, num_embeddings).
        where: names the table and feature in the error.

    Raises:
        ValueError: ids are not int32 or int64 of one dimension, or one is negative or too large (CPU).

    Example:
        >>> check_ids(torch.tensor([0, 9]), 10, "table 'user'")
        tensor([0, 9])
    """
    check_index("ids", ids, where)
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.device.type == "meta":
        return ids
    low, high = torch.aminmax(ids)
    if ids.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < num_embeddings), f"{where}: an id is out of range")
    elif int(low) < 0 or int(high) >= num_embeddings:
        wrong = int(low) if int(low) < 0 else int(high)
        raise ValueError(
            f"{where}: every id must be in [0, {num_embeddings}), got {wrong}; "
            "map ids to the table's range, or raise num_embeddings"
        )
    return ids


def check_filled(is_set: Tensor, where: str) -> None:
    """Raise when nothing has filled a code table; inside `torch.compile` and on a GPU nothing is checked.

    Args:
        is_set: (1,) uint8, zero while nothing has filled the table.
        where: names the table and feature in the error.

    Raises:
        RuntimeError: the table was never filled; it would serve zeros.

    Example:
        >>> check_filled(torch.ones(1, dtype=torch.uint8), "table 'user'")
    """
    if not torch.compiler.is_compiling() and is_set.device.type == "cpu" and not bool(is_set):
        raise RuntimeError(
            f"{where}: the code table must be filled before it is used, got one that never was; load a checkpoint, "
            "call compress(), or reset_parameters() after materialising from the meta device"
        )


def lookup_codes(codes: Tensor, is_set: Tensor, ids: Tensor, where: str) -> Tensor:
    """Gather the codes of ids.

    Args:
        codes: (N, M) code table, integer.
        is_set: (1,) uint8, zero while nothing has filled the table.
        ids: (L,) int32 or int64 in [0, N).
        where: names the table and feature in errors.

    Returns:
        (L, M), dtype of `codes`.

    Raises:
        ValueError: an id is out of range, or types, devices or shapes do not fit.
        RuntimeError: the table was never filled; it would serve zeros.

    Example:
        >>> table = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
        >>> lookup_codes(table, torch.ones(1, dtype=torch.uint8), torch.tensor([1, 1, 0]), "table 't'").tolist()
        [[3, 4], [3, 4], [1, 2]]
    """
    check_filled(is_set, where)
    _check_codes(codes, ids, where)
    check_ids(ids, codes.shape[0], where)
    return gather_rows(codes, ids)


def code_gather(
    codes: Tensor, ids: Tensor, where: str, row_bytes: int | None = None, backend: str | None = None
) -> Tensor:
    """Gather rows of codes as bytes, for the exchange between ranks; never waits for the device.

    Args:
        codes: (N, M) code table, integer.
        ids: (L,) int32 or int64 in [0, N).
        where: names the table in errors.
        row_bytes: of a row of the result, padded with zeros; None: those of the table.
        backend: see `codebook_bags`.

    Returns:
        (L, row_bytes) uint8.

    Raises:
        ValueError: an id is out of range (CPU), or types, devices or shapes do not fit.

    Example:
        >>> code_gather(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), torch.tensor([1]), "table 't'", 4).tolist()
        [[3, 4, 0, 0]]
    """
    _check_codes(codes, ids, where)
    own_bytes = codes.shape[1] * codes.element_size()
    wanted = own_bytes if row_bytes is None else row_bytes
    if wanted < own_bytes:
        raise ValueError(f"{where}: row_bytes must be at least {own_bytes}, the table's own, got {wanted}")
    if codes.device.type == "cpu" and ids.dtype in INDICES and cpp_serves(backend):
        return torch.ops.torchrec_compress.code_gather(codes, ids, wanted, where)
    check_ids(ids, codes.shape[0], where)
    return F.pad(gather_rows(codes, ids).view(torch.uint8), (0, wanted - own_bytes))


def _check_codes(codes: Tensor, ids: Tensor, where: str) -> None:
    if codes.dim() != 2:
        raise ValueError(f"{where}: codes must have 2 dimensions, got shape {list(codes.shape)}")
    check_index("ids", ids, where)
    check_one_device(where, {"codes": codes, "ids": ids})


# numbers as wide as a row; the complex one is only ever copied
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def gather_rows(codes: Tensor, ids: Tensor) -> Tensor:
    """Gather rows of codes, (N, M) -> (L, M), a row at once where it is as wide as a number.

    On a CPU index_select copies a matrix row by row, about 15 ns each when the row is not cached, but gathers a vector
    with many rows on their way from memory: 5 ns for rows of 8 bytes, 8 ns for 16.
    """
    wide = _WIDE.get(codes.shape[1] * codes.element_size())
    is_plain = codes.device.type != "cpu" or torch.compiler.is_compiling()
    if wide is None or is_plain or not codes.is_contiguous() or codes.storage_offset() % codes.shape[1]:
        return codes.index_select(0, ids)
    return codes.view(wide).view(-1).index_select(0, ids).view(-1, 1).view(codes.dtype)
