"""What a caller hands over: of the kind that it must be, or an error that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig


def check_model(where: str, model: object) -> None:
    """Raise ValueError unless something is a module; `where` names the caller.

    Example:
        >>> check_model("discard", nn.Linear(1, 1))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where}: model must be a torch.nn.Module, got {_told(model)}")


def check_call(where: str, model: object, batches: object, forward: object) -> None:
    """Raise ValueError for what is no model, yields no batches (one batch itself does not), or cannot be called."""
    check_model(where, model)
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise ValueError(
            f"{where}: batches must be a list or an iterator of batches, got one {_told(batches)}; write [batch]"
        )
    if forward is not None and not callable(forward):
        raise ValueError(f"{where}: forward must be a function of model and batch, or None, got {_told(forward)}")


def check_tables(where: str, tables: object, kind: type[BaseEmbeddingConfig]) -> None:
    """Raise ValueError unless something is a list of TorchRec's configs of a kind, with lists of features."""
    if not isinstance(tables, list | tuple):
        raise ValueError(f"{where}: tables must be a list of {kind.__name__}, got {_told(tables)}")
    for table in tables:
        if not isinstance(table, kind):
            raise ValueError(f"{where}: every table must be an {kind.__name__}, got {_told(table)}")
        if isinstance(table.feature_names, str):
            raise ValueError(
                f"{where}: table {table.name!r}: feature_names must be a list of names, got {table.feature_names!r}"
            )


def _told(value: object) -> str:
    return "None" if value is None else type(value).__name__
