"""Click data in memory: rows of ids, labels and splits, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.train.config import DataConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        ids: (N, F) int32.
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


@dataclass(frozen=True)
class ClickData:
    """A data set: three splits over the same features.

    Args:
        features: F names, one table each.
        vocab: rows per table, F numbers.
        num_dense: dense columns, C.
        train, valid, test: the splits.
    """

    features: list[str]
    vocab: list[int]
    num_dense: int
    train: Split
    valid: Split
    test: Split

    def counts(self) -> dict[str, Tensor]:
        """Return how often train looks every id up: (rows,) int64 by feature."""
        return {
            name: torch.bincount(self.train.ids[:, column].long(), minlength=self.vocab[column])
            for column, name in enumerate(self.features)
        }


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Args:
        features: one id per feature and row.
        labels: (B,) float32.
        dense: (B, C) float32, or None.
        ids: (B, F) int32, the same ids as in `features`.
        rows: (B,) int64 positions in the split.
    """

    features: KeyedJaggedTensor
    labels: Tensor
    dense: Tensor | None
    ids: Tensor
    rows: Tensor


def load_data(config: DataConfig) -> ClickData:
    """Read or generate the data that a config asks for.

    Raises:
        ValueError: a file that is missing, empty or malformed, see the readers.

    Example:
        >>> from torchrec_compress.train.config import GeneratorConfig
        >>> small = GeneratorConfig(num_rows=2000, num_users=100, num_items=50)
        >>> len(load_data(DataConfig(generator=small)).train)
        1600
    """
    if config.kind == "generator":
        from torchrec_compress.train.generator import generate

        return generate(config.generator)
    if config.path is None:
        raise ValueError(f"data.path: must be set with data.kind = {config.kind!r}, got null; pass --data.path FILE")
    if config.kind == "criteo":
        from torchrec_compress.train.criteo import read_criteo

        return read_criteo(config)
    from torchrec_compress.train.parquet import read_parquet

    return read_parquet(config)


class Batches:
    """Batches of a split, in an order that is a pure function of (seed, epoch).

    Args:
        features: names of the id columns.
        split: the rows.
        batch_size: rows per batch; the last batch of an epoch may be smaller.
        seed: of the order; None keeps the order of the rows.
    """

    def __init__(self, features: list[str], split: Split, batch_size: int, seed: int | None) -> None:
        self._features, self._split, self._batch_size, self._seed = features, split, batch_size, seed
        # every bag has one id, so lengths and offsets are the same for all batches of a size
        num_ids = len(features) * batch_size
        self._lengths = torch.ones(num_ids, dtype=torch.int32)
        self._offsets = torch.arange(num_ids + 1, dtype=torch.int32)

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        return -(-len(self._split) // self._batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from the `first` on, as an uninterrupted epoch would."""
        size, num_rows = self._batch_size, len(self._split)
        order = None
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(num_rows, generator=generator)
        for start in range(first * size, num_rows, size):
            stop = min(start + size, num_rows)
            yield self._batch(order[start:stop] if order is not None else torch.arange(start, stop))

    def _batch(self, rows: Tensor) -> Batch:
        split, size, width = self._split, len(rows), len(self._features)
        ids = split.ids[rows]
        features = KeyedJaggedTensor(
            keys=self._features,
            values=ids.t().reshape(-1),
            lengths=self._lengths[: size * width],
            offsets=self._offsets[: size * width + 1],
            stride=size,
            length_per_key=[size] * width,
            offset_per_key=[size * column for column in range(width + 1)],
            index_per_key={name: column for column, name in enumerate(self._features)},
        )
        dense = None if split.dense is None else split.dense[rows]
        return Batch(features, split.labels[rows], dense, ids, rows)
