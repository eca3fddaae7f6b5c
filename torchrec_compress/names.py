"""Which names tables, features and variants may have: one that would not work everywhere is refused at once."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

# of a module's children, which a child's name must not hide: "type", "keys", "pop", "training", ...
_TAKEN = frozenset(dir(nn.ModuleDict()))
_NOT_IN_FILES = '/\\:*?"<>|'
_LONGEST_FILE = 128  # bytes; file systems take 255, and a run adds to it


def check_table_names(names: Sequence[str], where: str) -> None:
    """Raise ValueError where tables cannot be called so.

    A table's name is a module of the collection and a part of its state-dict keys, so PyTorch takes neither "." nor
    the attributes of a module.

    Args:
        names: of all tables of a collection.
        where: what is named, for the error.

    Example:
        >>> check_table_names(["type"], "table")
        Traceback (most recent call last):
        ValueError: table 'type': must not be an attribute of torch.nn.ModuleDict, as 'type', 'keys' or 'pop' are; ...
    """
    for name in names:
        _check_text(name, where)
        if "." in name:
            raise ValueError(f"{where} {name!r}: must not hold '.', which separates modules; choose another name")
        if name in _TAKEN:
            raise ValueError(
                f"{where} {name!r}: must not be an attribute of torch.nn.ModuleDict, as 'type', 'keys' or 'pop' are; "
                "choose another name"
            )
    _check_unique(names, where)


def check_feature_names(names: Iterable[str], where: str) -> None:
    """Raise ValueError where features cannot be called so: TorchRec cuts their names at "@".

    Args:
        names: of features.
        where: what is named, for the error.
    """
    for name in names:
        _check_text(name, where)
        if "@" in name:
            raise ValueError(f"{where} {name!r}: must not hold '@', at which TorchRec cuts names; choose another name")


def check_folder_names(names: Sequence[str], where: str) -> None:
    """Raise ValueError where folders cannot be called so, on every usual file system.

    Args:
        names: of folders that lie side by side.
        where: what is named, for the error.

    Example:
        >>> check_folder_names(["pq", "pq/4"], "compare.variants")
        Traceback (most recent call last):
        ValueError: compare.variants 'pq/4': must be a folder's name, without any of ...
    """
    for name in names:
        _check_text(name, where)
        if set(name) & set(_NOT_IN_FILES) or name[0] in " .-" or name[-1] in " .":
            raise ValueError(
                f"{where} {name!r}: must be a folder's name, without any of {' '.join(_NOT_IN_FILES)}, a space or '.' "
                "at an end and a leading '-'"
            )
        if len(name.encode()) > _LONGEST_FILE:
            raise ValueError(
                f"{where} {name[:20] + '...'!r}: must take at most {_LONGEST_FILE} bytes, got {len(name.encode())}"
            )
    # some file systems fold case, some accents that are written in two ways
    _check_unique([unicodedata.normalize("NFC", name).casefold() for name in names], where)


def kind_of(value: object, *wanted: type) -> str:
    """Return what something is, for an error that tells it from the classes that are wanted.

    Example:
        >>> kind_of(torch.fx.symbolic_trace(nn.Linear(1, 1))), kind_of(nn.Linear(1, 1), nn.Conv1d)
        ('an fx trace of Linear', 'Linear')
    """
    kind = type(value)
    if isinstance(value, torch.fx.GraphModule):  # whose class has the name of what was traced
        return f"an fx trace of {kind.__name__}"
    if isinstance(value, torch.jit.ScriptModule):
        return f"a TorchScript module of {value.original_name}"
    is_namesake = kind.__name__ in {found.__name__ for found in wanted}
    return f"{kind.__module__}.{kind.__name__}" if is_namesake else kind.__name__


def _check_text(name: object, where: str) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{where} {name!r}: must be printable text, and not empty; choose another name")


def _check_unique(names: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where} {twice[0]!r}: names must differ, got it twice")
