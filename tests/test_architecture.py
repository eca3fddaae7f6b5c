"""What keeps the structure: no circle of files, no private name of another package, loggers that exist."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_layering import FILES, LAUNCH, PACKAGE, ROOT

# privates of Python and torch that have no public form; TorchRec's are in seams/ alone
BORROWED = {
    "_replace": "named tuples",
    "_exit": "os",
    "_version": "torch.Tensor, its count of writes",
    "_buffers": "nn.Module",
    "_parameters": "nn.Module",
    "_modules": "nn.Module",
    "_comm_hooks": "DistributedDataParallel",
    "_assert_async": "torch",
    "_schema": "torch.ops",
    "_shard": "torch.distributed, where ShardedTensor lives",
    "_StorageInfo": "torch.distributed.checkpoint",
    "_MEM_FORMAT_ENCODING": "torch.distributed.checkpoint",
}
SEAMS = PACKAGE / "seams"


def module_of(path: Path) -> str:
    """Return the name that a file is imported by."""
    home = "torchrec_compress.launch" if LAUNCH in path.parents else "torchrec_compress"
    inside = path.relative_to(LAUNCH if LAUNCH in path.parents else PACKAGE).with_suffix("").parts
    return ".".join([home, *(part for part in inside if part != "__init__")])


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = module_of(path).rpartition(".")[0] if node.level else ""
            module = ".".join(part for part in (home, node.module) if part)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {module}
    return (found & MODULES.keys()) - {module_of(path)}


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield a path through every circle that a walk in depth meets."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield path[path.index(name) :]
        elif name not in done:
            for other in sorted(graph[name]):
                yield from visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, [])


def test_no_files_import_each_other_in_a_circle():
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c"]]
    assert list(circles({name: imported(path) for name, path in MODULES.items()})) == []


def names_of(folder: Path) -> set[str]:
    """Return what the files of a folder define: functions, classes, variables and attributes of `self`."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
    return found


def _is_self(node: ast.expr) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def privates(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every private name that is not asked of `self`, by attribute, by string or by import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_self(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            by_string = node.func.id in ("getattr", "hasattr", "setattr", "delattr") and not _is_self(node.args[0])
            if by_string and isinstance(node.args[1], ast.Constant):
                yield node.lineno, str(node.args[1].value)
        elif isinstance(node, ast.ImportFrom):
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                yield node.lineno, name


@pytest.mark.parametrize(
    "path", [path for path in FILES if SEAMS not in path.parents], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_private_name_of_another_package(path):
    mine = names_of(path.parent)
    found = [(line, name) for line, name in privates(ast.parse(path.read_text())) if _is_private(name)]
    assert [pair for pair in found if pair[1] not in mine | BORROWED.keys()] == []


def test_what_is_borrowed_is_used():
    used = {name for path in FILES for _, name in privates(ast.parse(path.read_text()))}
    assert BORROWED.keys() <= used


def test_loggers_addressed_by_name_exist():
    """A module that moves takes its logger along; a name left behind would silence or show nothing."""
    texts = [*FILES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "tests").rglob("*.py")]
    pattern = r"(?:getLogger\(|logger=|logger )[\"`](torchrec_compress[\w.]*)[\"`]"
    found = {name for path in texts for name in re.findall(pattern, path.read_text())}
    assert len(found) > 3
    for name in found:
        module = import_module(name)
        loggers = [value for value in vars(module).values() if isinstance(value, logging.Logger)]
        is_package = hasattr(module, "__path__")
        assert is_package or name in {logger.name for logger in loggers}, name


METHOD_CLASSES = {
    node.name
    for path in (PACKAGE / "methods").glob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Decoder"))
} - {"MethodConfig", "TableDecoder"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE / "methods"], ids=str)
def test_nobody_asks_which_method_it_is(path):
    """A method is a file: what others must know of it is a member of the abstract classes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            asked = {name.id for argument in node.args for name in ast.walk(argument) if isinstance(name, ast.Name)}
            assert not asked & METHOD_CLASSES, f"{path}:{node.lineno}: {asked & METHOD_CLASSES}"
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "method":
            named = [value for value in node.comparators if isinstance(value, ast.Constant)]
            assert not named, f"{path}:{node.lineno}: {ast.unparse(node)}"
