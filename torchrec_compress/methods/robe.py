"""ROBE: blocks of rows, hashed into one array that all tables share (arXiv 2108.02191)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.methods.base import (
    BagDecoder,
    MethodConfig,
    TableData,
    TableDecoder,
    TableState,
    register,
    spread,
)
from torchrec_compress.methods.buckets import BucketSums
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.qr import SideBySide
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.methods.width import LANES
from torchrec_compress.ops import Rows, TableRows, gathered, mix, pool_rows, pool_table, scale_rows, stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class RobeConfig(MethodConfig):
    """Store `num_blocks` blocks of Z numbers for all tables; a row is D / Z of them, each picked by a hash.

    The array is one native table of a collection, whatever tables it serves: planned, sharded and counted once. Nothing
    is stored per id. Blocks begin at multiples of Z, where the paper's begin anywhere in the array, so that they are
    rows that FBGEMM reads; with Z = D it is the hash trick, over all tables.

    Without signs a row is blocks side by side, which commutes with pooling: bags travel. With signs every block of an
    id is multiplied by a hash of 1 or -1, so that what two ids share need not push both the same way; blocks then come
    back unpooled.

    Bytes: 4 Z times the blocks, once for all tables that share them.

    Args:
        num_blocks: that all tables share.
        block_size: numbers of a block, Z; a multiple of 4 that divides the embedding's width.
        memory: name of the array; tables that give one name share it, and agree in both sizes, in signs and, without
            them, in pooling. None: the table's own. No fit of one table fills an array that others read.
        signs: whether blocks are multiplied by hashed signs.
        bound: the array starts uniform in [-bound, bound], whatever its tables say of their start. None: as TorchRec
            starts a table of its size; then tables must not say how they start.

    Example:
        >>> RobeConfig(num_blocks=1000, block_size=16).to_dict()
        {'method': 'robe', 'num_blocks': 1000, 'block_size': 16, 'memory': 'robe', 'signs': False, 'bound': None}
    """

    method: ClassVar[str] = "robe"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "blocks that others trained"
    num_blocks: int
    block_size: int
    memory: str | None = "robe"
    signs: bool = False
    bound: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a name that is no text."""
        super().__post_init__()
        if not isinstance(self.memory, str | None):
            raise ValueError(f"robe: memory must be a name or None, got {self.memory!r}")

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless rows are blocks, and name the nearest size of one."""
        super().check(table)
        where, width = f"table {table.name!r}", table.embedding_dim
        if self.num_blocks < 1:
            raise ValueError(f"{where}: num_blocks must be at least 1, got {self.num_blocks}")
        most = 65504.0 if table.data_type == DataType.FP16 else 1e18
        if self.bound is not None and not 0 < self.bound <= most:
            raise ValueError(
                f"{where}: bound must be in (0, {most:g}], got {self.bound:g}; leave it out for TorchRec's own"
            )
        sizes = [size for size in range(LANES, width + 1, LANES) if width % size == 0]
        if self.block_size not in sizes:
            nearest = min(sizes, key=lambda size: abs(size - self.block_size), default=None)
            advice = f"the nearest is {nearest}" if sizes else "there is none; leave the table dense"
            raise ValueError(
                f"{where}: block_size must be a multiple of {LANES} that divides embedding_dim = {width}, got "
                f"{self.block_size}; {advice}"
            )

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of blocks."""
        return (
            replace(self, num_blocks=number)
            for number in spread(table.num_embeddings * table.embedding_dim // max(1, self.block_size))
        )

    def smaller(self, level: int) -> RobeConfig:
        """Return half the blocks, a quarter, and so on, of an array of its own: others would not want theirs halved."""
        return replace(self, num_blocks=max(1, self.num_blocks >> (level + 1)), memory=None)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return a way into the array for every block of a row."""
        shared = f"{table.name}__memory" if self.memory is None else self.memory
        size, kind = (self.num_blocks, self.block_size), native_type(table)
        start = None if self.bound is None else _Uniform(self.bound)
        blocks = tuple(
            NativePart(f"block_{number}", *size, remap, start, data_type=kind, shared=shared)
            for number, remap in enumerate(self._hashes(table, seed))
        )
        return Parts(rows=blocks) if self.signs else Parts(bags=blocks)

    def _hashes(self, table: BaseEmbeddingConfig, seed: int) -> list[Remap]:
        names = [f"{table.name}:{number}" for number in range(table.embedding_dim // self.block_size)]
        return [Remap("hash", self.num_blocks, stable_salt(seed, name)) for name in names]

    def sign_salts(self, table: BaseEmbeddingConfig) -> list[int]:
        """Return the salt of the sign of every block of a row, or nothing without signs; no seed changes it."""
        count = table.embedding_dim // self.block_size if self.signs else 0
        return [stable_salt(0, f"{table.name}:sign {number}") for number in range(count)]

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> BagDecoder | TableDecoder:
        """Return what lays blocks side by side."""
        return SignedBlocks(self.sign_salts(table)) if self.signs else SideBySide()

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> BlockTable:
        """Learn nothing: a block is the mean of what is hashed to it."""
        self.check_fit(table, data)
        return BlockTable(self, table, self._hashes(table, data.seed), data.counts)


@dataclass(frozen=True)
class _Uniform:
    """Initialise blocks in place; a value, so that tables that share them agree."""

    bound: float

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.uniform_(weight, -self.bound, self.bound)


class BlockTable(Learned):
    """Fill every block with the count-weighted mean of the pieces of rows that it stands for.

    Args:
        config: the method.
        table: the user's config.
        hashes: ids to blocks, of every piece of a row.
        counts: (N,) look-ups per id, or None for equal weights.
    """

    def __init__(
        self, config: RobeConfig, table: BaseEmbeddingConfig, hashes: list[Remap], counts: Tensor | None
    ) -> None:
        super().__init__(table)
        self._hashes, self._salts, self._counts = hashes, config.sign_salts(table), counts
        self._blocks, self._size = BucketSums(config.num_blocks, config.block_size), config.block_size

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        pieces = list(rows.split(self._size, dim=1))
        if self._salts:
            signs = signs_of(ids, self._salts)
            pieces = [piece * signs[:, number, None] for number, piece in enumerate(pieces)]
        for piece, remap in zip(pieces, self._hashes, strict=True):
            self._blocks.add(piece, remap(ids), None if self._counts is None else self._counts[ids])

    def _sums(self) -> list[Tensor]:
        """Return the sums of the blocks."""
        return self._blocks.sums()

    def _finish(self) -> TableState:
        """Return the blocks, by every way into them."""
        blocks = self._blocks.means()
        return TableState(native={f"block_{number}": blocks for number in range(len(self._hashes))})


def signs_of(ids: Tensor, salts: list[int]) -> Tensor:
    """Return the hashed signs of ids, (L,) -> (L, number of salts) float32, 1 or -1."""
    return torch.stack([(mix(ids, salt) & 1) * 2 - 1 for salt in salts], dim=1).float()


class SignedBlocks(TableDecoder):
    """Lay blocks side by side, each times its sign, and pool.

    Args:
        salts: of the sign of every block of a row.
    """

    def __init__(self, salts: list[int]) -> None:
        super().__init__()
        self._salts = salts

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are (L, Z) each."""
        return pool_signed(ids, offsets, weights, rows, self._salts)


@torch.fx.wrap
def pool_signed(
    ids: Tensor, offsets: Tensor | None, weights: Tensor | None, rows: list[Rows], salts: list[int]
) -> Tensor:
    """Return the sums over bags, (B, D); arguments as in `SignedBlocks`."""
    signs = signs_of(ids, salts)
    tables = [found for found in rows if isinstance(found, TableRows)]
    if offsets is not None and len(tables) == len(rows):  # pooled where they lie
        factors = signs if weights is None else scale_rows(signs, weights, "robe")
        return torch.cat([pool_table(table, offsets, factors[:, j]) for j, table in enumerate(tables)], dim=1)
    blocks = [block * signs[:, j, None] for j, block in enumerate(gathered(rows))]
    return pool_rows(torch.cat(blocks, dim=1), offsets, weights)
