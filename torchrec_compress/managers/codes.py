"""What changes the codes of a table while it trains: the contract between who holds them and their manager.

Codes lie with the owners of their ids, and the decoder of them on every rank. A manager writes both at the end of a
step, so that the next look-up reads new codes by new codebooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class OwnedCodes(NamedTuple):
    """The codes of one table as this rank holds them, and their whole decoder: live tensors, never copies.

    Args:
        name: of the user's table, for errors.
        num_ids: of the whole table, N.
        first_id: ids [first_id, first_id + rows here) lie here.
        codes: (rows here, row_size) integer.
        parameters: of the decoder by name, floating point, equal on every rank.
        buffers: of the decoder by name, likewise equal.
        optimizer_state: by parameter, by name, (rows,) or (rows, width) of the parameter; what an optimizer keeps once
            for all rows is not among it.
        group: the ranks that train the table, or None where this is the only one.
        is_whole: whether each of them holds all codes.
    """

    name: str
    num_ids: int
    first_id: int
    codes: Tensor
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Mapping[str, Tensor]]
    group: dist.ProcessGroup | None = None
    is_whole: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the group, whose results `of_first` gives all."""
        return self.group is None or dist.get_rank(self.group) == 0

    def codes_of(self, ids: Tensor) -> Tensor:
        """Return the codes of ids, wherever they lie: (S,) int64, equal on all ranks -> (S, row_size) int64."""
        here = ids - self.first_id
        is_here = (here >= 0) & (here < len(self.codes))
        found = torch.zeros(len(ids), self.codes.shape[1], dtype=torch.int64, device=self.codes.device)
        found[is_here] = self.codes[here[is_here]].long()
        return self.added_up(found)

    def added_up(self, part: Tensor) -> Tensor:
        """Add a tensor of this rank's ids up over the ranks, in place, and return it; it is all where codes are."""
        if self.group is not None and not self.is_whole:
            dist.all_reduce(part, group=self.group)
        return part

    def of_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor by the first rank's, so that ranks cannot drift apart by rounding, and return it."""
        if self.group is not None:
            as_sent = tensor.view(torch.uint8)  # gloo sends no int16
            dist.broadcast(as_sent, src=dist.get_global_rank(self.group, 0), group=self.group)
        return tensor


class CodeManager(ABC):
    """What changes codes other than by a fit or a checkpoint. A value: all that it remembers is among the buffers.

    The outcome is a pure function of codes, decoder, optimizer state and step, never of the number of ranks.
    """

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Return whether codes change at the end of a step, from 0; it is asked on all ranks, and costs nothing."""

    @abstractmethod
    def change(self, table: OwnedCodes) -> None:
        """Write new codes, codebooks and optimizer state.

        Every rank of the group calls it, after the optimizers have stepped and before the next look-up, without
        autograd. Collectives over the group are allowed.

        Raises:
            ValueError: on all ranks or on none, before anything is written.
        """
