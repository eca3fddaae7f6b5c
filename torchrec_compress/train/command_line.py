"""Config files and the command line: YAML of plain data, `--key.sub VALUE`, --help and --print_config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from torchrec_compress.schema import Text, build, leaves, plain, words

Config = TypeVar("Config")

# numbers as YAML 1.2 has them: to 1.1, which PyYAML reads, 1:30 is 90, 010 is 8 and 1e-3 is text
_INT = re.compile(r"[-+]?(?:0|[1-9][\d_]*|0x_*[\da-fA-F][\da-fA-F_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OWN = (*_NUMBERS, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")  # 1.2 has neither dates nor '='
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers such as 1e-3, and without what could surprise, as 1:30 for 90.

    It knows no tag of Python's and calls nothing. A key that stands twice would silently drop the first one, and a
    list of mappings to merge can grow without bounds, so both are errors.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check the keys that a mapping itself has, then merge others into it."""
        if id(node) in self._flat:  # an alias: merged keys may stand beside its own by now
            return
        self._flat.add(id(node))
        seen: set[Hashable] = set()
        for key, value in node.value:
            if key.tag == _MERGE and not isinstance(value, yaml.MappingNode):
                self._refuse(value, "'<<' must merge one mapping")
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self._refuse(key, f"key {key.value!r} must stand once, got it twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        super().flatten_mapping(node)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return a number, also of an explicit tag, whose text PyYAML would read as 1.1 does."""
        text = self.construct_scalar(node)
        is_int = node.tag == _NUMBERS[0]
        if not (_INT.match(text) or (not is_int and _FLOAT.match(text))):
            self._refuse(node, f"{'an int' if is_int else 'a float'} must be written as in YAML 1.2, got {text!r}")
        return self.construct_yaml_int(node) if is_int else float(self.construct_yaml_float(node))

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _OWN]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in zip(_NUMBERS, (_INT, _FLOAT), strict=True):
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Loader.add_constructor(_MERGE, _Loader.construct_yaml_str)  # '<<' that is no key


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with quotes around text that `_Loader`, or a reader of YAML 1.1, would take for more."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return text, escaped where it holds the line break U+0085, which would be read back as another."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.yaml_implicit_resolvers = {
    first: [*_Loader.yaml_implicit_resolvers.get(first, []), *found]
    for first, found in {**_Loader.yaml_implicit_resolvers, **yaml.SafeDumper.yaml_implicit_resolvers}.items()
}
_Dumper.add_representer(str, _Dumper.represent_text)


