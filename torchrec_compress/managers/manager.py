"""What changes the rows of a table other than by their gradient: the contract between a table's owner and its manager.

A table's ids are dealt to blocks like cards, and a rank owns whole blocks: rows, optimizer state and all that a
manager knows of an id lie with its block. So every tensor is cut over the ranks like the rows, and any number of ranks
that divides the number of blocks loads what any other saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_compress.ops import num_writes


@dataclass(frozen=True)
class Blocks:
    """How the ids of a table are dealt to blocks: id i to block i mod num_blocks.

    Dealt, not cut into runs: where ids are sorted by popularity, the first run would hold all that are popular.

    Args:
        num_ids: of the table, N.
        num_blocks: whole blocks lie on one rank.

    Example:
        >>> blocks = Blocks(num_ids=10, num_blocks=4)
        >>> blocks.places(torch.tensor([0, 1, 4, 9])).tolist(), blocks.num_places
        ([0, 3, 1, 5], 12)
    """

    num_ids: int
    num_blocks: int

    @property
    def ids_per_block(self) -> int:
        """Places of a block; the last may be empty."""
        return -(-self.num_ids // self.num_blocks)

    @property
    def num_places(self) -> int:
        """Places of all blocks."""
        return self.ids_per_block * self.num_blocks

    @property
    def places_at_once(self) -> int:
        """Places of the whole blocks that a fit takes together: a sixteenth of them, where there are as many."""
        return self.ids_per_block * -(-self.num_blocks // 16)

    def places(self, ids: Tensor) -> Tensor:
        """Return where ids are in the order of the blocks: (L,) integer -> (L,) int64 in [0, num_places)."""
        ids = ids.long()
        of_block = torch.div(ids, self.num_blocks, rounding_mode="floor")
        return ids % self.num_blocks * self.ids_per_block + of_block


class OwnedTable(NamedTuple):
    """One of the user's tables as this rank holds it: live tensors, never copies. Unsharded: the whole table.

    Args:
        first_place: places [first_place, first_place + num_places) live here; whole blocks.
        num_places: that live here.
        weights: by native part, (rows here, width) floating point.
        optimizer_state: by part, by name, (rows here,) or (rows here, width); what an optimizer keeps once for all rows
            is not among it.
        group: the ranks that share the table, or None where this one holds all of it.
    """

    first_place: int
    num_places: int
    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Mapping[str, Tensor]]
    group: dist.ProcessGroup | None = None


class _Writes(NamedTuple):
    """A buffer, where it is held, and torch's count of what had written to it."""

    held: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    number: int

    @property
    def is_last(self) -> bool:
        """Whether it is still held, and nothing has written to it since."""
        return self.held[self.name] is self.buffer and num_writes(self.buffer) == self.number


