"""A budget of bytes in place of methods: its words in a config, in one place.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torchrec_compress.schema import Positive, Range, build


@dataclass(frozen=True)
class Budget:
    """A `compression` that names no methods but the bytes that they are chosen for.

    Args:
        budget_ratio: how many times smaller the tables become, all together.
        budget_bytes: what they may take instead.
        codes: the product-code method that candidates are made of, as {"method": name, options}; empty is "pq".
        num_codes: code lengths that are tried; of residual codes 2 to 8, of product codes those that divide the width.
        widths: numbers of a codeword that are tried beside those of a table's rows, where these have more.
        method: one method, as {"method": name, options}, whose sizes are set so that all tables fit, each as many times
            smaller; nothing is chosen then, and no full model is needed.
    """

    budget_ratio: Annotated[float, Range(1)] | None = None
    budget_bytes: Positive | None = None
    codes: dict[str, Any] = field(default_factory=dict)
    num_codes: list[Positive] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 16])
    widths: list[Positive] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)

    def num_bytes(self, dense: int) -> int:
        """Return the budget in bytes.

        Args:
            dense: bytes of the full tables.
        """
        return self.budget_bytes or int(dense / (self.budget_ratio or 1))


def budget_of(compression: Mapping[str, Any]) -> Budget | None:
    """Return the budget that a compression states, or None where it names methods.

    Raises:
        ValueError: two budgets, or an unknown key beside one.

    Example:
        >>> budget_of({"budget_ratio": 50}).budget_ratio
        50.0
    """
    stated = {key for key in ("budget_ratio", "budget_bytes") if not isinstance(compression.get(key, {}), Mapping)}
    if not stated:
        return None
    if len(stated) > 1:
        raise ValueError(f"compression: must have one of budget_ratio and budget_bytes, got {sorted(stated)}")
    found = build(Budget, compression, "compression")
    if found.budget_ratio is None and found.budget_bytes is None:
        raise ValueError(f"compression.{stated.pop()}: must be a number, got null")
    return found
