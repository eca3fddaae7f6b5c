"""The rows of one table that have a few bits and are trained where they lie."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_compress.methods.storage import TrainedPart
from torchrec_compress.modules.features import LookedUpTable
from torchrec_compress.modules.row_optimizer import RowOptimizer
from torchrec_compress.ops import (
    TrainedFormat,
    TrainedStep,
    are_encoded,
    are_states,
    decode_trained,
    encode_trained,
    keep_integers,
    num_writes,
    trained_bag,
)
from torchrec_compress.seams import optimizers_in_backward

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 8192  # rows that are floats at once, and integers of 64 bits while they are rounded
_MOST_STEPS = 2**62  # so that counting on from a checkpoint does not overflow


@dataclass(frozen=True)
class TrainedTable(LookedUpTable):
    """A table of trained rows.

    Args:
        part: what it is stored as.
        seed: of the dither.
        is_mean: whether bags are means; sums otherwise.
    """

    part: TrainedPart
    seed: int
    is_mean: bool


class TrainedRows(nn.Module):
    """The rows of one table, all of them or those of a rank, and the state of the optimizer that trains them.

    Args:
        table: the whole table.
        first_row: the first that is held here.
        num_rows: how many are.
        device: of all tensors.

    Attributes:
        rows: buffer, (num_rows, bytes per row) uint8, see `ops.TrainedFormat`.
        state: (num_rows, bytes of state per row) uint8; without columns before an optimizer is known, and no part of
            the state dict: like the state of any optimizer, it is the optimizer's.
        num_steps: (1,) int64 on the host, look-ups in training, which number the steps of the dither.
        defers_faults: whether what is wrong with gradients is raised by `raise_fault`, on all ranks, rather than in the
            backward of the one rank that owns the id, for which the others would wait.
        load_fault: what was wrong with the optimizer's state that was loaded last, or None.
    """

    def __init__(self, table: TrainedTable, first_row: int, num_rows: int, device: torch.device | None) -> None:
        super().__init__()
        self._table, self.first_row = table, first_row
        self._format = table.part.format()
        self.register_buffer("rows", torch.zeros(num_rows, self._format.row_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("state", torch.zeros(num_rows, 0, dtype=torch.uint8, device=device), persistent=False)
        self.rows: Tensor
        self.state: Tensor
        self.num_steps = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.defers_faults = False
        self._fault: ValueError | None = None
        self.load_fault: str | None = None
        self._optimizer: RowOptimizer | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rows anew, block by block, from the table's seed and their numbers."""
        rows = self._buffers["rows"]
        assert rows is not None
        if not rows.is_meta:
            for first in range(0, len(rows), _BLOCK_ROWS):
                block = torch.empty(
                    min(_BLOCK_ROWS, len(rows) - first), self._format.width, dtype=torch.float32, device="cpu"
                )
                start = self.first_row + first
                self._table.part.start.fill(block, start, 0)
                ids = torch.arange(start, start + len(block))
                encoded = encode_trained(block, self._format, self._table.where, ids)
                rows[first : first + len(block)] = encoded.to(rows.device)
            self.forget()
        self.note()

    def forget(self) -> None:
        """Start the optimizer's state anew."""
        self.state.zero_()
        self.num_steps.zero_()

    def note(self) -> None:
        """Take the rows as they are for what training, a fit or a checkpoint made of them."""
        rows = self._buffers["rows"]
        assert rows is not None
        self._written = num_writes(rows)

    def check_intact(self) -> None:
        """Look at rows that something else has written to, as an average of models does.

        Raises:
            ValueError: they are no rows that training makes.
        """
        rows = self._buffers["rows"]  # past the attributes that fx records
        assert rows is not None
        if rows.is_meta or self._written in (-1, num_writes(rows)):
            return
        self.check_encoded(rows)
        logger.warning(
            "%s: its rows of %d bits were written by something else than training, a fit or a checkpoint; a copy of "
            "others is fine, an average of several is not",
            self._table.where,
            self._format.bits,
        )
        self.note()

    def check_encoded(self, rows: Tensor) -> None:
        """Raise ValueError unless these are bytes that training could have made, (n, bytes per row) uint8."""
        wrong = ~are_encoded(rows, self._format, self._table.where)
        if bool(wrong.any()):
            number = self.first_row + int(wrong.nonzero()[0])
            raise ValueError(
                f"{self._table.where}: rows of {self._format.bits} bits must be as training, a fit or a checkpoint "
                f"made them, got others, first that of id {number}, as an average of models makes them; average "
                "floating-point tensors alone, and take such rows from one of the models as they are"
            )

    @property
    def optimizer(self) -> RowOptimizer | None:
        """What trains the rows, or None as long as nothing does."""
        return self._optimizer

    def train_by(self, optimizer: RowOptimizer) -> None:
        """Have an optimizer train the rows; its state is made when another one did before.

        Raises:
            ValueError: there is a state of another optimizer.
        """
        wanted = self._table.part.format(optimizer.kind)
        if self._optimizer is None and optimizer.given != optimizer.kind:
            logger.info(
                "%s: trained by %s, as its method says, at the learning rate that %s was given",
                self._table.where,
                optimizer.kind,
                optimizer.given,
            )
        if self._optimizer is None and optimizer.kind == "sgd" and self._table.part.state_bits != 32:
            logger.info("%s: state_bits changes nothing, as %s keeps no state", self._table.where, optimizer.given)
        if self.state.shape[1] != wanted.state_bytes or self.state.device != self.rows.device:
            if self._optimizer is not None and self._optimizer.kind != optimizer.kind:
                raise ValueError(
                    f"{self._table.where}: rows must be trained by one optimizer, got {optimizer.kind} after "
                    f"{self._optimizer.kind}, whose state they keep; make the collection anew to change it"
                )
            self.state = torch.zeros(len(self.rows), wanted.state_bytes, dtype=torch.uint8, device=self.rows.device)
            self.num_steps.zero_()  # Adam makes up for moments that begin at zero by the number of steps since
        self._optimizer, self._format = optimizer, wanted

    def check_state(self) -> None:
        """Raise ValueError where state or steps are not those that the optimizer of these rows keeps."""
        form, shape = self._format, tuple(self.state.shape)
        kept = f"{form.optimizer} in {form.state_bits} bits"
        if shape != (len(self.rows), form.state_bytes):
            raise ValueError(
                f"{self._table.where}: the optimizer's state must be of {kept}, {(len(self.rows), form.state_bytes)}, "
                f"got {shape}; load it into tables with the optimizer and state_bits that it was saved with"
            )
        if not are_states(self.state, form):
            raise ValueError(
                f"{self._table.where}: the optimizer's state must be finite, and of squares not negative ({kept}), got "
                "others; load a checkpoint that was not damaged"
            )
        if not 0 <= int(self.num_steps) < _MOST_STEPS:
            raise ValueError(
                f"{self._table.where}: the optimizer's step must be in [0, 2**62), got {int(self.num_steps)}; load a "
                "checkpoint that was not damaged"
            )

    def look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, where: str) -> Tensor:
        """Return bags of rows, (B, width) float32, that no backward trains.

        Args:
            ids: (L,) integer, counted from `first_row`.
            offsets: (B + 1,), or None for one bag an id.
            weights: (L,) factors, or None.
            where: names the look-up in errors.
        """
        self.check_intact()
        is_mean = self._table.is_mean and offsets is not None
        return serve(self.rows, ids, offsets, weights, self._format.width, self._format.bits, is_mean, where)

    def look_up_to_train(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, where: str) -> Tensor:
        """Return the same, and have the backward train the rows; arguments as in `look_up`.

        A backward through a graph that was kept updates again, and rounds by another dither.

        Raises:
            ValueError: the rows were made under `torch.inference_mode`, and torch lets no one write to them; in the
                backward, no optimizer trains the rows.
        """
        self.check_intact()
        if self.rows.is_inference():
            raise ValueError(
                f"{self._table.where}: rows of {self._format.bits} bits must be made outside of torch.inference_mode() "
                "to be trained, got ones made under it; make the collection, and shard it, outside of it"
            )
        step = partial(self._step, self._optimizer, int(self.num_steps), count())
        self.num_steps += 1
        bags = partial(trained_bag, is_mean=self._table.is_mean and offsets is not None, step=step, where=where)
        return bags(self.rows, self.state, ids, offsets, self._format, weights=weights)

    @contextmanager
    def _step(self, optimizer: RowOptimizer | None, number: int, again: Iterator[int]) -> Iterator[TrainedStep | None]:
        """Enclose what a backward of a look-up does, at the rate of that moment; None: nothing, at the rate 0.

        Args:
            optimizer: of the moment of the look-up.
            number: of the step.
            again: counts the backwards of the look-up.
        """
        self.check_intact()
        if optimizer is None:
            raise ValueError(
                f"{self._table.where}: rows of {self._format.bits} bits must be trained in the backward by an "
                "optimizer that is given before the look-up, got none; call apply_optimizer_in_backward("
                'torch.optim.Adagrad, native_parameters(model), {"lr": ...}), or shard the model by '
                "DistributedModelParallel; model.requires_grad_(False) leaves rows as they are"
            )
        rate, seed = optimizer.rate, (self._table.seed + next(again)) % 2**63
        step = TrainedStep(rate, optimizer.eps, seed, number, self.first_row, *optimizer.betas)
        try:
            yield step if rate else None
        except ValueError as error:
            if not self.defers_faults:
                raise
            logger.error("%s (all ranks raise it with the next batch)", error)
            self._fault = self._fault or error
        self.note()

    def raise_fault(self) -> None:
        """Raise ValueError, once, of a backward whose gradients were wrong, which has written nothing; or of a load."""
        if self.load_fault is not None:
            raise ValueError(self.load_fault)
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def served(self, ids: Tensor) -> Tensor:
        """Return rows, (L, width) float32."""
        self.check_intact()
        return decode_trained(self.rows.index_select(0, ids), self._format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedRows:
        super()._apply(keep_integers(fn, self._table.where), recurse)
        self.note()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        rows = state_dict.get(prefix + "rows")
        if isinstance(rows, Tensor) and rows.shape[1:] == self.rows.shape[1:] and not rows.is_meta:
            self.check_encoded(rows)  # before any byte is written; other shapes torch refuses
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.note()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note()  # a copy's count of writes begins anew


class WholeRows(TrainedRows):
    """All rows of one table, and the parameter that says who trains them.

    Attributes:
        handle: parameter, (0, width) float32: what `apply_optimizer_in_backward` marks. It is no part of the state
            dict.
    """

    def __init__(self, table: TrainedTable, device: torch.device | None) -> None:
        super().__init__(table, 0, table.num_embeddings, device)
        with torch.inference_mode(False):  # or what marks it would fail, in torch's words
            self.handle = nn.Parameter(torch.empty(0, table.part.width, dtype=torch.float32, device=device))
        self._holder: torch.optim.Optimizer | None = None

    def find_optimizer(self) -> None:
        """Take the optimizer that `apply_optimizer_in_backward` gave the table, if it did.

        Raises:
            ValueError: it gave several, or one that the rows cannot be trained by.
        """
        holders = optimizers_in_backward(self.handle)
        if holders == [self._holder]:
            return
        if not holders:  # of a copy too, which no mark of the original's reaches
            self._optimizer = self._holder = None
            return
        if len(holders) > 1:
            raise ValueError(
                f"{self._table.where}: rows of {self._format.bits} bits must be trained by one optimizer, got "
                f"{[type(holder).__name__ for holder in holders]}"
            )
        if not hasattr(holders[0], "param_groups"):
            raise ValueError(
                f"{self._table.where}: rows must be trained by an optimizer of torch.optim, got TorchRec's stand-in "
                f"{type(holders[0]).__name__}, which sharded tables alone understand; shard the model, or name torch's"
            )
        group = holders[0].param_groups[0]
        self.train_by(RowOptimizer.of(type(holders[0]).__name__, group, self._table.part, self._table.where))
        self._holder = holders[0]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "handle"]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        handle = self._parameters.pop("handle")
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._parameters["handle"] = handle


def note_rows(module: nn.Module) -> None:
    """Take the trained rows of a model as they are for what a checkpoint made of them; whoever copies them calls it."""
    for part in module.modules():
        if isinstance(part, TrainedRows):
            part.note()


@torch.fx.wrap
def serve(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    width: int,
    bits: int,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return bags of rows, (B, width) float32, that no backward trains.

    Args:
        rows: (N, bytes per row) uint8.
        ids: (L,) integer.
        offsets: (B + 1,), or None for one bag an id.
        weights: (L,) factors, or None.
        width, bits: of the rows.
        is_mean: whether bags are means.
        where: names the look-up in errors.
    """
    state = rows.new_empty(len(rows), 0)
    form = TrainedFormat(width, bits, "sgd")  # type: ignore[arg-type]
    return trained_bag(rows, state, ids, offsets, form, weights=weights, is_mean=is_mean, step=None, where=where)
