"""Which optimizer trains rows of a few bits: the one that the user gives stock tables, or the method's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrec_compress.methods.storage import TrainedPart
from torchrec_compress.ops import TrainedOptimizer

# by the class that `apply_optimizer_in_backward` was given, or the value of FBGEMM's EmbOptimType
_KINDS: dict[str, TrainedOptimizer] = {
    "SGD": "sgd",
    "sgd": "sgd",
    "exact_sgd": "sgd",
    "Adagrad": "adagrad",
    "exact_adagrad": "adagrad",
    "RowWiseAdagrad": "rowwise_adagrad",
    "exact_row_wise_adagrad": "rowwise_adagrad",
    "Adam": "adam",
    "adam": "adam",
    "PartialRowWiseAdam": "partial_rowwise_adam",
    "partial_row_wise_adam": "partial_rowwise_adam",
}
# those of one learning rate
_FAMILIES: tuple[tuple[TrainedOptimizer, ...], ...] = (
    ("sgd",),
    ("adagrad", "rowwise_adagrad"),
    ("adam", "partial_rowwise_adam"),
)
# settings that do something else than their being left out would, by the value that leaves it so
_OFF: dict[str, Any] = {
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
    "lr_decay": 0,
    "initial_accumulator_value": 0,
    "amsgrad": False,
    "decoupled_weight_decay": False,
}
# how torch computes, not what, beside what is read
_KNOWN = {"lr", "eps", "params", *_OFF, "foreach", "fused", "differentiable", "capturable", "initial_lr"}
BETAS = (0.9, 0.999)  # what torch and FBGEMM take where nothing is said


@dataclass(frozen=True)
class RowOptimizer:
    """What trains the rows of one table.

    Args:
        kind: of the optimizer.
        given: of the one that the user gave tables, whose settings count.
        group: the settings that the user sees, read at every step: "lr", "eps" but with SGD, "betas" with Adam.
    """

    kind: TrainedOptimizer
    given: TrainedOptimizer
    group: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, group: Mapping[str, Any], part: TrainedPart, where: str) -> RowOptimizer:
        """Return what trains a table.

        Args:
            name: of the optimizer's class, or of FBGEMM's `EmbOptimType`.
            group: its settings.
            part: of the table; its own choice of optimizer comes first.
            where: names the table in errors.

        Raises:
            ValueError: rows of a few bits cannot be trained so.
        """
        kind = _KINDS.get(name)
        if kind is None:
            raise ValueError(
                f"{where}: rows of {part.bits} bits must be trained by one of SGD, Adagrad, RowWiseAdagrad, Adam and "
                f"PartialRowWiseAdam, got {name}; choose one of them for native_parameters(model)"
            )
        family = next(family for family in _FAMILIES if kind in family)
        known = {*_KNOWN, "betas"} if "adam" in family else _KNOWN
        wrong = {key: value for key, value in group.items() if key not in known or value != _OFF.get(key, value)}
        if wrong:
            raise ValueError(
                f"{where}: rows of {part.bits} bits are trained without {sorted(wrong)}, got {wrong}; leave them out"
            )
        wanted = part.optimizer or kind
        if wanted not in family:
            raise ValueError(
                f"{where}: the method's optimizer must go with the learning rate of the one that tables are given, got "
                f"{wanted} for {kind}; leave it out, or give tables one of its kind"
            )
        found = cls(wanted, kind, group)
        if not all(0 <= beta < 1 for beta in found.betas):
            raise ValueError(f"{where}: betas must be in [0, 1), got {found.betas}")
        return found

    @property
    def rate(self) -> float:
        """The learning rate, now."""
        return float(self.group["lr"])

    @property
    def eps(self) -> float:
        """What is added to the root of the state."""
        return float(self.group.get("eps", 0.0))

    @property
    def betas(self) -> tuple[float, float]:
        """How much of Adam's two moments a step keeps."""
        first, second = self.group.get("betas", BETAS)
        return float(first), float(second)
