"""Rows that do not fit into memory: read in chunks, shuffled within windows, the same batches on any number of ranks.

The rows of a split are cut into as many equal lanes as `data.lanes` says. A global batch takes equally many rows from
each lane, and a rank serves lanes that lie next to each other. So what a batch holds does not depend on the number of
ranks, a rank reads its own part of the files only, and where a lane stands follows from the step alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import gcd

import numpy as np
import torch
from torch import Tensor

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.batch import EVERYTHING, Batch, Layout, Share, share_weights
from torchrec_compress.train.data.memory import Split, to_batch
from torchrec_compress.train.data.prefetch import prefetch, read_ahead
from torchrec_compress.train.data.source import SPLITS, Batches, ClickSource


class Chunks(ABC):
    """The rows of a split, in chunks that are read one by one, by several threads at a time.

    Attributes:
        sizes: rows per chunk.
        whole: whether reading a part of a chunk costs as much as reading all of it.
        where: the files, for errors.
    """

    sizes: list[int]
    whole: bool
    where: str

    @abstractmethod
    def read(self, chunk: int, first: int, last: int) -> Split:
        """Return the rows [first, last) of a chunk.

        Raises:
            ValueError: a row that is malformed; the error names its file and number.
        """


@dataclass(frozen=True)
class _Piece:
    """A part of a chunk: its rows [first, last), the first of which is row `position` of the split."""

    chunk: int
    first: int
    last: int
    position: int


def _cut(sizes: list[int], first: int, last: int) -> list[_Piece]:
    """Return the pieces of chunks that make up the rows [first, last) of a split."""
    starts = [0, *accumulate(sizes)]
    pieces = []
    for chunk in range(max(bisect_right(starts, first) - 1, 0), len(sizes)):
        start, stop = max(first, starts[chunk]), min(last, starts[chunk + 1])
        if starts[chunk] >= last:
            break
        if start < stop:
            pieces.append(_Piece(chunk, start - starts[chunk], stop - starts[chunk], start))
    return pieces


class StreamedData(ClickSource):
    """A data set in files.

    Args:
        config: lanes, window and num_workers.
        vocab: rows per table, F numbers.
        num_dense: dense columns, C.
        layout: the features, F names, and how many ids a row has of each.
        splits: the chunks of "train", "valid" and "test".
        pin_memory: whether batches are put into page-locked memory.

    Raises:
        ValueError: a split without rows, or a setting that is not positive.
    """

    def __init__(
        self,
        config: DataConfig,
        vocab: list[int],
        num_dense: int,
        layout: Layout,
        splits: dict[str, Chunks],
        pin_memory: bool = False,
    ) -> None:
        for key in ("lanes", "window", "chunk_rows"):
            if getattr(config, key) < 1:
                raise ValueError(f"data.{key}: must be positive, got {getattr(config, key)}")
        if config.num_workers < 0:
            raise ValueError(f"data.num_workers: must not be negative, got {config.num_workers}")
        for name in SPLITS:
            if not sum(splits[name].sizes):
                raise ValueError(f"{splits[name].where}: the {name} split must have rows, got none; see data.split_by")
        self.features, self.vocab, self.num_dense = layout.features, vocab, num_dense
        self._layout, self._splits, self._config, self._pin_memory = layout, splits, config, pin_memory

    @property
    def layout(self) -> Layout:
        """Return how many ids a row has of every feature."""
        return self._layout

    def chunks(self, split: str) -> Chunks:
        """Return the chunks of "train", "valid" or "test".

        Raises:
            ValueError: another name.
        """
        if split not in self._splits:
            raise ValueError(f"split: must be one of {SPLITS}, got {split!r}")
        return self._splits[split]

    def num_rows(self, split: str) -> int:
        """Return the rows of a split."""
        return sum(self.chunks(split).sizes)

    def batches(self, split: str, batch_size: int, seed: int | None, share: Share = EVERYTHING) -> Batches:
        """Return the batches of a split; with a seed, chunks and the rows of a window are shuffled in every epoch.

        Without one, for reading all rows once, as many lanes are used as divide the batch size.

        Raises:
            ValueError: lanes, ranks and batch size that do not divide each other, or too few rows.
        """
        chunks, num_rows = self.chunks(split), self.num_rows(split)
        lanes = self._config.lanes if seed is not None else gcd(self._config.lanes, batch_size)
        if lanes % share.world:
            raise ValueError(f"data.lanes: must be a multiple of the {share.world} ranks, got {self._config.lanes}")
        if batch_size < 1 or batch_size % lanes:
            raise ValueError(f"data.lanes: must divide the batch size, got {lanes} lanes for {batch_size} rows")
        if num_rows < share.world:
            raise ValueError(f"{chunks.where}: {split} must have a row for each of {share.world} ranks, got {num_rows}")
        if seed is not None and chunks.whole and len(chunks.sizes) < lanes:
            raise ValueError(
                f"{chunks.where}: {split} must have at least as many row groups as data.lanes = {lanes}, got "
                f"{len(chunks.sizes)}; lower data.lanes, or write smaller row groups"
            )
        return _StreamedBatches(self, split, batch_size, lanes, seed, share)

    def counts(self, share: Share = EVERYTHING) -> dict[str, Tensor]:
        """Return how often this share of train looks every id up: (rows,) int64 by feature; reads it once."""
        sizes = zip(self.features, self.vocab, strict=True)
        total = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes}
        chunks = self.chunks("train")
        pieces = _cut(chunks.sizes, *share.of(self.num_rows("train")))
        with ExitStack() as stack:
            pool = self.pool(stack)
            for rows in read_ahead(pool, (partial(chunks.read, p.chunk, p.first, p.last) for p in pieces)):
                for name, count in total.items():
                    ids = rows.ids[:, self.layout.columns(name)]
                    ids = ids[ids >= 0].long()  # adding to the ids in it is quicker than counting a large table whole
                    count.index_add_(0, ids, torch.ones_like(ids))
        return total

    def pool(self, stack: ExitStack) -> Executor | None:
        """Return the threads that read ahead, which end with the stack, or None where there are none."""
        if not self._config.num_workers:
            return None
        pool = ThreadPoolExecutor(self._config.num_workers, thread_name_prefix="reader")
        stack.callback(pool.shutdown, cancel_futures=True)
        return pool

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return batches that are prepared ahead where the config asks for that."""
        return prefetch(batches, pin_memory=self._pin_memory) if self._config.num_workers else self._pinned(batches)

    def _pinned(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return map(Batch.pin_memory, batches) if self._pin_memory else batches

    @property
    def window(self) -> int:
        """Return the chunks that are shuffled together."""
        return self._config.window


class _StreamedBatches(Batches):
    """Batches of lanes; see the module."""

    def __init__(
        self, data: StreamedData, split: str, batch_size: int, lanes: int, seed: int | None, share: Share
    ) -> None:
        self._data, self._seed, self._share = data, seed, share
        self._chunks = data.chunks(split)
        self._num_rows, self._batch_size = data.num_rows(split), batch_size
        self._per_lane = batch_size // lanes
        bounds = [Share(lane, lanes).of(self._num_rows) for lane in range(lanes)]
        self._lanes = [_cut(self._chunks.sizes, *bound) for bound in bounds]
        self._lengths = [last - first for first, last in bounds]

    def __len__(self) -> int:
        return -(-max(self._lengths) // self._per_lane)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        return self._data.ahead(self._read(epoch, first))

    def _read(self, epoch: int, first: int) -> Iterator[Batch]:
        served = range(*self._share.of(len(self._lanes)))
        with ExitStack() as stack:
            pool = self._data.pool(stack)
            lanes = {lane: _Lane(self._chunks, self._windows(epoch, lane), pool) for lane in served}
            for step in range(first, len(self)):
                yield self._batch(step, lanes)

    def _windows(self, epoch: int, lane: int) -> list[_Window]:
        """Return the windows of a lane, a pure function of seed, epoch and lane."""
        pieces, size, seed = self._lanes[lane], self._data.window, self._seed
        if seed is not None:
            order = np.random.default_rng((seed, epoch, lane)).permutation(len(pieces))
            pieces = [pieces[number] for number in order]
        windows, start = [], 0
        for number, first in enumerate(range(0, len(pieces), size)):
            key = None if seed is None else (seed, epoch, lane, number)
            windows.append(_Window(pieces[first : first + size], start, key))
            start = windows[-1].stop
        return windows

    def _batch(self, step: int, lanes: dict[int, _Lane]) -> Batch:
        begin, end = step * self._per_lane, (step + 1) * self._per_lane
        parts = [part for lane, reader in lanes.items() for part in reader.take(begin, min(end, self._lengths[lane]))]
        num_real = sum(len(positions) for _, positions in parts)
        in_batch = min(self._batch_size, self._num_rows - step * self._batch_size)
        padded = self._share.padded(in_batch)
        if not parts:  # all rows of the last batch are other ranks'; this one repeats its own last row
            lane = max(lane for lane in lanes if self._lengths[lane])
            parts = lanes[lane].take(self._lengths[lane] - 1, self._lengths[lane])
        if num_real < padded:
            rows, positions = parts[-1]
            last = torch.tensor([len(positions) - 1]).expand(padded - num_real)
            parts = [*parts, (rows.take(last), positions[last])] if num_real else [(rows.take(last), positions[last])]
        rows = Split.join([rows for rows, _ in parts])
        positions = torch.cat([positions for _, positions in parts])
        weights = share_weights(num_real, padded, self._share.world, in_batch)
        return to_batch(self._data.layout, rows, positions, weights)


class _Window:
    """Pieces that are held in memory together: the rows [start, stop) of a lane in the order of an epoch."""

    def __init__(self, pieces: list[_Piece], start: int, seed: tuple[int, ...] | None) -> None:
        self._pieces, self._seed, self.start = pieces, seed, start
        self.stop = start + sum(piece.last - piece.first for piece in pieces)

    def load(self, chunks: Chunks) -> _Loaded:
        """Read the pieces and draw the order of their rows."""
        rows = Split.join([chunks.read(piece.chunk, piece.first, piece.last) for piece in self._pieces])
        where = [torch.arange(p.position, p.position + p.last - p.first) for p in self._pieces]
        order = np.arange(len(rows)) if self._seed is None else np.random.default_rng(self._seed).permutation(len(rows))
        return _Loaded(self.start, self.stop, rows, torch.cat(where), torch.from_numpy(order))


@dataclass(frozen=True)
class _Loaded:
    """A window in memory: rows as they lie in the files, their positions in the split and their order in the epoch."""

    start: int
    stop: int
    rows: Split
    positions: Tensor
    order: Tensor


class _Lane:
    """The rows of a lane in the order of an epoch, read forwards."""

    def __init__(self, chunks: Chunks, windows: list[_Window], pool: Executor | None) -> None:
        self._chunks, self._windows, self._pool = chunks, windows, pool
        self._current: _Loaded | None = None
        self._next: Iterator[_Loaded] = iter(())

    def take(self, first: int, last: int) -> list[tuple[Split, Tensor]]:
        """Return the rows [first, last) of the epoch and their positions in the split."""
        parts = []
        while first < last:
            window = self._at(first)
            stop = min(last, window.stop)
            picked = window.order[first - window.start : stop - window.start]
            parts.append((window.rows.take(picked), window.positions[picked]))
            first = stop
        return parts

    def _at(self, position: int) -> _Loaded:
        if self._current is None:
            number = bisect_right([window.start for window in self._windows], position) - 1
            tasks = (partial(window.load, self._chunks) for window in self._windows[number:])
            self._next = read_ahead(self._pool, tasks)
            self._current = next(self._next)
        while self._current.stop <= position:
            self._current = next(self._next)
        return self._current
