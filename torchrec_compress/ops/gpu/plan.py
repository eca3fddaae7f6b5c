"""How large blocks, tiles and grids of the CUDA kernels are. The choices come from a model of the H200, unmeasured."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torchrec_compress.ops.gpu.program import Program, Signature

# how often a block must meet each codeword, in the mean, for its copy in shared memory to pay
STAGING_VISITS = 4.0
# of shared memory that the system keeps per block
_RESERVED = 1024
# bags and ids that a block of the gradient reads at once: so few that three blocks fit on an H200's multiprocessor
_STAGE_BAGS, _STAGE_IDS = 32, 96


@dataclass(frozen=True)
class Device:
    """What of a GPU decides the sizes.

    Args:
        capability: compute capability, for example (9, 0).
        num_sms: multiprocessors.
        block_bytes: shared memory that one block may have.
        sm_bytes: shared memory of a multiprocessor.

    Example:
        >>> Device((9, 0), 132, 232448, 233472).num_sms
        132
    """

    capability: tuple[int, int]
    num_sms: int
    block_bytes: int
    sm_bytes: int


@dataclass(frozen=True)
class PoolPlan:
    """The launch of a kernel of cuda/pool.cuh.

    Args:
        program: what runs.
        grid: blocks per look-up, and groups of columns.
        threads: of a block.
        shared_bytes: of a block.
        tile_bags: bags that a warp takes at once, at most 32.
    """

    program: Program
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    tile_bags: int


@dataclass(frozen=True)
class GradientPlan:
    """The launch of codebook_bag_backward.

    Args:
        program: what runs.
        num_chunks: of bags, each with a partial gradient.
        chunk_bags: bags of a chunk.
        num_pieces: blocks of columns times blocks of codewords.
        threads: of a block.
        shared_bytes: of a block.
    """

    program: Program
    num_chunks: int
    chunk_bags: int
    num_pieces: int
    threads: int
    shared_bytes: int


def _ceil(count: int, step: int) -> int:
    """Round up to a multiple."""
    return -(-count // step) * step


def _vector(signature: Signature, alignment: int, columns: int) -> int:
    """Return the columns that a lane reads at once: 16 bytes at most, within a codeword, and enough for 32 lanes."""
    found = math.gcd(signature.width, alignment // signature.word.itemsize)
    found = found & -found
    while found > 1 and found * 32 > 2 ** (columns - 1).bit_length():
        found //= 2
    return found


def _buffer(signature: Signature) -> tuple[int, int]:
    """Return the ids that a warp reads at once, about 1 KB of codes, and the bytes that it reads them into."""
    batch = max(1, min(32, 2 ** int(math.log2(max(1, 1024 // signature.code_bytes)))))
    return batch, _ceil(batch * signature.code_bytes, 16)


@dataclass(frozen=True)
class _Layout:
    """How the columns of an output are shared out; see cuda/pool.cuh for the names."""

    vector: int
    columns: int
    row: int
    warps: int
    blocks: int
    shared_bytes: int


def _split(signature: Signature, alignment: int, groups: int) -> tuple[int, int]:
    """Return the columns that a lane reads at once and those of a block, if they are cut into groups."""
    columns = -(-signature.dim // groups)
    vector = _vector(signature, alignment, columns)
    return vector, _ceil(columns, vector if groups == 1 else 32 * vector)


@functools.cache
def _direct_layout(signature: Signature, alignment: int, is_forward: bool) -> _Layout:
    """Codewords are read through the caches."""
    groups = 1
    vector, columns = _split(signature, alignment, groups)
    while is_forward and columns > 32 * vector * 8:  # eight sums per lane and column are kept in registers
        groups += 1
        vector, columns = _split(signature, alignment, groups)
    return _Layout(vector, columns, columns, 8, 4, 8 * _buffer(signature)[1])


@functools.cache
def _staged_layout(signature: Signature, alignment: int, device: Device) -> _Layout | None:
    """Codewords are read from shared memory, up to three blocks to a multiprocessor; None where they do not fit."""
    size = signature.word.itemsize
    for groups in range(1, 5):
        vector, columns = _split(signature, alignment, groups)
        row = _ceil(columns * size, 128) // size  # a row starts in the first bank
        for blocks in (3, 2, 1):
            warps = 32 // blocks
            shared = signature.codebook_size * row * size + warps * _buffer(signature)[1]
            fits = shared <= device.block_bytes and blocks * (shared + _RESERVED) <= device.sm_bytes
            if fits and columns <= 32 * vector * 8:
                return _Layout(vector, columns, row, warps, blocks, shared)
    return None


def pool_plan(
    signature: Signature,
    purpose: str,
    device: Device,
    alignment: int,
    code_alignment: int,
    num_lookups: int,
    most_bags: int,
    ids_per_bag: float,
) -> PoolPlan:
    """Choose the launch of the forward or of the gradient of weights.

    Codebooks are staged in shared memory where a block meets each codeword at least `STAGING_VISITS` times; for shorter
    work, such as bags of one id, they are read through the caches.

    Args:
        signature: of the tables.
        purpose: "FORWARD" or "BACKWARD_WEIGHTS".
        device: where it runs.
        alignment: bytes that all codewords, hot rows and output rows start at a multiple of, at most 16.
        code_alignment: the same of code tables.
        num_lookups: that are served at once.
        most_bags: of one look-up.
        ids_per_bag: the mean.
    """

    def blocks_of(layout: _Layout) -> tuple[int, int]:
        groups = -(-signature.dim // layout.columns)
        return max(1, layout.blocks * device.num_sms // (num_lookups * groups)), groups

    is_forward = purpose == "FORWARD"
    staged = _staged_layout(signature, alignment, device) if is_forward and not signature.residual else None
    if staged and most_bags * ids_per_bag / blocks_of(staged)[0] < STAGING_VISITS * signature.codebook_size:
        staged = None
    layout = staged or _direct_layout(signature, alignment, is_forward)
    tile_bags = min(32, max(1, 2 ** round(math.log2(256 / max(1.0, ids_per_bag)))))
    per_lookup, groups = blocks_of(layout)
    per_lookup = min(per_lookup, -(-most_bags // (tile_bags * layout.warps)))
    batch, buffer_bytes = _buffer(signature)
    sizes = {
        "VECTOR": layout.vector,
        "CODE_VECTOR": _code_vector(math.gcd(signature.code_bytes, code_alignment, 16)),
        "WARPS": layout.warps,
        "BLOCKS": layout.blocks,
        "BATCH": batch,
        "BUFFER_BYTES": buffer_bytes,
        "STAGED": int(staged is not None),
        "BLOCK_COLUMNS": layout.columns,
        "STAGED_ROW": layout.row,
    }
    program = Program(purpose, signature, tuple(sizes.items()))
    return PoolPlan(program, (per_lookup, groups), 32 * layout.warps, layout.shared_bytes, tile_bags)


def _code_vector(num_bytes: int) -> str:
    """Return the type that codes are read by."""
    return {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "uint2", 16: "uint4"}[num_bytes]


def gradient_plan(signature: Signature, device: Device, num_lookups: int, most_bags: int) -> GradientPlan:
    """Choose the launch of the gradient of codebooks; the number of chunks, and so the rounding, depends on the GPU.

    Args:
        signature: of the tables.
        device: where it runs.
        num_lookups: that are served at once.
        most_bags: of one look-up.
    """
    num_columns = signature.num_codes * signature.width
    columns = min(64, _ceil(num_columns, 32))
    stage_codes = (columns + signature.width - 2) // signature.width + 1
    rest = 4 * _STAGE_BAGS * columns + 4 * _STAGE_IDS + 8 * (_STAGE_BAGS + 1) + 2 * _STAGE_IDS * stage_codes

    def tile_rows(limit: int) -> int:
        return min(signature.codebook_size, (limit - rest - 8) // (4 * columns) - 1)

    # three blocks to a multiprocessor hide each other's waiting; where a codebook is too large, as few passes as can be
    rows = tile_rows(min(device.block_bytes, device.sm_bytes // 3 - _RESERVED))
    if rows < signature.codebook_size:
        rows = tile_rows(device.block_bytes)
    if rows < 1:
        raise ValueError(f"codebook_bag: {device.block_bytes} bytes of shared memory must hold a codeword, got too few")
    shared = _ceil(4 * (rows + 1) * columns + rest, 8)
    per_sm = max(1, min(3, device.sm_bytes // (shared + _RESERVED)))
    num_pieces = -(-num_columns // columns) * -(-signature.codebook_size // rows)
    wanted = max(1, per_sm * device.num_sms // (num_lookups * num_pieces))
    chunk_bags = _ceil(-(-most_bags // wanted), _STAGE_BAGS)
    sizes = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "STAGE_BAGS": _STAGE_BAGS, "STAGE_IDS": _STAGE_IDS}
    program = Program("BACKWARD", signature, tuple(sizes.items()))
    return GradientPlan(program, -(-most_bags // chunk_bags), chunk_bags, num_pieces, columns, shared)
