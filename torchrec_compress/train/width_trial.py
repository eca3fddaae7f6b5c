"""Widths of narrow rows that short trainings choose: their words in a config, and the rule.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torchrec_compress.schema import NonNegative, Positive, Range, build


@dataclass(frozen=True)
class WidthTrial:
    """A `compression` that names no methods but how long each candidate is trained before one is chosen.

    Tables are taken by size, the largest first. Of its widths, in rows of `narrow`, one is kept: that of the fewest
    bytes held (rows, projection and optimizer state) whose logloss on validation is within `tolerance` of the best of
    all that was tried so far, so that tables do not each lose as much. Narrow rows have row-wise state, those of the
    whole width are tried with that and with element-wise state in 8 bits; until a table's turn it has its whole width
    and the state of `retrain.optim.tables`. Tables that are too small to matter stay dense. Short trainings favour
    narrow rows, which learn faster, so in the end the choice is held against the whole width for all.

    Args:
        trial_epochs: how long a candidate is trained, as `retrain` would train it but for that. Too short a trial
            chooses narrow rows that a longer training would not.
        widths: numbers per id that are tried beside the whole width; those that a table cannot have are left out.
        bits: of a number, 8 or 4; each is tried with each width.
        rate: of narrow rows, see `NarrowConfig.rate`.
        tolerance: logloss that fewer bytes may cost, of all tables together.
        min_share: of the bytes of all tables; a smaller table stays dense.
        confirm: whether the choice and the whole width for all are trained as the run itself will be, and the whole
            width kept where its logloss is better by more than `tolerance`: two trainings more.
    """

    trial_epochs: Annotated[float, Range(0, 100, above=True)] | None = None
    widths: list[Positive] = field(default_factory=lambda: [8, 16, 32])
    bits: list[Literal[8, 4]] = field(default_factory=lambda: [8])
    rate: Annotated[float, Range(0.001, 1000)] = 1.0
    tolerance: NonNegative = 0.0005
    min_share: Annotated[float, Range(0, 1)] = 0.02
    confirm: bool = True


def width_trial_of(compression: Mapping[str, Any]) -> WidthTrial | None:
    """Return the trial that a compression states, or None where it names methods or a budget.

    Raises:
        ValueError: an unknown key beside it, or no length, widths or bits.

    Example:
        >>> width_trial_of({"trial_epochs": 0.25}).widths
        [8, 16, 32]
    """
    if "trial_epochs" not in compression or isinstance(compression["trial_epochs"], Mapping):  # a table of that name
        return None
    found = build(WidthTrial, compression, "compression")
    if found.trial_epochs is None:
        raise ValueError("compression.trial_epochs: must be a number, got null")
    for key in ("widths", "bits"):
        given = getattr(found, key)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"compression.{key}: must hold different numbers, one at least, got {given}")
    return found


def least_bytes(found: Mapping[int, float], sizes: Mapping[int, int], most: float) -> int:
    """Return the candidate of the fewest bytes whose loss is not above `most`, or, if all are, that of the least loss.

    Args:
        found: loss by candidate.
        sizes: bytes by candidate.
        most: that is still good enough.

    Example:
        >>> least_bytes({0: 0.4003, 1: 0.4000, 2: 0.4100}, {0: 10, 1: 20, 2: 5}, 0.4005)
        0
    """
    enough = [number for number, loss in found.items() if loss <= most]
    if enough:
        return min(enough, key=lambda number: (sizes[number], number))
    return min(found, key=lambda number: (found[number], sizes[number], number))
