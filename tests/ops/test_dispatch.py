"""Which implementation serves, where the library is built, and what happens without a compiler."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.made import Made
from torchrec_compress.ops import codebook_bag, dispatch, tiers
from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.dispatch import cpp_serves, requested_backend

ROOT = Path(__file__).resolve().parents[2]
# prints the outcome of a look-up in two tables, served twice
LOOKUP = """
import logging, torch
logging.basicConfig(format="%(message)s")
from torchrec_compress.ops import codebook_bag, dispatch, tiers
codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
for _ in range(2):
    print(codebook_bag(codes, torch.arange(8.0).view(4, 2), torch.tensor([0, 2, 3])).tolist())
print([tier.name for tier in tiers() if not tier.passed_over])
"""
# makes `import fbgemm_gpu` fail
NO_FBGEMM = "import sys; sys.modules['fbgemm_gpu'] = None"
RIGHT = "[[2.0, 4.0, 10.0, 12.0], [2.0, 3.0, 6.0, 7.0]]\n"


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    full = {**os.environ, "TORCHREC_COMPRESS_CACHE": str(cache), "TORCHREC_COMPRESS_BACKEND": "auto", **environment}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.Popen(command, cwd=ROOT, env=full, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(code: str, cache: Path, **environment: str) -> tuple[int, str, str]:
    process = start(code, cache, **environment)
    out, err = process.communicate()
    return process.returncode, out, err


def run_all(*given: tuple[str, Path, dict[str, str]]) -> list[tuple[int, str, str]]:
    """Do what `run` does for several, side by side."""
    started = [start(code, cache, **environment) for code, cache, environment in given]
    ended = [process.communicate() for process in started]
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def counting_compiler(folder: Path, num_waiting: int) -> Path:
    """Return a compiler that writes a line to `folder`/calls whenever it runs.

    It hands out the library of this machine, once so many processes have said in `folder`/here that they look up.
    """
    try:
        whole = build.compile_library()
    except build.CannotBuild:
        pytest.skip("no C++ compiler")
    script = folder / "compiler"
    lines = ["#!/bin/sh", f"echo call >> {folder}/calls", f"until [ $(wc -l < {folder}/here) -ge {num_waiting} ]; do"]
    lines += ["sleep 0.1; done", "sleep 0.3", "for target; do :; done", f'cp {whole} "$target"']
    script.write_text("\n".join(lines))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_without_a_compiler_fbgemm_serves_with_one_warning(tmp_path):
    status, out, err = run(LOOKUP, tmp_path / "cache", PATH=str(tmp_path), CXX="")
    assert (status, out) == (0, RIGHT * 2 + "['fbgemm']\n"), err
    assert err.count("\n") == 1
    assert err.startswith("codebook_bag runs on FBGEMM's dense embedding bags over virtual tables, which is slower: ")
    assert "there is no C++ compiler" in err and ". Install a C++ compiler, or set" in err
    assert "or set TORCHREC_COMPRESS_BACKEND=fbgemm to choose this and silence the warning" in err


def test_without_a_compiler_and_fbgemm_the_reference_serves_with_one_warning(tmp_path):
    status, out, err = run(NO_FBGEMM + LOOKUP, tmp_path / "cache", PATH=str(tmp_path), CXX="")
    assert (status, out) == (0, RIGHT * 2 + "['torch']\n"), err
    assert err.count("\n") == 1
    assert err.startswith("codebook_bag runs on plain PyTorch, which is slower: cpp: there is no C++ compiler")
    assert "; fbgemm: fbgemm_gpu cannot be imported: import of fbgemm_gpu halted" in err


def test_an_fbgemm_of_other_operators_is_passed_over(tmp_path):
    wrong = """
