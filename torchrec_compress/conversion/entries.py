"""Tensors of a checkpoint, of which rows are read where they lie: no whole table is ever in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

COPY_BYTES = 16 << 20  # that are copied at once


class Entry(ABC):
    """A tensor that lies in a file.

    Attributes:
        shape, dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def span(self) -> tuple[int, int] | None:
        """Where the first byte lies, and the one after the last; None where that is not known, or there is none."""
        return None

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) along the first axis, to be read only."""

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """Return some rows, (L,) int64 ascending -> (L, ...), made for the call."""

    def read(self, ids: Tensor) -> Tensor:
        """Return the same; a run of ids is read as one piece."""
        if not len(ids):
            return self.rows(0, 0)
        first, last = int(ids[0]), int(ids[-1]) + 1
        if last - first == len(ids):
            return self.rows(first, last)
        return self.gather(ids)

    def copy_to(self, target: Tensor) -> None:
        """Copy all values into a tensor of the same shape and type, block by block."""
        if not self.shape:
            target.copy_(self.rows(0, 1).reshape(()))
            return
        step = max(1, COPY_BYTES * max(self.shape[0], 1) // max(self.nbytes, 1))
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            target[first:last] = self.rows(first, last)


class Held(Entry):
    """A tensor of torch's own, mapped from a file as a rule.

    Args:
        tensor: that holds the values.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    @property
    def span(self) -> tuple[int, int] | None:
        """Where its bytes lie."""
        return span_of(self.tensor) if self.tensor.numel() else None

    @property
    def is_whole(self) -> bool:
        """Whether nothing else lies in its storage, which is saved as a whole."""
        return self.tensor.untyped_storage().nbytes() == self.tensor.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """Return a view."""
        return self.tensor.detach()[first:last] if self.shape else self.tensor.detach().reshape(1)

    def gather(self, ids: Tensor) -> Tensor:
        """Return rows."""
        return self.tensor.detach().index_select(0, ids)


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Return where the first byte of a tensor lies, and the one after the last; what is tied overlaps.

    Example:
        >>> whole = torch.zeros(4, 2)
        >>> [at - whole.data_ptr() for at in span_of(whole[1:3])]
        [8, 24]
    """
    first = tensor.data_ptr()
    values = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return first, first + values * tensor.dtype.itemsize if tensor.numel() else first


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, whose bytes lie in one piece of a file.

    Args:
        path: of the file.
        start: of the bytes in it.
        offsets, sizes: of the box in the tensor.
    """

    path: Path
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def height(self) -> int:
        """Rows along the first axis."""
        return self.sizes[0] if self.sizes else 1

    @property
    def top(self) -> int:
        """Number of the first row."""
        return self.offsets[0] if self.offsets else 0


class Chunked(Entry):
    """A tensor in boxes, as torch.distributed.checkpoint keeps it.

    Args:
        shape, dtype: of the whole.
        chunks: that cover it; cut along the first two axes at most.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[Chunk]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
        self._maps: dict[Chunk, np.memmap | np.ndarray] = {}

    def rows(self, first: int, last: int) -> Tensor:
        """Return a copy."""
        found = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        for chunk in self._chunks:
            low, high = max(first, chunk.top), min(last, chunk.top + chunk.height)
            if low < high:
                self._put(found[low - first : high - first], chunk, slice(low - chunk.top, high - chunk.top))
        return found

    def gather(self, ids: Tensor) -> Tensor:
        """Return a copy."""
        found = torch.empty((len(ids), *self.shape[1:]), dtype=self.dtype)
        for chunk in self._chunks:
            low, high = torch.searchsorted(ids, torch.tensor([chunk.top, chunk.top + chunk.height])).tolist()
            if low < high:
                self._put(found[low:high], chunk, (ids[low:high] - chunk.top).numpy())
        return found

    def _put(self, target: Tensor, chunk: Chunk, which: slice | np.ndarray) -> None:
        """Write some rows of a chunk where they belong."""
        there = self._bytes(chunk)
        values = torch.from_numpy(np.array(there[which])).view(self.dtype)
        values = values.reshape(len(values), *chunk.sizes[1:])
        for axis, (offset, size) in enumerate(zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), start=1):
            target = target.narrow(axis, offset, size)
        target.copy_(values.reshape(target.shape))

    def _bytes(self, chunk: Chunk) -> np.memmap | np.ndarray:
        """Return the bytes of a chunk by rows, (rows, bytes per row) uint8, mapped."""
        width = int(np.prod(chunk.sizes[1:], dtype=np.int64)) * self.dtype.itemsize
        if not chunk.height or not width:
            return np.empty((chunk.height, width), dtype=np.uint8)
        if chunk not in self._maps:
            shape = (chunk.height, width)
            self._maps[chunk] = np.memmap(chunk.path, dtype=np.uint8, mode="r", offset=chunk.start, shape=shape)
        return self._maps[chunk]
