"""Configs of plain data: a dataclass states the types, and values from outside are held against them.

Whatever a config file or a command line says ends as text, numbers, booleans, null, lists and mappings, or as one of
the package's own dataclasses, which its schema names. Nothing here imports, calls or looks anything up by a name
that a value holds, so no value can make it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

_MOST_VALUES = 100_000  # aliases let a few lines of YAML stand for billions of values
_MOST_LEVELS = 64
_LARGEST = 2**63 - 1
_KINDS: dict[Any, str] = {
    Any: "plain data",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


@dataclass(frozen=True)
class Range:
    """Which numbers a key takes: a mark of its type, as in `Annotated[int, Range(1)]`.

    Args:
        low: smallest.
        high: largest.
        above: whether `low` itself is too small.
        below: whether `high` itself is too large.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"over {self.low}" if self.above else f"at least {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"


Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
NonNegative = Annotated[float, Range(0)]
Rate = Annotated[float, Range(0, 1, below=True)]


@dataclass(frozen=True)
class Text:
    """A value as it stands on a command line, whose meaning depends on the type of its key.

    Args:
        text: the value.
        read: reads it where the type is not text.
    """

    text: str
    read: Callable[[str], Any]

    def as_type(self, hint: Any) -> Any:
        """Return the plain value: the text itself where the key takes text."""
        kinds = {get_origin(part) or part for part in _options(hint)}
        if str in kinds or any(
            str in map(type, get_args(part)) for part in _options(hint) if get_origin(part) is Literal
        ):
            return None if types.NoneType in kinds and self.text == "null" else self.text
        return self.read(self.text)


def build(kind: type[Config], values: Mapping[str, Any], where: str = "", base: Config | None = None) -> Config:
    """Return a config dataclass made of plain data.

    Args:
        kind: the dataclass; its fields may be numbers (`Range`), text, `Literal`, lists, mappings, dataclasses, and
            `Any` for plain data of any shape.
        values: by key; keys may be dotted, and a mapping changes only those keys of a nested dataclass that it has.
        where: the key that holds them, for errors.
        base: where `values` is silent; the defaults without it.

    Raises:
        ValueError: an unknown key (the nearest one is named), a missing one, or a value of the wrong type or size.

    Example:
        >>> @dataclass(frozen=True)
        ... class Net:
        ...     width: Positive = 8
        >>> build(Net, {"width": 4})
        Net(width=4)
        >>> build(Net, {"width": 0})
        Traceback (most recent call last):
        ValueError: width: must be at least 1, got 0
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'}: must be a mapping of keys, got {_short(values)}")
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    found = {name: getattr(base, name) for name in fields} if base is not None else _defaults(fields)
    for key, value in values.items():
        first, _, rest = _name(key, where).partition(".")
        if first not in fields:
            raise ValueError(_unknown(kind, where, key))
        path = _join(where, first)
        if rest:
            found[first] = _changed(found.get(first), rest, value, hints[first], path)
        else:
            found[first] = _typed(value, hints[first], path, found.get(first))
    missing = [name for name in fields if name not in found]
    if missing:
        raise ValueError(f"{where or 'config'}: must set {missing}, got {sorted(values)}")
    return kind(**found)


def settle_numbers(config: Any) -> None:
    """Make the numbers and texts of a dataclass made in code Python's own, as NumPy's are taken for them.

    Raises:
        ValueError: a number, a switch or a nested config is something else.

    Example:
        >>> @dataclass(frozen=True)
        ... class Net:
        ...     width: int = 8
        >>> settle_numbers(Net(True))
        Traceback (most recent call last):
        ValueError: Net.width: must be int, got True
    """
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), _hints(type(config))[field.name]
        where = f"{type(config).__name__}.{field.name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):  # type: ignore[arg-type]
                raise ValueError(f"{where}: must be a {hint.__name__}, got {_short(value)}")  # type: ignore[union-attr]
            settle_numbers(value)
        elif {bool, int, float, tuple} & {get_origin(option) or option for option in _options(hint)}:
            object.__setattr__(config, field.name, _typed(value, hint, where))
        elif isinstance(value, str):
            object.__setattr__(config, field.name, str.__str__(value))


def plain(value: Any, where: str) -> Any:
    """Return a value of plain data, copied.

    Raises:
        ValueError: it holds anything else, a number that is not finite, or too many values (by aliases, say).

    Example:
        >>> plain({"a": (1, "b")}, "key")
        {'a': [1, 'b']}
    """
    left = [_MOST_VALUES]

    def copied(value: Any, where: str, level: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or level > _MOST_LEVELS:
            raise ValueError(
                f"{where or 'config'}: must hold at most {_MOST_VALUES} values in {_MOST_LEVELS} levels, got more"
            )
        if isinstance(value, Text):
            value = value.as_type(Any)
        if isinstance(value, Mapping):
            return {_name(key, where): copied(part, _join(where, key), level + 1) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(part, f"{where}[{number}]", level + 1) for number, part in enumerate(value)]
        if value is None:
            return None
        value = _own_number(value)
        if type(value) not in (bool, int, float, str):
            raise ValueError(f"{where or 'config'}: must be plain data, got {_short(value)}")
        return _scalar(value, type(value), where)

    return copied(value, where, 0)


def leaves(kind: type, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every key of a config dataclass, dotted, with its type and its default.

    Example:
        >>> list(leaves(Range))[:2]
        [('low', <class 'float'>, -inf), ('high', <class 'float'>, inf)]
    """
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        path, hint = _join(where, field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, path)  # type: ignore[arg-type]
        else:
            has_factory = field.default_factory is not dataclasses.MISSING
            yield path, hint, field.default_factory() if has_factory else field.default  # type: ignore[misc]


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return "; did you mean 'x'?" for a misspelt name, or nothing.

    Example:
        >>> nearest("epoch", ["epochs", "batch_size"])
        "; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _close(value: Any, known: Sequence[Any]) -> str:
    """Return the same for one of several values, or nothing for a number."""
    return nearest(value, known) if isinstance(value, str) else ""


