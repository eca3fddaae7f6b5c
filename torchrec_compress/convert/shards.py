"""Rows of a table that many ranks hold, and what they make of their own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.learned import BLOCK_ROWS, Learned
from torchrec_compress.seams import is_cut_by_rows, local_shards

Result = TypeVar("Result")


class Crew:
    """The ranks that compress a model together.

    Args:
        group: of them.
        device: that the group's collectives take.

    Attributes:
        rank, world_size: in the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def add(self, tensor: Tensor) -> None:
        """Make a tensor, in place, the sum of those of all ranks."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def join(self, rows: Tensor) -> None:
        """Put rows together, in place, of which each rank has some and zeros for the others, whatever they hold."""
        self._reduce(rows.view(torch.uint8), dist.ReduceOp.MAX)

    def most(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        found = torch.tensor([number])
        self._reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def share(self, number: int) -> range:
        """Return which of so many are this rank's, as none is another's."""
        return range(number * self.rank // self.world_size, number * (self.rank + 1) // self.world_size)

    def _reduce(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        there = tensor.to(self._device)
        dist.all_reduce(there, how, group=self._group)
        if there is not tensor:
            tensor.copy_(there)

    def together(self, work: Callable[[], Result]) -> Result:
        """Return what work without collectives returns, or raise on every rank what it raised on one.

        Raises:
            Exception: this rank's error, whatever it is; on the others a ValueError that quotes that of the first.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 (the others must not wait for this rank)
            error = caught
        said: list[str | None] = [None] * self.world_size
        dist.all_gather_object(said, None if error is None else str(error), group=self._group)
        for rank, message in enumerate(said):
            if message is not None:
                raise error or ValueError(f"rank {rank}: {message}")
        return result  # type: ignore[return-value]

    def check_same(self, values: Mapping[str, tuple[str, str]]) -> None:
        """Raise ValueError on every rank unless all were given the same.

        Args:
            values: a digest, and what to do where it differs, by what was given.
        """
        everyone: list[Mapping[str, tuple[str, str]]] = [{}] * self.world_size
        dist.all_gather_object(everyone, values, group=self._group)
        for what, (mine, advice) in everyone[0].items():
            others = [rank for rank, theirs in enumerate(everyone) if theirs[what][0] != mine]
            if others:
                raise ValueError(
                    f"compress: {what} must be the same on all ranks, got others on ranks {others} than on rank 0; "
                    f"{advice}"
                )


class SharedRows:
    """The rows of one table, as ranks hold them.

    Args:
        table: its config.
        weight: as a state dict holds it: sharded, or whole on every rank.
        crew: the ranks; all of them make it, and read together.

    Attributes:
        mine: (L,) int64 ids of rows that this rank holds whole and no other does; None where rows are cut by columns
            or lie on every rank.
    """

    def __init__(self, table: BaseEmbeddingConfig, weight: object, crew: Crew) -> None:
        self._table, self._shards, self._crew = table, local_shards(weight), crew
        is_whole = any(offsets is None for _, offsets in self._shards)
        if is_whole and crew.rank:
            self._shards = []  # of copies, one speaks
        self.mine: Tensor | None = None
        if is_cut_by_rows(weight):
            runs = [torch.arange(int(at[0]), int(at[0]) + len(local)) for local, at in self._shards if at is not None]
            self.mine = torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, (L,) int64, the same on every rank, as (L, D) float32 in the host's memory."""
        found = self._held(ids)
        self._crew.add(found)
        return found

    @torch.no_grad()
    def _held(self, ids: Tensor) -> Tensor:
        """Return the rows of ids as far as this rank holds them, and zeros."""
        found = torch.zeros(len(ids), self._table.embedding_dim)
        for local, offsets in self._shards:
            top, left = (0, 0) if offsets is None else (int(offsets[0]), int(offsets[1]))
            here = (ids >= top) & (ids < top + len(local))
            rows = local.detach()[(ids[here] - top).to(local.device)].float().cpu()
            found[here, left : left + local.shape[1]] = rows
        return found

    def blocks(self, needs_rows: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield ids that are this rank's to encode: those that it holds, else a share of all; with their rows."""
        if self.mine is not None:
            for ids in self.mine.split(BLOCK_ROWS):
                yield ids, self._held(ids) if needs_rows else None
            return
        for ids in torch.arange(self._table.num_embeddings).split(BLOCK_ROWS):
            rows = self(ids) if needs_rows else None
            mine = torch.arange(len(ids)).tensor_split(self._crew.world_size)[self._crew.rank]
            yield ids[mine], None if rows is None else rows[mine]


class EncodedRows:
    """What one rank keeps of the rows that it encoded, until those that shall hold it ask for it.

    Args:
        learned: what makes it.
        rows: of the table.
        crew: the ranks.

    Raises:
        ValueError: on every rank, where a row cannot be encoded on one.
    """

    def __init__(self, learned: Learned, rows: SharedRows, crew: Crew) -> None:
        self._num_rows, self._crew = learned.num_rows, crew
        numbers, kept = [torch.zeros(0, dtype=torch.int64)], []
        failed: list[Exception] = []
        for ids, given in rows.blocks(learned.needs_rows):
            if failed:
                continue  # to the end with the others, who wait for what this rank holds
            try:
                block = learned.encode(ids, given)
            except Exception as error:  # noqa: BLE001 (whatever it is, the others hear of it below)
                failed.append(error)
                continue
            if block is not None:
                numbers.append(learned.row_numbers(ids))
                kept.append(block)
        crew.together(lambda: raise_first(failed))
        self._numbers, order = torch.cat(numbers).sort()
        self._rows = torch.cat(kept)[order] if kept else None

    def blocks(self, width: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield the first number of each block of rows, and the rows, (L, width), the same on every rank."""
        for first in range(0, self._num_rows, BLOCK_ROWS):
            found = torch.zeros(min(BLOCK_ROWS, self._num_rows - first), width, dtype=dtype)
            if self._rows is not None:
                mine = slice(*torch.searchsorted(self._numbers, torch.tensor([first, first + len(found)])).tolist())
                found[self._numbers[mine] - first] = self._rows[mine].to(dtype)
            self._crew.join(found)
            yield first, found


def digest(value: Any) -> str:
    """Return what tells values apart: plain ones by their text, tensors by their bytes, mappings by sorted keys."""
    found = hashlib.sha256()
    _digest(value, found)
    return found.hexdigest()


def _digest(value: Any, found: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(repr(key).encode())
            _digest(value[key], found)
    elif isinstance(value, list | tuple):
        for each in value:
            _digest(each, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found.update(type(value).__name__.encode())
        for field in dataclasses.fields(value):
            _digest(getattr(value, field.name), found)
    else:
        found.update(repr(value).encode())


def raise_first(errors: Sequence[Exception]) -> None:
    """Raise the first of some errors, if there are any."""
    if errors:
        raise errors[0]
