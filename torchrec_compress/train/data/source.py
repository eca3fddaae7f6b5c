"""Rows to train on: what every source of rows provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from torchrec_compress.train.data.batch import EVERYTHING, Batch, Layout, Share

SPLITS = ("train", "valid", "test")


class Batches(ABC):
    """A rank's batches of a split.

    What a global batch holds is a pure function of seed, epoch and batch size; the number of ranks only decides who
    gets which part of it. All ranks have equally many batches.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the steps of an epoch."""

    @abstractmethod
    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `first` on, as an uninterrupted epoch would."""


class ClickSource(ABC):
    """A data set, in memory or not.

    Attributes:
        features: F names, one table each.
        vocab: rows per table, F numbers.
        num_dense: dense columns, C.
        layout: how many ids a row has of every feature.
    """

    features: list[str]
    vocab: list[int]
    num_dense: int

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Return how many ids a row has of every feature."""

    @abstractmethod
    def num_rows(self, split: str) -> int:
        """Return the rows of "train", "valid" or "test"."""

    @abstractmethod
    def batches(self, split: str, batch_size: int, seed: int | None, share: Share = EVERYTHING) -> Batches:
        """Return the batches of a split.

        Args:
            split: "train", "valid" or "test".
            batch_size: rows of a global batch, over all ranks; the last one of an epoch may have fewer.
            seed: of the order; None keeps the order of the rows.
            share: which part of every batch to read.

        Raises:
            ValueError: a split without rows for every rank, or a batch size that the source cannot share out.
        """

    @abstractmethod
    def counts(self, share: Share = EVERYTHING) -> dict[str, Tensor]:
        """Return how often this share of train looks every id up: (rows,) int64 by feature; shares add up."""
