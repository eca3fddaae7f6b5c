"""The layers, the limits on size, and a lean import, checked from the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torchrec_compress"
LAUNCH = ROOT / "launch"  # installed as torchrec_compress.launch
FILES = sorted([*PACKAGE.rglob("*.py"), *LAUNCH.rglob("*.py")])
EVERYTHING = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

# a part may import itself and what stands below it; parts without a folder are files of their own
LAYERS = {
    "versions": set(),
    "schema": set(),
    "amounts": set(),
    "names": set(),
    "canvas": set(),
    "seams": set(),
    "ops": set(),
    "fit": {"ops"},
    "managers": {"fit", "ops"},
    "methods": {"managers", "fit", "ops", "schema"},
    "compression": {"methods", "fit", "names", "ops", "schema"},
    "modules": {"compression", "methods", "managers", "names", "ops", "seams"},
    "sharding": {"modules", "managers", "ops", "seams"},
    "planner": {"sharding", "modules", "seams", "compression", "methods", "ops", "canvas"},
    "dry_run": {"planner", "modules", "compression", "schema", "amounts"},
    "convert": {"planner", "sharding", "modules", "compression", "methods", "fit", "names", "ops", "schema", "seams"},
    "train": {
        "convert",
        "planner",
        "sharding",
        "modules",
        "seams",
        "compression",
        "methods",
        "fit",
        "ops",
        "canvas",
        "names",
        "schema",
        "versions",
    },
    "conversion": {"train", "convert", "modules", "compression", "methods", "fit", "ops", "schema"},
    "launch": {"train", "dry_run", "planner", "schema", "versions"},
    "cli": {"launch", "conversion", "train", "dry_run", "modules", "schema", "amounts", "ops", "versions"},
    "__main__": {"cli"},
}
# what a part may import from outside the standard library
OUTSIDE = {
    "versions": set(),
    "schema": set(),  # nothing that could import or call what a config names
    "amounts": set(),
    "names": {"torch"},
    "canvas": {"matplotlib"},
    "seams": {"torch", "torchrec"},
    "cli": set(),
    "ops": {"torch", "fbgemm_gpu", "triton", "cuda"},
    "fit": {"torch", "numpy", "pyarrow", "scipy", "tqdm"},
    "managers": {"torch"},
    "methods": {"torch", "torchrec"},
    "compression": {"torch", "torchrec", "tqdm"},
    "modules": {"torch", "torchrec"},
    "sharding": {"torch", "torchrec"},
    "planner": {"torch", "torchrec"},
    "dry_run": {"torch", "torchrec"},
    "convert": {"torch", "torchrec", "tqdm"},
    "launch": {"torchx", "kubernetes"},
}


def part_of(path: Path) -> str:
    return "launch" if LAUNCH in path.parents else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Return every module that a file imports, with its line, wherever in the file the import stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if part_of(path) == "launch" and node.level == 1:
                continue  # a neighbour: the folder's own name differs from the one that it is installed under
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "torchrec_compress" else [module]
            found += [(name, node.lineno) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_layers(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LAYERS, f"a new part {part!r} needs its line in LAYERS"
    for name, line in imports(path):
        first, *rest = name.split(".")
        if first == "torchrec_compress" and rest:
            # the face of the package re-exports conversion and modules
            used = rest[0] if rest[0] in LAYERS else "convert"
            assert used in LAYERS[part] | {part}, f"{path}:{line}: {part} must not import {name}"
        elif part in OUTSIDE and first not in sys.stdlib_module_names and first != "torchrec_compress":
            assert first in OUTSIDE[part], f"{path}:{line}: {part} must not import {first}"


def test_callers_import_ops_from_its_face():
    """Types aside, nothing reaches around `ops/__init__.py`."""
    for path in FILES:
        if part_of(path) == "ops":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchrec_compress.ops."):
                names = {alias.name for alias in node.names}
                assert names <= {"RowDtype", "Structure"}, f"{path}:{node.lineno}: import {names} from ops"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"


def _is_public(path: Path, node: ast.AST) -> bool:
    """Overloads are described once, where they are implemented."""
    overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in getattr(node, "decorator_list", ()))
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not overload


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_annotated_and_described(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if _is_public(path, node):
            doc = ast.get_docstring(node)
            homes = [tree, *(home for home in _classes(tree) if not home.name.startswith("_"))]
            nested = not any(node in ast.iter_child_nodes(home) for home in homes)
            assert nested or (doc and doc.splitlines()[0].endswith((".", ":", ")"))), f"{path}: {node.name}: {doc!r}"
        if isinstance(node, ast.FunctionDef):
            bare = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.annotation is None]
            assert set(bare) <= {"self", "cls"}, f"{path}: {node.name}: {bare}"


def _classes(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_every_folder_is_installed():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == {*folders, "torchrec_compress.launch"}


def test_the_component_needs_nothing_but_torchx():
    """It is run by its path on machines that may lack the rest."""
    for name, line in imports(LAUNCH / "components.py"):
        first = name.split(".")[0]
        assert first == "torchx" or first in sys.stdlib_module_names, f"launch/components.py:{line}: {name}"


def test_importing_the_package_initialises_no_cuda_and_needs_no_training_package():
    code = (
        "import sys, torchrec_compress, torch;"
        "assert not torch.cuda.is_initialized();"
        "extra = {'pyarrow', 'matplotlib', 'tensorboard', 'torchx', 'faiss', 'sklearn'};"
        "mine = {name for name in sys.modules if name.startswith('torchrec_compress.')};"
        "assert not {name for name in mine if name.split('.')[1] in ('train', 'cli')}, mine;"
        "print(sorted(extra & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "faiss" not in done.stdout
