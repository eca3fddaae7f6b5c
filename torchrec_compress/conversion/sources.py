"""What reads the rows of the tables of a checkpoint, dense or compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.conversion.plan import Change
from torchrec_compress.conversion.tables import Table, collection_of
from torchrec_compress.conversion.work import Work
from torchrec_compress.methods.learned import RowReader
from torchrec_compress.ops import first_infinite


class Sources:
    """Readers of rows, of which a compressed module is put together once.

    Args:
        checkpoint: holds the tables.
        work: where tensors that lie in several pieces are put together.
    """

    def __init__(self, checkpoint: Checkpoint, work: Work) -> None:
        self._checkpoint, self._work = checkpoint, work
        self._filled: dict[str, Any] = {}

    def reader(self, change: Change, table: Table) -> RowReader:
        """Return what reads rows of a table, (L,) int64 -> (L, D) floating point."""
        (key,) = change.keys_of(table, False).values() if change.method(table, False) is None else ("",)
        if key:
            return self._checkpoint.tensors[key].read
        module: Any = self._module(change)
        collection = collection_of(module)

        def read(ids: Tensor) -> Tensor:
            return collection.table_rows(table.name, ids).float()

        padding = getattr(module, "padding_row", None)
        if padding is None or change.new is not None:
            return read
        return _padded(read, module.padding_idx, padding)

    def padding_row(self, change: Change) -> Tensor | None:
        """Return the padding row of a plain module that is to be compressed, or None where it has none.

        Raises:
            ValueError: it would be infinite in the type that the module is to have.
        """
        new: Any = change.new
        if getattr(new, "padding_row", None) is None:
            return None
        (table,) = change.home.tables
        if change.old is not None and getattr(change.old, "padding_row", None) is not None:
            row = self._checkpoint.tensors[f"{change.home.prefix}padding_row"].rows(0, new.embedding_dim)
        else:
            row = self.reader(change, table)(torch.tensor([new.padding_idx]))[0]
        if (found := first_infinite(row[None], new.dtype)) is not None:
            raise ValueError(
                f"table {table.name!r}: the row of padding_idx {new.padding_idx} must be in "
                f"+-{torch.finfo(new.dtype).max:.0f} to be stored as {new.dtype}, got up to {found[1]:g}; give the "
                "table data_type FP32"
            )
        return row.to(new.dtype, copy=True)

    def _module(self, change: Change) -> nn.Module:
        """Return a compressed module with the values of the checkpoint, mapped as they are there.

        Raises:
            ValueError: they are of another format, or not what was saved.
        """
        path = change.home.path
        if path not in self._filled:
            assert change.old is not None
            where = f"{self._checkpoint.path}: {path or 'the model'!r}"
            state = {
                key: self._work.copied(
                    f"source{len(self._filled)}.{number}", self._checkpoint.tensors[change.home.prefix + key]
                )
                for number, key in enumerate(change.old.state_dict())
            }
            try:
                _fill(change.old, state)
            except (ValueError, RuntimeError) as error:
                first = (str(error).splitlines() or [""])[-1].strip()
                raise ValueError(f"{where}: must be what 'from' says, got an error: {first}") from None
            change.old.requires_grad_(False)
            self._filled[path] = change.old
        return self._filled[path]


def _fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put tensors into a module as they are; rows of few bits, which it would copy, too."""
    trained = collection_of(module).trained
    banks = {} if trained is None else {f".banks.{name}.rows": bank for name, bank in trained.banks.items()}
    for key in [key for key in state if key.startswith("trained.") or ".trained." in key]:
        (bank,) = [bank for end, bank in banks.items() if key.endswith(end)]
        rows = state.pop(key)
        bank.check_encoded(rows)
        bank.rows = rows
        bank.note()
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and all(key.endswith(tuple(banks)) for key in missing), (missing, unexpected)


def _padded(read: RowReader, padding_idx: int, row: Tensor) -> RowReader:
    def padded(ids: Tensor) -> Tensor:
        found = read(ids)
        found[ids == padding_idx] = row.to(found.dtype)
        return found

    return padded