def load_yaml(text: str) -> Any:
    """Return what YAML says, as plain data.

    Raises:
        ValueError: it is not YAML, or holds anything but plain data.

    Example:
        >>> load_yaml("{lr: 1e-3, widths: [4, 8]}")
        {'lr': 0.001, 'widths': [4, 8]}
    """
    try:
        found = yaml.load(text, Loader=_Loader)
    except Exception as error:  # a tag's constructor raises whatever it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"must be YAML of plain data, got an error: {reason}") from error
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Return the keys of a config file, as plain data.

    Raises:
        ValueError: it is missing, or is not a YAML file with keys.
    """
    if path.is_dir():
        raise ValueError(f"{path}: must be a config file, got a folder; name a file in it")
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        found = plain(load_yaml(path.read_text(encoding="utf-8")), "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be YAML, text in UTF-8, got other bytes; name a config file") from error
    except OSError as error:
        raise ValueError(f"{path}: must be a file that can be read, got an error: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{path}: must hold keys and values, got {type(found).__name__}")
    return found or {}


def read(start: Config, arguments: Sequence[str], usage: str) -> Config:
    """Return a config with the keys changed that config files and the command line give, later ones winning.

    Args:
        start: the config where both are silent.
        arguments: [CONFIG], then `--key.sub VALUE` or `--key.sub=VALUE`, `--config FILE`, `--print_config`, `--help`.
        usage: the first line of the help.

    Raises:
        ValueError: a bad key or value; the error names it and where it stands.
        SystemExit: after --help and --print_config.
    """
    config, prints = start, False
    for key, value in _pairs(arguments):
        if key == "help":
            print(_help(start, usage))
            raise SystemExit(0)
        if key == "print_config":
            prints = True
        elif key == "config":
            changes = read_file(Path(value))
            config = _changed(config, changes, value)
        else:
            config = _changed(config, {key: Text(value, load_yaml)}, "command line")
    if prints:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def dump(config: Any, *, allow_unicode: bool = True) -> str:
    """Return a config as YAML that `load_yaml` reads back as it is; without `allow_unicode`, it is ASCII."""
    value = plain(dataclasses.asdict(config), "")
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode)


def origin(error: str, arguments: Sequence[str], keys: Collection[str]) -> str:
    """Return an error with where its key stands in front, if it is about a key.

    Args:
        error: "key.sub: what is wrong".
        arguments: [CONFIG] and options.
        keys: top-level keys of the config.

    Example:
        >>> origin("data.path: must be set", ["a.yaml", "--seed", "3"], ["data", "seed"])
        'a.yaml: data.path: must be set'
        >>> origin("seed: must be int", ["a.yaml", "--seed", "x"], ["data", "seed"])
        'command line: seed: must be int'
    """
    found = re.match(r"(?:unknown key ')?((\w+)(?:\.[^:']*)?)[:']", error)
    if found is None or found[2] not in keys or not arguments:
        return error
    with suppress(ValueError):  # a command line or a file that is not read says so itself
        for key, value in reversed(_pairs(arguments)):  # later ones win
            if key == "config":
                if _gives(read_file(Path(value)), found[1]):
                    return f"{value}: {error}"
            elif f"{found[1]}.".startswith(f"{key}."):
                return f"command line: {error}"
    return error if arguments[0].startswith("-") else f"{arguments[0]}: {error}"


def _gives(values: Any, key: str) -> bool:
    """Return whether nested values, whose keys may be dotted, give a value to a dotted key or to one that holds it."""
    if not isinstance(values, dict):
        return True
    return any(
        key == name or (key.startswith(f"{name}.") and _gives(inner, key[len(name) + 1 :]))
        for name, inner in values.items()
    )


def _changed(config: Config, changes: dict[str, Any], source: str) -> Config:
    try:
        return build(type(config), changes, base=config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the keys and values of a command line; dashes in a key's first word are underscores."""
    left = list(arguments)
    found = [("config", left.pop(0))] if left and not left[0].startswith("-") else []
    while left:
        word = left.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--") or word == "--":
            raise ValueError(f"command line: options must be --key.sub VALUE, got {word!r}")
        key, equals, value = word[2:].partition("=")
        first, dot, rest = key.partition(".")
        key = first.replace("-", "_") + dot + rest
        if key in ("help", "print_config"):
            found.append((key, ""))
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"command line: --{key} must have a value, got none")
            value = left.pop(0)
        found.append((key, value))
    return found


def _help(config: Any, usage: str) -> str:
    """Return every key with its type, default and description, which is that of the dataclass's docstring."""
    told = dict(_told(type(config)))
    lines = [
        f"usage: {usage}",
        "",
        "  --config FILE     YAML file; later keys win, as in all of the command line",
        "  --print_config    print the resolved config",
        "  --help",
    ]
    for key, hint, default in leaves(type(config)):
        said = "required" if default is dataclasses.MISSING else f"default: {yaml_line(default)}"
        lines += ["", f"  --{key}", f"      {told.get(key, '')} ({words(hint)}; {said})"]
    return "\n".join(lines)


def yaml_line(value: Any) -> str:
    """Return a value as YAML in one line.

    Example:
        >>> yaml_line([0.8, None])
        '[0.8, null]'
    """
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _told(kind: type, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield what the docstring says about every key, by its dotted name."""
    _, _, arguments = (kind.__doc__ or "").partition("Args:\n")
    for found in re.finditer(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE):
        yield where + found[1], " ".join(found[2].split())
    for name, hint in ((field.name, field.default_factory) for field in dataclasses.fields(kind)):
        inner = type(hint()) if hint is not dataclasses.MISSING else None
        if inner is not None and dataclasses.is_dataclass(inner):
            yield from _told(inner, f"{where}{name}.")