def words(hint: Any) -> str:
    """Return what a value must be, in words.

    Example:
        >>> words(dict[str, Positive] | None)
        'a mapping or null'
    """
    found = []
    for option in _parts(hint):
        bare, *marks = get_args(option) if get_origin(option) is Annotated else (option,)
        kind = get_origin(bare) or bare
        if kind is Literal:
            found.append(f"one of {list(get_args(bare))}")
        else:
            name = "a mapping" if dataclasses.is_dataclass(kind) else _KINDS.get(kind, "null")
            found.append(" ".join([name, *(str(mark) for mark in marks)]))
    return " or ".join(found)


def _unknown(kind: type, where: str, key: str) -> str:
    first, dot, rest = key.partition(".")
    names = [field.name for field in dataclasses.fields(kind)]
    # the right key in the wrong place, such as embedding_dim for model.embedding_dim, else a misspelt one
    known = [path for path, _, _ in leaves(kind, where) if path.endswith("." + key)]
    known += [_join(where, name) + dot + rest for name in difflib.get_close_matches(first, names, n=1, cutoff=0.5)]
    said = f"; did you mean {known[0]!r}?" if known else ";"
    return f"unknown key {_join(where, key)!r}{said} the keys are {names}"


def _changed(old: Any, keys: str, value: Any, hint: Any, where: str) -> Any:
    """Return a nested value with one of its keys changed, which may be dotted."""
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            base = old if isinstance(old, option) else None  # type: ignore[arg-type]
            return build(option, {keys: value}, where, base)  # type: ignore[arg-type]
        if option is Any or get_origin(option) is dict:
            inner = Any if option is Any else get_args(option)[1]
            nests = any(
                part is Any or get_origin(part) is dict or dataclasses.is_dataclass(part) for part in _options(inner)
            )
            key, _, rest = keys.partition(".") if nests else (keys, "", "")
            held = dict(old) if isinstance(old, Mapping) else {}
            path = _join(where, _name(key, where))
            new = _changed(held.get(key), rest, value, inner, path) if rest else _typed(value, inner, path)
            return {**held, key: new}
    raise ValueError(f"{where}: has no keys of its own, got {keys!r}")


