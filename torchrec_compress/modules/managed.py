"""Native tables with managers: whose ids get other rows while they are trained."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.managers import OwnedTable
from torchrec_compress.methods.storage import ManagedPart
from torchrec_compress.modules.features import IdRange, LookedUpTable, split_features
from torchrec_compress.modules.replicated import SHARDERS, strip_where_replicated
from torchrec_compress.modules.turn import Turn
from torchrec_compress.ops import can_check
from torchrec_compress.seams import optimizers_in_backward

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("split_features")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManagedTable(LookedUpTable):
    """A table with a manager.

    Args:
        part: what it is stored as.
        native: config of the native table "rows"; its one feature is the table's name.
    """

    part: ManagedPart
    native: EmbeddingConfig


class ManagedOwner(ABC, nn.Module):
    """Whoever holds the rows of tables with managers, sharded or not: does look-ups, and ends steps.

    Attributes:
        managers: by table name.
    """

    managers: Any  # Any: a ModuleDict forgets the type of its values

    def __init__(self) -> None:
        super().__init__()
        self._turns: dict[str, Turn] = {}
        self._told: set[str] = set()

    @abstractmethod
    def owned(self, name: str, optimizer: Any) -> OwnedTable | None:
        """Return a table as this rank holds it, or None where it holds none of it.

        Args:
            name: of the table.
            optimizer: that trains it outside of the backward, or None.
        """

    def check_integers(self, name: str) -> None:
        """Look at the integers of a manager where something else than itself has written to them.

        Torch's counts of writes are read first, which no device is waited for. What cannot be of the manager's own
        making is refused; what can, as a copy of another's integers, is warned of.

        Raises:
            ValueError: they do not go together.
        """
        manager = self.managers[name]
        if torch.compiler.is_compiling() or manager.is_unwritten:
            return
        integers = [buffer for buffer in manager.buffers() if not buffer.dtype.is_floating_point]
        if not all(map(can_check, integers)):
            return
        if integers and integers[0].is_cuda:
            torch.cuda.synchronize(integers[0].device)  # they may have been written on another stream
        fault = manager.fault()
        if fault is not None:
            raise ValueError(
                f"table {name!r}: the integers of its manager must be those that after_step or a checkpoint left, got "
                f"{fault}, as an average over models, over steps or a blend of state dicts leaves them; average "
                "parameters only (AveragedModel's default, use_buffers=False, copies buffers as they are) and load the "
                "checkpoint again"
            )
        if manager.knows_writes and name not in self._told:
            logger.warning(
                "table %r: the integers of its manager were written by something else than after_step or "
                "load_state_dict; a copy of another model's is fine, an average of several is not",
                name,
            )
            self._told.add(name)
        manager.note_writes()

    def lookups_of_batch(self, name: str) -> int:
        """Return how often a batch looks a table up; sharded, its features travel together."""
        return 1

    @property
    def trains(self) -> bool:
        """Whether a look-up of a batch, now, is one of a training step."""
        return self.training and torch.is_grad_enabled()

    def rows(self, name: str, places: Tensor, gather: Callable[[Tensor], Tensor], trains: bool) -> Tensor:
        """Return what the ids at some places are served, (L, D), and have the manager see its gradient.

        Args:
            name: of the table.
            places: (L,) integer, counted from the first that is held here.
            gather: (n,) int64 rows of the native table -> (n, D).
            trains: whether the look-up is one of a training step.

        Raises:
            RuntimeError: in training, long after the last `after_step`; in the backward, where one came before it.
        """
        turn = self._turns.setdefault(name, Turn())
        if trains:
            if isinstance(places, torch.fx.Proxy):
                raise ValueError(
                    f"table {name!r}: a table with a manager must be traced in evaluation mode, got it in training, "
                    "whose gradients a trace would not show it; call eval() first, or shard it"
                )
            turn.check_told(name, self.lookups_of_batch(name))
        with torch.no_grad():
            rows = self.managers[name].remap(places, train=trains)
        found = gather(rows[:, 0]) if self.managers[name].reads == 1 else _sum_of_reads(rows, gather)
        if trains and found.requires_grad:
            found.register_hook(partial(self._profile, name, turn, places))
        return found

    def _profile(self, name: str, turn: Turn, places: Tensor, gradients: Tensor) -> None:
        turn.check_open(name)
        if not turn.is_discarded:
            turn.backwards += 1
            self.managers[name].profile(places, gradients.detach())

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Any = None) -> None:
        """Have every manager end a step; arguments as for `torchrec_compress.after_step`."""
        for name, manager in self.managers.items():
            table = self.owned(name, optimizer)
            if table is not None:
                self.check_integers(name)
                manager.after_step(table, step)
                manager.note_writes()
            if name in self._turns:
                self._turns.pop(name).is_over = True

    def discard(self) -> None:
        """Forget what was looked up since the last step."""
        for name, manager in self.managers.items():
            manager.discard()
            if name in self._turns:
                self._turns.pop(name).is_discarded = True


def _sum_of_reads(rows: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sums of the rows that ids read, (L, D): (L, reads) int64, where -1 is none."""
    exists = rows >= 0
    # what there is none of is the id's first row times zero: no row is touched that is not read anyway
    read = torch.where(exists, rows, rows[:, :1])
    found = gather(read.flatten()).unflatten(0, rows.shape)
    return (found * exists.unsqueeze(2).to(found.dtype)).sum(1)


