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
        changed: names of what stays, without the names of weights that are gone.
        lost: names of empty mappings, which a folder does not hold.
    """

    places: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    numbered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def settle(checkpoint: Checkpoint, tables: set[str], kept: Mapping[str, str], gone: set[str]) -> Fate:
    """Return what becomes of all that is no table.

    Args:
        checkpoint: that is converted.
        tables: names of what is a table's own.
        kept: names of weights that stay, with their new ones.
        gone: names of weights that do not.

    Raises:
        ValueError: state is kept twice of a name that several weights have, of which some stay.
    """
    fate, weights = Fate(), _weights(checkpoint)
    _check_twins(checkpoint, tables, {*gone, *kept}, weights)
    numbered = _numbered(checkpoint) if gone else set()
    fate.numbered = sorted({".".join(map(str, place)) or "optimizer" for place in numbered})
    for name, place in checkpoint.places.items():
        if name in tables:
            continue
        is_numbered = any(place[: len(at)] == at and len(place) > len(at) and _is_of(place[len(at)]) for at in numbered)
        owner = _owner(name, place, weights)
        if is_numbered or owner in gone:
            fate.dropped.append(name)
            continue
        fate.places[name] = place
        if owner is not None and kept.get(owner, owner) != owner:
            fate.places[name] = tuple(_moved(part, owner, kept[owner]) for part in place)
            fate.renamed.append(name)
        if name in checkpoint.plain:
            fate.plain[name] = _without(checkpoint.plain[name], place, kept, gone)
            fate.changed += [name] if fate.plain[name] is not checkpoint.plain[name] else []
    return fate


def states_of(checkpoint: Checkpoint, weight: str) -> list[str]:
    """Return the names of tensors that an optimizer keeps of a weight, which it calls by this name."""
    weights = _weights(checkpoint)
    return [name for name in checkpoint.tensors if _owner(name, checkpoint.places[name], weights) == weight]


def _weights(checkpoint: Checkpoint) -> set[str]:
    """Return what the tensors of a checkpoint are called in the mappings that hold them."""
    return {str(checkpoint.places[name][-1]) for name in checkpoint.tensors}


def _owner(name: str, place: tuple[Any, ...], weights: set[str]) -> str | None:
    """Return the weight that something is kept of, or None.

    Its name stands among the keys before the last one; of `a.weight` and `b.a.weight` it is the longer one's.
    """
    parts = name.split(".")
    spans = (".".join(parts[first:last]) for first in range(len(parts)) for last in range(first + 2, len(parts)))
    found = [each for each in place[:-1] if isinstance(each, str) and each in weights]
    return max([*found, *(each for each in spans if each in weights)], key=len, default=None)


def _check_twins(checkpoint: Checkpoint, tables: set[str], moved: set[str], weights: set[str]) -> None:
    """Raise ValueError where it cannot be told whose a state is."""
    names: dict[str, list[str]] = {}
    for name, place in checkpoint.places.items():
        if name in checkpoint.tensors and str(place[-1]) in moved:
            names.setdefault(str(place[-1]), []).append(name)
    twins = {weight: mine for weight, mine in names.items() if len(mine) > 1 and not tables.issuperset(mine)}
    if not twins:
        return
    holders: dict[str, set[str]] = {}
    for name, place in checkpoint.places.items():
        owner = _owner(name, place, weights)
        if owner in twins:
            holders.setdefault(str(owner), set()).add(f".{name}".rpartition(f".{owner}.")[0].removeprefix("."))
    for weight, found in holders.items():
        if len(found) > 1:
            raise ValueError(
                f"{checkpoint.path}: state of a weight must be told by its name, got {weight!r} in {sorted(found)}, "
                f"and weights {twins[weight]}; convert all of these, or each with its optimizer in a file of its own"
            )


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
        if _is_members(place) and isinstance(groups, list) and groups and all(map(_is_number, groups)):
            found.add(place[: place.index("param_groups")])  # a folder has the groups' entries one by one
    return found


def _is_members(place: tuple[Any, ...]) -> bool:
    """Return whether a folder keeps the names of a group's parameters here."""
    return place[-1] == "params" and "param_groups" in place[:-1]


def _members(group: Mapping[str, Any]) -> list[Any]:
    members = group.get("params")
    return list(members) if isinstance(members, (list, tuple)) else []


def _without(value: Any, place: tuple[Any, ...], kept: Mapping[str, str], gone: set[str]) -> Any:
    """Return groups of parameters without those that are gone, and anything else, or of no such, as it is."""
    if _is_members(place) and isinstance(value, list):
        return _left(value, kept, gone)
    is_groups = isinstance(value, list) and value and all(isinstance(group, dict) for group in value)
    if not is_groups or all(_left(_members(group), kept, gone) == _members(group) for group in value):
        return value
    return [
        {**group, "params": _left(members, kept, gone)} if (members := _members(group)) else group for group in value
    ]


def _left(members: list[Any], kept: Mapping[str, str], gone: set[str]) -> list[Any]:
    """Return the names of parameters that stay, as they are called then; the list itself where it is the same."""
    found = [kept.get(each, each) if isinstance(each, str) else each for each in members if each not in gone]
    return members if found == members else found
