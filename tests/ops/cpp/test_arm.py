"""The C++ kernels compiled for aarch64, the base kernels run in emulation; `make check-arm` gets what that needs."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from torchrec_compress.ops.cpp import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
DRIVER = Path(__file__).with_name("kernels_check.cpp")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++; make check-arm installs it"),
]


def compile_for_arm(*arguments: str) -> None:
    """Run the cross compiler with the flags of the library; a warning is an error."""
    command = [str(COMPILER), *build.FLAGS, "-Wall", "-Wextra", "-Werror", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", sorted(build.SOURCES.glob("*.cpp")), ids=lambda path: path.stem)
def test_compiles(source, tmp_path):
    home = Path(torch.__file__).parent / "include"
    includes = ["-isystem", str(home), "-isystem", str(home / "torch/csrc/api/include")]
    compile_for_arm(*includes, "-c", str(source), "-o", str(tmp_path / "kernels.o"))


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64; make check-arm installs it")
def test_base_kernels_in_emulation(tmp_path):
    program = str(tmp_path / "check")
    sources = [str(build.SOURCES / "kernels_base.cpp"), str(DRIVER)]
    compile_for_arm("-static", "-DKERNELS=kernels_base", "-I", str(build.SOURCES), *sources, "-o", program)
    done = subprocess.run([str(EMULATOR), program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
