"""Click data that is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_compress.train.data.batch import EVERYTHING, Batch, Layout, Share, share_weights
from torchrec_compress.train.data.prefetch import prefetch
from torchrec_compress.train.data.source import SPLITS, Batches, ClickSource


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        ids: (N, sum of widths) int32; -1 for none.
        labels: (N,) float32, 0 or 1.
        dense: (N, C) float32, or None.
        kinds: (N,) int8 kind of negative (0 positive), or None.
        probabilities: (N,) float32 true click probabilities where they are known, or None.
    """

    ids: Tensor
    labels: Tensor
    dense: Tensor | None = None
    kinds: Tensor | None = None
    probabilities: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> Split:
        """Return some rows; a slice shares memory."""
        return Split(*(None if value is None else value[rows] for value in self._tensors()))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: list[Split]) -> Split:
        """Return the rows of several, which must have the same columns, one after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return Split(*(None if values[0] is None else torch.cat(values) for values in columns))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.labels, self.dense, self.kinds, self.probabilities


@dataclass(frozen=True)
class ClickData(ClickSource):
    """A data set in memory: three splits over the same features.

    Args:
        features: F names, one table each.
        vocab: rows per table, F numbers.
        num_dense: dense columns, C.
        train, valid, test: the splits.
        widths: the most ids that a row has of each feature; empty is one of each.
        ragged: whether a row may have fewer.
        pin_memory: whether batches are prepared ahead in page-locked memory, for a GPU.
    """

    features: list[str]
    vocab: list[int]
    num_dense: int
    train: Split
    valid: Split
    test: Split
    widths: tuple[int, ...] = ()
    ragged: bool = False
    pin_memory: bool = False

    @property
    def layout(self) -> Layout:
        """Return how many ids a row has of every feature."""
        return Layout(self.features, self.widths or (1,) * len(self.features), self.ragged)

    def split(self, name: str) -> Split:
        """Return "train", "valid" or "test".

        Raises:
            ValueError: another name.
        """
        if name not in SPLITS:
            raise ValueError(f"split: must be one of {SPLITS}, got {name!r}")
        return getattr(self, name)

    def num_rows(self, split: str) -> int:
        """Return the rows of a split."""
        return len(self.split(split))

    def batches(self, split: str, batch_size: int, seed: int | None, share: Share = EVERYTHING) -> Batches:
        """Return the batches of a split; with a seed, all of its rows are shuffled in every epoch."""
        rows, layout = self.split(split), self.layout

        def make(part: Part) -> Batch:
            return to_batch(layout, rows.take(part.rows), part.rows, part.weights)

        return MemoryBatches(len(rows), make, batch_size, seed, share, self.pin_memory)

    def counts(self, share: Share = EVERYTHING) -> dict[str, Tensor]:
        """Return how often this share of train looks every id up: (rows,) int64 by feature; shares add up."""
        ids, layout = self.train.ids[slice(*share.of(len(self.train)))], self.layout
        return {name: count_ids(ids[:, layout.columns(name)], size) for name, size in self._sizes()}

    def _sizes(self) -> list[tuple[str, int]]:
        return list(zip(self.features, self.vocab, strict=True))


def count_ids(ids: Tensor, size: int) -> Tensor:
    """Return how often every id occurs: (size,) int64.

    Args:
        ids: (N, width) int32; -1 is none.
        size: rows of the table.
    """
    return torch.bincount(ids[ids >= 0].long(), minlength=size)


def to_batch(layout: Layout, rows: Split, positions: Tensor, weights: Tensor) -> Batch:
    """Return rows as a batch; `positions` (B,) int64 are theirs in the split."""
    return Batch(layout.to_features(rows.ids), rows.labels, rows.dense, positions, rows.kinds, weights)


@dataclass(frozen=True)
class Part:
    """This rank's part of a global batch.

    Args:
        rows: (B,) int64 positions in the split, padded so that every rank has as many.
        weights: (B,) float32, see `Batch`.
        whole: (G,) int64 positions of the global batch.
        epoch: number of the epoch, from 0.
        first: place of the global batch's first row in the epoch.
    """

    rows: Tensor
    weights: Tensor
    whole: Tensor
    epoch: int
    first: int


class MemoryBatches(Batches):
    """Batches of rows in memory: each rank takes a contiguous part of every global batch.

    Args:
        num_rows: of the split.
        make: returns the batch of a part.
        batch_size: rows of a global batch.
        seed: of the order of each epoch; None keeps that of the rows.
        share: which part to read.
        pin_memory: whether batches are prepared ahead in page-locked memory.

    Raises:
        ValueError: no rows, or no positive batch size.
    """

    def __init__(
        self,
        num_rows: int,
        make: Callable[[Part], Batch],
        batch_size: int,
        seed: int | None,
        share: Share,
        pin_memory: bool,
    ) -> None:
        if batch_size < 1 or num_rows < 1:
            raise ValueError(f"batches: must have rows and a positive batch size, got {num_rows} and {batch_size}")
        self._num_rows, self._make, self._pin_memory = num_rows, make, pin_memory
        self._batch_size, self._seed, self._share = batch_size, seed, share

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `first` on."""
        batches = self._read(epoch, first)
        return prefetch(batches, pin_memory=True) if self._pin_memory else batches

    def _read(self, epoch: int, first: int) -> Iterator[Batch]:
        size, num_rows = self._batch_size, self._num_rows
        order = None
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(num_rows, generator=generator)
        for start in range(first * size, num_rows, size):
            stop = min(start + size, num_rows)
            whole = order[start:stop] if order is not None else torch.arange(start, stop)
            yield self._make(self._part(whole, epoch, start))

    def _part(self, whole: Tensor, epoch: int, start: int) -> Part:
        first, last = self._share.of(len(whole))
        padded = self._share.padded(len(whole))
        weights = share_weights(last - first, padded, self._share.world, len(whole))
        mine = whole[first:last]
        if len(mine) < padded:
            mine = torch.cat([mine, whole[-1:].expand(padded - len(mine))])
        return Part(mine, weights, whole, epoch, start)
