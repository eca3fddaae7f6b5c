"""The benchmark for a GPU: what it does without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=SCRIPT.parent.parent, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_without_a_gpu_and_writes_nothing(tmp_path):
    done = run("--lengths", "1", "10", "--out", str(tmp_path / "out.md"))
    assert done.returncode == 1
    assert done.stderr == (
        "kernels_gpu: there must be an NVIDIA GPU, got none; benchmarks/kernels.py measures the CPU\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_tier_is_an_error():
    done = run("--tiers", "nonsense")
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
