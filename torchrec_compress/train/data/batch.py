"""What a rank reads of a step: its share of a global batch, and how its ids are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process reads; the default is everything.

    Args:
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: a rank outside [0, world).
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"Share: rank must be in [0, world), got rank {self.rank} of {self.world}")

    def of(self, num_rows: int) -> tuple[int, int]:
        """Return the first row of this share and the one after its last; shares differ by at most one row.

        Example:
            >>> [Share(rank, 3).of(10) for rank in range(3)]
            [(0, 3), (3, 6), (6, 10)]
        """
        return self.rank * num_rows // self.world, (self.rank + 1) * num_rows // self.world

    def padded(self, num_rows: int) -> int:
        """Return the rows that every share of a global batch has once it is padded."""
        return -(-num_rows // self.world)


EVERYTHING = Share()


@dataclass(frozen=True)
class Layout:
    """How the ids of a row lie in a matrix, and how they become TorchRec's jagged features.

    Args:
        features: F names.
        widths: columns per feature, F numbers: the most ids that a row has of it.
        ragged: whether a row may have fewer; its missing ids are -1 and stand last.
    """

    features: list[str]
    widths: tuple[int, ...]
    ragged: bool = False

    def columns(self, name: str) -> slice:
        """Return the columns of a feature."""
        position = self.features.index(name)
        first = sum(self.widths[:position])
        return slice(first, first + self.widths[position])

    def to_features(self, ids: Tensor) -> KeyedJaggedTensor:
        """Return rows of ids as jagged features, feature after feature.

        Args:
            ids: (B, sum of widths) int32.

        Example:
            >>> layout = Layout(["user", "tags"], (1, 2), ragged=True)
            >>> layout.to_features(torch.tensor([[7, 3, -1], [8, 4, 5]], dtype=torch.int32)).values().tolist()
            [7, 8, 3, 4, 5]
        """
        size = len(ids)
        if max(self.widths, default=1) == 1:
            values = ids.t().reshape(-1)
        else:
            values = torch.cat([block.reshape(-1) for block in ids.split(list(self.widths), dim=1)])
        if not self.ragged:
            lengths, offsets = _fixed_lengths(self.widths, size)
            per_key = [width * size for width in self.widths]
        else:
            present = [(block >= 0).sum(1, dtype=torch.int32) for block in ids.split(list(self.widths), dim=1)]
            values, lengths = values[values >= 0], torch.cat(present)
            per_key = [int(length.sum()) for length in present]
            offsets = _to_offsets(lengths)
        starts = [0]
        for length in per_key:
            starts.append(starts[-1] + length)
        return KeyedJaggedTensor(
            keys=self.features,
            values=values,
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=per_key,
            offset_per_key=starts,
            index_per_key={name: position for position, name in enumerate(self.features)},
        )


def _to_offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int32), torch.cumsum(lengths, 0, dtype=torch.int32)])


@lru_cache(maxsize=8)  # all batches of a size share them
def _fixed_lengths(widths: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(widths, dtype=torch.int32).repeat_interleave(size)
    return lengths, _to_offsets(lengths)


@dataclass(frozen=True)
class Batch(Pipelineable):
    """This rank's rows of one step; every rank has equally many.

    Args:
        features: any number of ids per feature and row.
        labels: (B,) float32.
        dense: (B, C) float32, or None.
        rows: (B,) int64 positions in the split.
        kinds: (B,) int8 kind of negative (0 positive), or None.
        weights: (B,) float32, such that the mean over ranks of `(loss_per_row * weights).mean()` is the mean over the
            rows of the global batch: 1 where all shares are equal, 0 for padding.
    """

    features: KeyedJaggedTensor
    labels: Tensor
    dense: Tensor | None
    rows: Tensor
    kinds: Tensor | None
    weights: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on a device."""
        return Batch(
            self.features.to(device, non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            None if self.dense is None else self.dense.to(device, non_blocking=non_blocking),
            self.rows.to(device, non_blocking=non_blocking),
            None if self.kinds is None else self.kinds.to(device, non_blocking=non_blocking),
            self.weights.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of all tensors until a stream is done with them."""
        self.features.record_stream(stream)  # type: ignore[arg-type]
        for value in (self.labels, self.dense, self.rows, self.kinds, self.weights):
            if value is not None:
                value.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU need not wait."""
        return Batch(
            self.features.pin_memory(),
            self.labels.pin_memory(),
            None if self.dense is None else self.dense.pin_memory(),
            self.rows.pin_memory(),
            None if self.kinds is None else self.kinds.pin_memory(),
            self.weights.pin_memory(),
        )


def share_weights(num_real: int, padded: int, world: int, num_rows: int) -> Tensor:
    """Return the weights of a share: (padded,) float32, 0 for the rows after the first `num_real`.

    Args:
        num_real: rows of the share that are not padding.
        padded: rows of the share, the same on every rank.
        world: ranks.
        num_rows: rows of the global batch.

    Example:
        >>> share_weights(1, 2, 2, 3)
        tensor([1.3333, 0.0000])
    """
    weights = torch.full((padded,), padded * world / num_rows)
    weights[num_real:] = 0
    return weights