def _typed(value: Any, hint: Any, where: str, old: Any = None) -> Any:
    """Return a value that has the type that is asked for; a mapping changes the nested config `old`."""
    if isinstance(value, Text):
        try:
            value = value.as_type(hint)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    value = _own_number(value)
    options = _options(hint)
    if value is None and types.NoneType in options:
        return None
    for option in options:
        kind = get_origin(option) or option
        if kind is Any:
            return plain(value, where)
        if dataclasses.is_dataclass(kind) and isinstance(value, (Mapping, kind)):  # type: ignore[arg-type]
            return value if not isinstance(value, Mapping) else build(kind, value, where, old)  # type: ignore[arg-type]
        if kind is dict and isinstance(value, Mapping):
            inner = get_args(option)[1]
            return {_name(key, where): _typed(part, inner, _join(where, key)) for key, part in value.items()}
        if kind is list and isinstance(value, (list, tuple)):
            return [_typed(part, get_args(option)[0], f"{where}[{n}]") for n, part in enumerate(value)]
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(part, get_args(option)[0], f"{where}[{n}]") for n, part in enumerate(value))
        if kind is Literal and type(value) in {type(each) for each in get_args(option)}:
            if value not in get_args(option):
                known = list(get_args(option))
                raise ValueError(f"{where}: must be one of {known}, got {value!r}{_close(value, known)}")
            return value
        if kind in (bool, int, str) and type(value) is kind:
            return _in_range(_scalar(value, kind, where), hint, where)
        if kind is float and type(value) in (int, float):
            return _in_range(_scalar(value, float, where), hint, where)
    # to YAML, yes, no, on and off are switches
    is_text = str in options and value is not None and not isinstance(value, (Mapping, list, tuple))
    advice = "; put text in quotes" if is_text else ""
    raise ValueError(f"{where}: must be {words(hint)}, got {_short(value)}{advice}")


def _own_number(value: Any) -> Any:
    """Return a number of another library as Python's int or float, and anything else as it is; a bool is no number."""
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral):
        return operator.index(value)
    return float(value) if isinstance(value, Real) else value


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is str and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ValueError(f"{where}: must be text without NUL and of valid Unicode, got {_short(value)}")
    if kind is int and abs(value) > _LARGEST:
        raise ValueError(f"{where}: must be int of at most 64 bits, got {_short(value)}")
    if kind is float and not (abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)):
        raise ValueError(f"{where}: must be finite, got {_short(value)}")
    return float(value) if kind is float else value


def _in_range(value: Any, hint: Any, where: str) -> Any:
    for part in _parts(hint):
        for mark in getattr(part, "__metadata__", ()):
            if isinstance(value, (int, float)) and value not in mark:
                raise ValueError(f"{where}: must be {mark}, got {value}")
    return value


def _options(hint: Any) -> list[Any]:
    """Return the types of a union, without their marks."""
    return [get_args(part)[0] if get_origin(part) is Annotated else part for part in _parts(hint)]


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _name(key: Any, where: str) -> str:
    if type(key) is not str:
        raise ValueError(f"{where or 'config'}: keys must be text, got {_short(key)}; put it in quotes")
    return _scalar(key, str, where or "config")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _short(value: Any) -> str:
    """Return a value for an error, cut: it may be a bomb of aliases, whose text would not fit in memory."""
    if isinstance(value, (Mapping, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value) is int and abs(value) > _LARGEST:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _defaults(fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    found = {}
    for name, field in fields.items():
        if field.default_factory is not dataclasses.MISSING:
            found[name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[name] = field.default
    return found