from torchrec_compress.ops import dispatch
dispatch._FBGEMM_OPERATORS["split_embedding_codegen_forward_cpu"] = 9
"""
    status, out, err = run(wrong + LOOKUP, tmp_path / "cache", PATH=str(tmp_path), CXX="")
    assert (status, out) == (0, RIGHT * 2 + "['torch']\n"), err
    assert "this fbgemm_gpu has no operator split_embedding_codegen_forward_cpu of 9 arguments" in err


def test_a_compiler_that_fails_is_reported_with_its_first_error(tmp_path):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'x.h:1: error: no such header' >&2\nexit 3\n")
    script.chmod(0o755)
    status, out, err = run(LOOKUP, tmp_path / "cache", CXX=str(script))
    assert (status, out) == (0, RIGHT * 2 + "['fbgemm']\n"), err
    assert err.count("failed with status 3: x.h:1: error: no such header") == 1
    # nothing half-built stays behind
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_compiler_that_does_not_run_is_reported(tmp_path, monkeypatch):
    script = tmp_path / "c++"
    script.write_text("no program")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.CannotBuild, match="does not run"):
        build.compile_library()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCHREC_COMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(build.CannotBuild, match="home directory"):
        build.compile_library()


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = run(LOOKUP, tmp_path / "file", CXX=sys.executable)
    assert (status, out) == (0, RIGHT * 2 + "['fbgemm']\n"), err
    assert "cannot be used" in err and ". Set TORCHREC_COMPRESS_CACHE to a folder of your own, or set" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_of_gpus_is_said_to_mean_nothing_without_one(backend, caplog):
    dispatch._warn_of_no_gpu.cache_clear()
    for _ in range(2):
        cpp_serves(backend)
    said = [message for message in caplog.messages if "GPU" in message]
    assert said == [f"backend={backend} is about GPUs, and there is no GPU: look-ups run as with auto"]


def test_a_tier_can_be_demanded_and_declined(tmp_path):
    imported = "import sys; print('fbgemm_gpu' in sys.modules)"
    no_cpp, no_fbgemm, fbgemm, torch_alone = run_all(
        (LOOKUP, tmp_path, {"PATH": str(tmp_path), "CXX": "", "TORCHREC_COMPRESS_BACKEND": "cpp"}),
        (NO_FBGEMM + LOOKUP, tmp_path, {"TORCHREC_COMPRESS_BACKEND": "fbgemm"}),
        (LOOKUP + imported, tmp_path, {"TORCHREC_COMPRESS_BACKEND": "fbgemm"}),
        (LOOKUP + imported, tmp_path, {"TORCHREC_COMPRESS_BACKEND": "torch"}),
    )
    assert (no_cpp[0], no_fbgemm[0]) == (1, 1)
    said = "TORCHREC_COMPRESS_BACKEND=cpp: the C++ kernels must be there, got none: there is no C++ compiler"
    assert said in no_cpp[2]
    said = "TORCHREC_COMPRESS_BACKEND=fbgemm: FBGEMM's kernels must be there, got none: fbgemm_gpu cannot be im"
    assert said in no_fbgemm[2]
    # what is declined is neither built nor imported
    assert fbgemm == (0, RIGHT * 2 + "['fbgemm']\nTrue\n", "")
    assert torch_alone == (0, RIGHT * 2 + "['torch']\nFalse\n", "")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="must be one of auto, cpp, fbgemm, cuda, triton, torch, got 'gpu'"):
        requested_backend()


# what an operator is called when a backend serves a look-up
OPERATORS = {"cpp": "codebook_bags_forward", "fbgemm": "virtual_table_bags", "torch": "_embedding_bag_forward_only"}


@pytest.mark.parametrize("backend", OPERATORS)
def test_an_argument_overrides_the_variable(backend, monkeypatch):
    if backend == "cpp" and not cpp_serves("auto"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "torch" if backend != "torch" else "fbgemm")
    assert [tier.name for tier in tiers(backend=backend) if not tier.passed_over] == [backend]
    others = [tier.passed_over for tier in tiers(backend=backend) if tier.name != backend]
    assert any(reason.startswith((f"backend={backend}", f"slower than {backend}")) for reason in others), others
    codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)

    def look_up(books):
        return codebook_bag(codes, books, torch.tensor([0, 2, 3]), backend=backend)

    books = torch.arange(8.0).view(4, 2)
    with Made() as made:
        assert f"{look_up(books).tolist()}\n" == RIGHT
    names = " ".join(name for _, name in made.floats)
    assert [name for name, operator in OPERATORS.items() if operator in names] == [backend], names
    torch.compiler.reset()
    assert f"{torch.compile(look_up, fullgraph=True, backend='aot_eager')(books).tolist()}\n" == RIGHT


def test_an_unknown_argument_is_an_error():
    codes = torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"backend: must be one of auto, cpp, .* got 'gpu'; leave it out for what TORCH"
    ):
        codebook_bag(codes, torch.zeros(2, 2), None, backend="gpu")


def test_importing_builds_nothing_and_imports_no_fbgemm(tmp_path):
    code = "import sys, torchrec_compress, torchrec_compress.ops; print('fbgemm_gpu' in sys.modules)"
    assert run(code, tmp_path) == (0, "False\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_start_at_once_build_once_and_later_ones_not_at_all(tmp_path):
    compiler, cache = counting_compiler(tmp_path, 3), tmp_path / "cache"
    here = f"import torchrec_compress.ops; open({str(tmp_path / 'here')!r}, 'a').write('here\\n')\n"
    ranks = [start(here + LOOKUP, cache, CXX=str(compiler)) for _ in range(3)]
    ended = [rank.communicate() for rank in ranks]
    assert [out for out, _ in ended] == [RIGHT * 2 + "['cpp']\n"] * 3
    # one of them says what takes so long
    said = "".join(err for _, err in ended)
    assert said.startswith("compiling the C++ kernels with ") and said.count("\n") == 1, said
    sources = list(build.SOURCES.glob("*.cpp"))
    assert (tmp_path / "calls").read_text().count("call") == len(sources) + 1
    # a compiler is not even looked for once there is a library
    assert run(LOOKUP, cache, PATH=str(tmp_path), CXX="") == (0, RIGHT * 2 + "['cpp']\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), [("default", "base"), ("avx2", "avx2")])
def test_the_kernels_for_other_processors_equal_the_reference(capability, name):
    if name != "base" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    code = f"""
