"""Codes that change while a table trains: who holds them, and the decoder of them, hand both to their manager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchrec_compress.managers import CodeManager, OwnedCodes
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.modules.managed import row_states


def code_managers(collection: CompressedParts) -> Iterator[tuple[str, CodeManager]]:
    """Yield the tables of a collection whose codes change, and what changes them."""
    for name, parts in collection.blueprint.parts.items():
        if parts.codes is not None and parts.codes.manager is not None:
            yield name, parts.codes.manager


@torch.no_grad()
def change_codes(collection: CompressedParts, step: int, optimizer: Any) -> None:
    """Have the managers of codes end a step; arguments as for `torchrec_compress.after_step`.

    A table whose decoder is not trained keeps its codes.

    Raises:
        ValueError: the optimizer of a decoder is not known, several ranks have copies of the codes, or something else
            has changed them.
    """
    for name, manager in code_managers(collection):
        collection.decoder.end_turn(name)
        bank, tables = collection.decoder.banks[name], collection.code_tables
        parameters = dict(bank.named_parameters())
        if not all(parameter.requires_grad for parameter in parameters.values()):
            continue
        held, is_due = tables.held(name), manager.is_due(step)  # type: ignore[union-attr]
        if not is_due and optimizer is not None:
            continue
        states = {
            each: row_states(parameter, optimizer, f"table {name!r}, {each}") for each, parameter in parameters.items()
        }
        if is_due:
            tables.check_held(name)  # type: ignore[union-attr]
            (table,) = (table for table in collection.blueprint.tables if table.name == name)
            manager.change(
                OwnedCodes(
                    name,
                    table.num_embeddings,
                    held.first_id,
                    held.codes,
                    parameters,
                    dict(bank.named_buffers()),
                    states,
                    held.group,
                    held.is_whole,
                )
            )
            tables.take_changed(name)  # type: ignore[union-attr]


def discard_codes(collection: CompressedParts) -> None:
    """Forget the look-ups since the last step."""
    for name, _ in code_managers(collection):
        collection.decoder.discard_turn(name)
