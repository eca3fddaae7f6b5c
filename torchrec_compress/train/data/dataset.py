"""Examples in memory, and the batches that are cut from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B examples.

    Args:
        features: one id per feature and example.
        dense: (B, num_dense) float32, or None.
        labels: (B,) float32 in {0, 1}.
        rows: (B,) int64, the examples' numbers in their split.
    """

    features: KeyedJaggedTensor
    dense: Tensor | None
    labels: Tensor
    rows: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        dense = None if self.dense is None else self.dense.to(device, non_blocking=non_blocking)
        features = self.features.to(device, non_blocking=non_blocking)
        return Batch(features, dense, self.labels.to(device, non_blocking=non_blocking), self.rows)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the tensors alive until a CUDA stream has used them."""
        self.features.record_stream(stream)  # type: ignore[arg-type]
        for tensor in (self.dense, self.labels):
            if tensor is not None:
                tensor.record_stream(stream)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory."""
        dense = None if self.dense is None else self.dense.pin_memory()
        return Batch(self.features.pin_memory(), dense, self.labels.pin_memory(), self.rows)


@dataclass(frozen=True)
class Split:
    """Examples of one split.

    Args:
        ids: (F, N) int32, feature by feature (a batch is then a column gather).
        dense: (N, num_dense) float32, or None.
        labels: (N,) float32 in {0, 1}.
        kinds: (N,) int8, 0 for the positive; or None.
    """

    ids: Tensor
    dense: Tensor | None
    labels: Tensor
    kinds: Tensor | None

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class Dataset:
    """A data set with its three splits.

    Args:
        features: names, in the order of `Split.ids`.
        vocab: rows of each feature's table.
        train, valid, test: the splits.
        bayes: AUC and logloss of the true probabilities on the test split, where they are known.
    """

    features: list[str]
    vocab: dict[str, int]
    train: Split
    valid: Split
    test: Split
    bayes: dict[str, float] | None = None

    @property
    def num_dense(self) -> int:
        """Number of dense features."""
        return 0 if self.train.dense is None else self.train.dense.shape[1]

    def counts(self) -> dict[str, Tensor]:
        """Return the look-ups per id over the training split: (vocab,) int64 by feature."""
        return {
            name: torch.bincount(self.train.ids[number].long(), minlength=self.vocab[name])
            for number, name in enumerate(self.features)
        }


class Batches:
    """Cut a split into batches, shuffled or in order, from any position.

    Args:
        split: examples.
        features: names of the rows of `split.ids`.
        batch_size: examples per batch; the last one may be smaller.
        seed: of the shuffle, which is a pure function of (seed, epoch); None keeps the order.
    """

    def __init__(self, split: Split, features: list[str], batch_size: int, seed: int | None) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        self._split, self._features, self._batch_size, self._seed = split, features, batch_size, seed

    def __len__(self) -> int:
        return -(-len(self._split) // self._batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch `first` on."""
        order = None
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            order = torch.randperm(len(self._split), generator=generator)
        for start in range(first * self._batch_size, len(self._split), self._batch_size):
            stop = min(start + self._batch_size, len(self._split))
            yield self._batch(torch.arange(start, stop) if order is None else order[start:stop])

    def _batch(self, rows: Tensor) -> Batch:
        split, num = self._split, len(rows)
        num_features = len(self._features)
        features = KeyedJaggedTensor(
            keys=self._features,
            values=split.ids[:, rows].reshape(-1).long(),
            lengths=torch.ones(num_features * num, dtype=torch.int64),
            stride=num,
            length_per_key=[num] * num_features,
            offset_per_key=[num * f for f in range(num_features + 1)],
        )
        dense = None if split.dense is None else split.dense[rows]
        return Batch(features, dense, split.labels[rows], rows)