import torch
from tests.ops.bags import check
from torchrec_compress.ops.cpp import build
assert build.load() == {name!r}
for structure in ("product", "residual"):
    for width in (4, 5, 8, 16, 32, 40):
        check(130, [100, 0, 30], 11, 256, width, structure, 9, True, torch.float32)
        check(130, [100, 0, 30], 27, 256, width, structure, 0, True, torch.float32)
        check(130, [100, 0, 30], 16, 256, width, structure, 0, False, torch.float32)
        check(130, [100, 0, 30], 6, 1000, width, structure, 0, False, torch.float32)
"""
    try:
        build.find_compiler()
    except build.CannotBuild:
        pytest.skip("no C++ compiler")
    status, _, err = run(code, build.cache_folder(), ATEN_CPU_CAPABILITY=capability)
    assert status == 0, err


def test_info_says_what_serves_and_why_not_the_others(tmp_path):
    code = "from torchrec_compress.cli import main; main(['info'])"
    plain, without, neither, unknown = run_all(
        (code, tmp_path, {"TORCHREC_COMPRESS_BACKEND": "torch"}),
        (code, tmp_path, {"PATH": str(tmp_path), "CXX": ""}),
        (NO_FBGEMM + "\n" + code, tmp_path, {"PATH": str(tmp_path), "CXX": ""}),
        (code, tmp_path, {"TORCHREC_COMPRESS_BACKEND": "x"}),
    )
    status, out, err = plain
    assert status == 0, err
    assert out.startswith("python 3.")
    assert "codebook_bag, CPU: cpp passed over: TORCHREC_COMPRESS_BACKEND=torch\n" in out
    assert "codebook_bag, CPU: fbgemm passed over: TORCHREC_COMPRESS_BACKEND=torch\n" in out
    assert "codebook_bag, CPU: torch serves\n" in out
    status, out, err = without
    assert status == 0, err
    assert "codebook_bag, CPU: cpp passed over: there is no C++ compiler (looked for" in out
    assert "codebook_bag, CPU: fbgemm serves\n" in out
    assert "CPU: torch passed over: slower than fbgemm; serves float64 codebooks and other devices\n" in out
    status, out, err = neither
    assert status == 0, err
    assert "codebook_bag, CPU: fbgemm passed over: fbgemm_gpu cannot be imported" in out
    assert "codebook_bag, CPU: torch serves\n" in out
    # an unknown backend is an error of the user's, in one line
    status, _, err = unknown
    assert (status, err.count("\n")) == (2, 1)