class ManagedCollection(ManagedOwner):
    """Hold whole tables with managers, and look up their rows.

    Args:
        tables: one config per table.
        device: of rows and managers.

    Attributes:
        native: stock collections of one table each, by table name.
        also_checked: ids of dense tables beside it, which its sharded form checks before any rank waits for another.
    """

    also_checked: Sequence[IdRange] = ()

    def __init__(self, tables: Sequence[ManagedTable], device: torch.device | None = None) -> None:
        super().__init__()
        self._tables = tuple(tables)
        self.native: Any = nn.ModuleDict(
            {table.name: EmbeddingCollection(tables=[table.native], device=device) for table in tables}
        )
        self.managers = nn.ModuleDict(
            {table.name: table.part.manager(table.part.blocks.num_blocks, device) for table in tables}
        )

    def configs(self) -> tuple[ManagedTable, ...]:
        """Return the configs of the tables."""
        return self._tables

    def managed_bytes(self, name: str) -> int:
        """Return the bytes that the manager of a table keeps beside its rows."""
        return sum(buffer.nbytes for buffer in self.managers[name].buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ManagedCollection:
        # the last call before DistributedDataParallel wraps tables that no sharder has taken
        for native in self.native.values():
            if type(native) is EmbeddingCollection:
                strip_where_replicated(native)
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Have all managers start anew; the rows are reset by the collection."""
        for manager in self.managers.values():
            manager.reset_parameters()

    def weight(self, name: str, trains: bool = False) -> Tensor:
        """Return the rows of a table, (rows, D), to be trained or not.

        Raises:
            ValueError: TorchRec's sharders have taken them, or several ranks would train copies of them.
        """
        native = self.native[name]
        (config,) = (table.native for table in self._tables if table.name == name)
        if type(native) is not EmbeddingCollection:
            raise ValueError(
                f"table {name!r}: a table with a manager must be sharded by the sharders of compressed collections, "
                f"got {type(native).__name__}; {SHARDERS}"
            )
        if trains and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"table {name!r}: several ranks must share a table with a manager, got a copy on each, which would "
                f"drift apart; {SHARDERS}"
            )
        weight: Tensor = native.embeddings[config.name].weight  # type: ignore[assignment]
        return weight

    def served(self, name: str, ids: Tensor, trains: bool = False) -> Tensor:
        """Return what ids are served, (L, D), without a batch around them, in a training step or not."""
        self.check_integers(name)
        (part,) = (table.part for table in self._tables if table.name == name)
        gather = partial(nn.functional.embedding, weight=self.weight(name, trains))
        return self.rows(name, part.blocks.places(ids), gather, trains)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the rows of every look-up, (L, D) by its key.

        Raises:
            ValueError: an id is out of range, a table is not sharded as it must be, or something has averaged the
                integers of its manager.
            RuntimeError: as `rows`.
        """
        jagged = split_features(features)
        found: dict[str, Tensor] = {}
        for table in self._tables:
            for key, ids in zip(table.keys, table.ids(jagged), strict=True):
                found[key] = self.served(table.name, ids, self.trains)
        return found

    def lookups_of_batch(self, name: str) -> int:
        """Return how often a batch looks a table up: once for each of its features."""
        (table,) = (table for table in self._tables if table.name == name)
        return len(table.features)

    def owned(self, name: str, optimizer: Any) -> OwnedTable:
        """Return a table, all of it.

        Raises:
            ValueError: no optimizer is known to train it, or one keeps a state whose rows are not the table's.
        """
        weight = self.weight(name)
        (part,) = (table.part for table in self._tables if table.name == name)
        state = row_states(weight, optimizer, f"table {name!r}")
        return OwnedTable(0, part.blocks.num_places, {"rows": weight.detach()}, {"rows": state})


class ManagedBagRows(ManagedCollection):
    """Tables with managers of a pooled collection, whose sharder takes the settings of the user's bags."""


def row_states(weight: Tensor, optimizer: Any, where: str) -> dict[str, Tensor]:
    """Return the state that an optimizer keeps for each row of an unsharded weight, by name.

    Args:
        weight: the parameter.
        optimizer: that trains it; ignored where one does in the backward.
        where: names the table in errors.

    Raises:
        ValueError: there is no optimizer, it does not train the weight, or a state has other rows.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> weight.grad = torch.ones(3, 2)
        >>> optimizer = torch.optim.Adam([weight])
        >>> optimizer.step()
        >>> {name: tuple(state.shape) for name, state in row_states(weight, optimizer, "table 'user'").items()}
        {'exp_avg': (3, 2), 'exp_avg_sq': (3, 2)}
    """
    if not weight.requires_grad:
        return {}
    holders = optimizers_in_backward(weight) or ([] if optimizer is None else [optimizer])
    if not holders:
        raise ValueError(
            f"{where}: the optimizer that trains its rows must be known, so that their state moves with them, got "
            "none; call after_step(model, step, optimizer)"
        )
    found: dict[str, Tensor] = {}
    for holder in holders:
        if not any(each is weight for group in holder.param_groups for each in group["params"]):
            raise ValueError(
                f"{where}: the optimizer given to after_step must train its rows, got {type(holder).__name__} of other "
                "parameters; give it all of the model's optimizers as one (torchrec.optim.keyed.CombinedOptimizer)"
            )
        for name, value in holder.state.get(weight, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue  # kept once for all rows, as the count of steps
            if value.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"{where}: an optimizer's state must have a row for each of {weight.shape[0]}, got {name!r} of "
                    f"shape {tuple(value.shape)}; train it by another optimizer"
                )
            found[name] = value
    return found
