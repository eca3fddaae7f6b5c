"""What an optimizer's state in a checkpoint becomes: kept where the weight stays, left out where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrec_compress.conversion.checkpoints import Checkpoint


@dataclass
class Fate:
    """What becomes of entries that are no tables.

    Attributes:
        places: of what is kept, where it goes, by name.
        plain: values that are kept changed, by name.
        dropped: names of what is left out.
        renamed: names of what goes to another place.
        numbered: optimizers that number their parameters, which are others afterwards: left out whole.
    """

    places: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    numbered: list[str] = field(default_factory=list)


def settle(checkpoint: Checkpoint, tables: set[str], kept: Mapping[str, str], gone: set[str]) -> Fate:
    """Return what becomes of all that is no table.

    Args:
        checkpoint: that is converted.
        tables: names of what is a table's own.
        kept: names of weights that stay, with their new ones.
        gone: names of weights that do not.
    """
    fate = Fate()
    numbered = _numbered(checkpoint) if gone else set()
    fate.numbered = sorted({".".join(map(str, place)) or "optimizer" for place in numbered})
    for name, place in checkpoint.places.items():
        if name in tables:
            continue
        is_numbered = any(place[: len(at)] == at and len(place) > len(at) and _is_of(place[len(at)]) for at in numbered)
        if is_numbered or any(_has(name, place, weight) for weight in gone):
            fate.dropped.append(name)
        else:
            new = place
            for before, after in kept.items():
                if before != after and _has(name, place, before):
                    new = tuple(_moved(part, before, after) for part in place)
                    fate.renamed.append(name)
                    break
            fate.places[name] = new
            if name in checkpoint.plain:
                fate.plain[name] = _without(checkpoint.plain[name], kept, gone)
    return fate


def states_of(checkpoint: Checkpoint, weight: str) -> list[str]:
    """Return the names of tensors that an optimizer keeps of a weight, which it calls by this name."""
    return [name for name in checkpoint.tensors if _has(name, checkpoint.places[name], weight)]


def _has(name: str, place: tuple[Any, ...], weight: str) -> bool:
    """Return whether something is kept of a weight: its name stands among the keys, before the last one."""
    return weight in place[:-1] or ("." in weight and f".{weight}." in f".{name}")


def _moved(part: Any, before: str, after: str) -> Any:
    if part == before:
        return after
    if not isinstance(part, str) or f".{before}." not in f".{part}":
        return part
    return f".{part}".replace(f".{before}.", f".{after}.", 1)[1:]


def _is_of(key: Any) -> bool:
    return key in ("state", "param_groups")


def _is_number(key: Any) -> bool:
    return type(key) is int or (isinstance(key, str) and key.isdecimal())


def _numbered(checkpoint: Checkpoint) -> set[tuple[Any, ...]]:
    """Return where optimizers are that call parameters by numbers."""
    found = set()
    for name, place in checkpoint.places.items():
        for at in range(len(place) - 1):
            if place[at] == "state" and _is_number(place[at + 1]):
                found.add(place[:at])
        groups = checkpoint.plain.get(name)
        if place and place[-1] == "param_groups" and isinstance(groups, list):
            members = [each for group in groups if isinstance(group, dict) for each in _members(group)]
            if members and all(map(_is_number, members)):
                found.add(place[:-1])
    return found


def _members(group: Mapping[str, Any]) -> list[Any]:
    members = group.get("params")
    return list(members) if isinstance(members, (list, tuple)) else []


def _without(value: Any, kept: Mapping[str, str], gone: set[str]) -> Any:
    """Return groups of parameters without those that are gone, and anything else as it is."""
    is_groups = isinstance(value, list) and value and all(isinstance(group, dict) for group in value)
    if not is_groups or not any(isinstance(each, str) for group in value for each in _members(group)):
        return value
    return [
        {
            **group,
            "params": [kept.get(each, each) if isinstance(each, str) else each for each in members if each not in gone],
        }
        if (members := _members(group))
        else group
        for group in value
    ]
