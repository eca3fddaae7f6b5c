"""Sequences of items that are held in memory, split by their ends: what a model of what comes next reads."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.train.config_sequence import SequenceConfig
from torchrec_compress.train.data.batch import EVERYTHING, Batch, Layout, Share
from torchrec_compress.train.data.memory import MemoryBatches, Part, count_ids
from torchrec_compress.train.data.source import SPLITS, Batches, ClickSource

logger = logging.getLogger(__name__)

_SPLIT_FROM = 4  # items of a sequence that has a pair to train on besides an item each for valid and test


def sequence_features(item: str) -> tuple[str, str, str]:
    """Return the three features that look the one table up: items that were, those that came next, and the pool.

    The pool is what the next item is told from: negatives of the whole batch in training, all items else. It stands
    in the first row of a batch, and the other rows have none.
    """
    return item, f"{item}_next", f"{item}_pool"


def held_feature(item: str) -> str:
    """Return the feature that no table looks up: all items that a sequence held before, empty in training."""
    return f"{item}_held"


class SequenceData(ClickSource):
    """A data set of sequences in memory.

    A sequence of four items or more leaves its last to test and the one before to valid; what stands before those
    trains, in windows of `max_length` pairs that are cut from its end. A shorter one trains whole, and one item alone
    is left out, which is logged. What a split reads are the items before its own, the last `max_length` of them.

    Args:
        items: (E,) int32, sequence after sequence, each in its order.
        offsets: (S + 1,) int64, where each begins, and the end.
        num_items: rows of the table, N.
        config: of the sequences.
        pin_memory: whether batches are prepared ahead in page-locked memory, for a GPU.

    Attributes:
        spans: by split, (rows, 2) int64: the first item that is read and the one after the last of every row, of which
            the last is what comes next.
        begins: (rows,) int64, the first item of the sequence of each row of valid, and of test.

    Raises:
        ValueError: an item outside [0, N), no sequence of four items, or no fewer negatives than items.

    Example:
        >>> data = SequenceData(torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32), torch.tensor([0, 5]), 6,
        ...                     SequenceConfig(by="user", num_negatives=2))
        >>> [data.items[first:last].tolist() for first, last in data.spans["test"]]
        [[3, 1, 4, 1, 5]]
        >>> next(data.batches("valid", 8, None).epoch(0)).features["item"].values().tolist()
        [3, 1, 4]
    """

    num_dense = 0

    def __init__(
        self, items: Tensor, offsets: Tensor, num_items: int, config: SequenceConfig, pin_memory: bool = False
    ) -> None:
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
            raise ValueError(
                f"data.sequence: items must be in [0, {num_items}), got {int(items.min())} to {int(items.max())}"
            )
        if config.num_negatives >= num_items:
            raise ValueError(
                f"data.sequence.num_negatives: must be below the {num_items} items of {config.item!r}, got "
                f"{config.num_negatives}"
            )
        self.features, self.vocab = [config.item], [num_items]
        self.items, self.offsets, self.config, self.pin_memory = items, offsets, config, pin_memory
        starts, ends = offsets[:-1].numpy(), offsets[1:].numpy()
        is_split = ends - starts >= _SPLIT_FROM
        if not is_split.any():
            raise ValueError(
                f"data.sequence: must have a sequence of {_SPLIT_FROM} items, got {len(starts)} by {config.by!r}, of "
                f"at most {max((ends - starts).tolist(), default=0)}"
            )
        if alone := int((ends - starts < 2).sum()):
            logger.warning(
                "data.sequence: %d of %d sequences have fewer than two items and are left out", alone, len(starts)
            )
        self._train_ends = np.where(is_split, ends - 2, ends)
        begins, ends, length = starts[is_split], ends[is_split], config.max_length
        self.begins = torch.from_numpy(begins)
        self.spans = {
            "train": _windows(starts, self._train_ends, length),
            "valid": _last(begins, ends - 1, length),
            "test": _last(begins, ends, length),
        }

    @property
    def layout(self) -> Layout:
        """Return the most ids that a row has of every feature; the pool is one row's alone."""
        length = self.config.max_length
        names = [*sequence_features(self.config.item), held_feature(self.config.item)]
        return Layout(names, (length, length, 1, 1), ragged=True)

    def held(self, split: str) -> tuple[Tensor, Tensor]:
        """Return where the items before what comes next begin and end, (rows,) int64 both; training leaves out none."""
        spans = self._spans(split)
        return (spans[:, 0], spans[:, 0]) if split == "train" else (self.begins, spans[:, 1] - 1)

    def num_rows(self, split: str) -> int:
        """Return the rows of a split: windows of train, sequences of the others."""
        return len(self._spans(split))

    def batches(self, split: str, batch_size: int, seed: int | None, share: Share = EVERYTHING) -> Batches:
        """Return the batches of a split; with a seed, rows are shuffled and negatives drawn anew in every epoch.

        Negatives are a function of seed, epoch and step, the same on every rank. A row of train counts by its pairs.
        """
        spans, held = self._spans(split), self.held(split)
        num_pairs = spans[:, 1] - spans[:, 0] - 1

        def make(part: Part) -> Batch:
            mine, inputs, weights = spans[part.rows], num_pairs[part.rows], part.weights
            if split == "train":
                weights = weights * inputs / num_pairs[part.whole].float().mean()
                ahead, pool = inputs, self._negatives(seed or 0, part)
            else:
                ahead, pool = torch.ones_like(inputs), torch.arange(self.vocab[0], dtype=torch.int32)
            features = self._features(mine, inputs, ahead, pool, tuple(end[part.rows] for end in held))
            return Batch(features, torch.ones(len(mine)), None, part.rows, None, weights)

        return MemoryBatches(len(spans), make, batch_size, seed, share, self.pin_memory)

    def counts(self, share: Share = EVERYTHING) -> dict[str, Tensor]:
        """Return how often each item stands in this share of what trains: (N,) int64 by feature; shares add up."""
        first, last = share.of(len(self._train_ends))
        starts, ends = self.offsets[first:last], torch.from_numpy(self._train_ends[first:last])
        return {self.config.item: count_ids(self.items[_within(starts, ends)], self.vocab[0])}

    def _spans(self, split: str) -> Tensor:
        if split not in SPLITS:
            raise ValueError(f"split: must be one of {SPLITS}, got {split!r}")
        return self.spans[split]

    def _negatives(self, seed: int, part: Part) -> Tensor:
        """Return the items that a global batch is contrasted with: (num_negatives,) int32."""
        drawn = np.random.default_rng((seed, part.epoch, part.first))
        return torch.from_numpy(drawn.integers(0, self.vocab[0], self.config.num_negatives, dtype=np.int32))

    def _features(
        self, spans: Tensor, inputs: Tensor, ahead: Tensor, pool: Tensor, held: tuple[Tensor, ...]
    ) -> KeyedJaggedTensor:
        """Return the features of rows: `inputs` items that were, the `ahead` last ones, the pool, what was held."""
        in_pool = torch.zeros_like(inputs)
        in_pool[0] = len(pool)
        values = torch.cat(
            [
                self.items[_within(spans[:, 0], spans[:, 0] + inputs)],
                self.items[_within(spans[:, 1] - ahead, spans[:, 1])],
                pool,
                self.items[_within(*held)],
            ]
        )
        return KeyedJaggedTensor(
            keys=self.layout.features,
            values=values,
            lengths=torch.cat([inputs, ahead, in_pool, held[1] - held[0]]).to(torch.int32),
            stride=len(spans),
        )


def _within(starts: Tensor, ends: Tensor) -> Tensor:
    """Return all positions of spans [start, end), one span after the other: (sum of lengths,) int64."""
    lengths = ends - starts
    before = torch.cumsum(lengths, 0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def _last(starts: NDArray, ends: NDArray, max_length: int) -> Tensor:
    """Return spans that end where they are told to, of at most `max_length` items before their last."""
    return torch.from_numpy(np.stack([np.maximum(starts, ends - max_length - 1), ends], axis=1))


def _windows(starts: NDArray, ends: NDArray, max_length: int) -> Tensor:
    """Return spans of at most `max_length` pairs, cut from the end, so that each pair of neighbours is in one."""
    num_windows = np.maximum(-(-(ends - starts - 1) // max_length), 0)
    sequence = np.repeat(np.arange(len(starts)), num_windows)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    return _last(starts[sequence], ends[sequence] - number * max_length, max_length)