class TableManager(nn.Module, ABC):
    """What changes a table other than by its gradient. It holds no table; its buffers are its checkpoint.

    Buffers are two-dimensional, start as zeros, and have a first axis that is a multiple of the blocks: they are cut
    with the rows. They keep their dtypes whatever a model is cast to. Their integers mean nothing once they are
    averaged: who holds the manager notes its own writes, and asks for a `fault` where there were others. The outcome is
    a pure function of state, batches, step and seed, never of the number of ranks: hash an id's place in its block, add
    in an order that no rank changes.
    """

    training_only: tuple[str, ...] = ()
    """Buffers that no look-up of a trained model reads."""

    def __init__(self) -> None:
        super().__init__()
        self._noted_writes: list[_Writes] | None = None
        self.register_load_state_dict_post_hook(_forget_writes)

    @property
    @abstractmethod
    def layout(self) -> tuple[int, ...]:
        """Whole numbers that say what the rows and buffers of a block are, where shapes alone do not.

        State dicts of another layout are refused.
        """

    @abstractmethod
    def after_step(self, table: OwnedTable, step: int) -> None:
        """Re-cluster, re-fit, promote, demote, re-encode.

        Every rank that holds blocks of the table calls it after every step of the optimizer and before the next
        look-up, without autograd. Collectives over `table.group` are allowed. What has nothing to do in a step returns.

        Args:
            table: the rows, and their optimizer state.
            step: the number of the step, from 0.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget what was noted since the last `after_step`: the batch is left out."""

    @abstractmethod
    def fault(self) -> str | None:
        """Return what does not hold of the integers among its buffers, or None where it may have written them itself.

        It may wait for the device.
        """

    @property
    def knows_writes(self) -> bool:
        """Whether writes were noted since the buffers were made, copied, moved or loaded."""
        return self._noted_writes is not None

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing has written to integers since `note_writes`; what writes through `.data` is not counted."""
        if self._noted_writes is None:
            return False
        return all([noted.is_last for noted in self._noted_writes])

    def note_writes(self) -> None:
        """Take what the integers are now as its own."""
        self._noted_writes = [
            _Writes(module._buffers, name, buffer, num_writes(buffer))
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.dtype.is_floating_point
        ]

    def forget_writes(self) -> None:
        """Take what the integers are now as unknown."""
        self._noted_writes = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted_writes": None}  # a copy's tensors are others

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TableManager:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        self.forget_writes()
        return super()._apply(moved, recurse)  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Forget everything; called after a move from the meta device."""
        for buffer in self.buffers():
            if not buffer.is_meta:
                buffer.zero_()
        self.note_writes()
        self.discard()


def _forget_writes(manager: TableManager, _incompatible: Any) -> None:
    manager.forget_writes()


class RowManager(TableManager):
    """Also decides which rows of the native part "rows" an id has now."""

    reads: int
    """Rows whose sum an id is served, at most."""

    @abstractmethod
    def remap(self, places: Tensor, *, train: bool) -> Tensor:
        """Return the rows of ids.

        Called behind the exchange, where the rows are. Without `train` it changes nothing.

        Args:
            places: (L,) integer, counted from `OwnedTable.first_place`.
            train: whether the look-up is one of a training step.

        Returns:
            (L, reads) int64 rows of this rank; -1 is none, but in the first column.
        """

    @abstractmethod
    def profile(self, places: Tensor, gradients: Tensor) -> None:
        """Note the gradients of a look-up, inside the backward and before a fused optimizer steps.

        A batch may still be left out, so that nothing of it may reach the buffers before `after_step`.

        Args:
            places: (L,) as in `remap`.
            gradients: (L, D) floating point, of what each look-up was served.
        """


def move_rows(table: OwnedTable, part: str, source: Tensor, target: Tensor) -> None:
    """Copy rows of a part: the weight and every optimizer state of it.

    Args:
        table: that holds them.
        part: the native part.
        source: (L,) or (L, reads) int64 rows; -1 is none. The sum of the weights is copied, and the state of the first.
        target: (L,) int64 rows, where equal ones have equal sources, and none is another's source.

    Example:
        >>> weight, momentum = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([5.0, 6.0, 7.0])
        >>> table = OwnedTable(0, 3, {"rows": weight}, {"rows": {"sum": momentum}})
        >>> move_rows(table, "rows", torch.tensor([[0, 1]]), torch.tensor([2]))
        >>> weight.tolist(), momentum.tolist()
        ([[1.0], [2.0], [3.0]], [5.0, 6.0, 5.0])
    """
    weight = table.weights[part]
    read = source.unsqueeze(1) if source.dim() == 1 else source
    values = weight.index_select(0, read[:, 0])
    for column in read.unbind(1)[1:]:
        more = weight.index_select(0, column.clamp(min=0))
        values = values + torch.where((column >= 0).unsqueeze(1), more, torch.zeros_like(more))
    weight.index_copy_(0, target, values)
    for state in table.optimizer_state.get(part, {}).values():
        state.index_copy_(0, target, state.index_select(0, read[:, 0]))
