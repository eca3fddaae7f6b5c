"""The benchmark for a GPU: what it does without one, and its arithmetic."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels_gpu.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    full = {**os.environ, **environment}
    return subprocess.run(command, cwd=SCRIPT.parent.parent, env=full, capture_output=True, text=True, check=False)


def report():
    """Return the module that makes the text."""
    spec = importlib.util.spec_from_file_location("kernels_gpu_report", SCRIPT.with_name("kernels_gpu_report.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


SIZES = {"rows": 50, "tables": 2, "batch": 4, "rounds": 2, "dim": 16, "codes": 4}
DRY = [*(f"--{name}={size}" for name, size in SIZES.items()), "--device", "cpu", "--lengths", "1", "10"]
FULL = ["FBGEMM SplitTBE fp32", "FBGEMM SplitTBE fp16"]
CODES = [f"codebook_bags {tier} {dtype}" for dtype in ("float32", "bfloat16") for tier in ("cuda", "triton")]
FORWARD = [
    *(f"FBGEMM IntNBit int{bits}" for bits in (8, 4)),
    *(f"codebook_bags {tier} {dtype}" for dtype in ("float32", "bfloat16") for tier in ("staged", "direct")),
]


def test_a_dry_run_measures_every_variant(tmp_path):
    done = run(*DRY, "--out", str(tmp_path / "out.md"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    assert text == done.stdout
    assert "a dry run: the figures mean nothing" in text and "`python benchmarks/kernels_gpu.py --rows=50 " in text
    lines = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in text.splitlines() if line[:3] == "| 1"}
    for length in ("1", "10"):
        found = {line[1:] for line in lines if line[0] == length and line[2][:1] in "Fc"}
        steps = [("step", name) for name in (*FULL, *CODES)]
        assert found == {*steps, *(("forward", name) for name in (*FULL, *FORWARD, *CODES))}
    assert "not measured" not in text


def test_what_cannot_be_measured_is_named_with_its_reason(tmp_path):
    package = tmp_path / "fbgemm_gpu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no FBGEMM here')")
    done = run(*DRY, "--tiers", "torch", PYTHONPATH=os.pathsep.join([str(tmp_path), str(SCRIPT.parent.parent)]))
    assert done.returncode == 0, done.stderr
    assert "| 10 | | FBGEMM SplitTBE fp32 | not measured: ImportError: no FBGEMM here" in done.stdout
    assert "| 10 | forward | codebook_bags torch float32 |" in done.stdout
    assert "| 10 | forward | 4.0x" not in done.stdout  # there is nothing to compare with


def test_a_setting_that_would_start_too_late_is_left_out():
    done = run(*DRY, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert "Not measured, for want of time: L = 10.\n" in done.stdout
    assert "| 1 | forward | FBGEMM SplitTBE fp32 |" in done.stdout


def test_ratios_rates_and_goals():
    module = report()
    found = module.Found()
    for name, milliseconds, num_bytes in (
        (module.BASELINE, 4.0, 4_000_000), ("codebook_bags cuda float32", 1.0, 700_000),
        ("codebook_bags triton float32", 2.0, 700_000),
    ):  # fmt: skip
        found.variants[name, "forward"] = module.Variant(None, num_bytes, [milliseconds] * 3, [milliseconds] * 3)
    peak = 1_000_000 / 0.001
    lines = module.goals({10: found, 50: found}, peak)
    assert lines == [
        "| 10 | forward | 4.0x | 4.00x, codebook_bags cuda float32 | met |",
        "| 10 | copy's rate | 70% | 70%, codebook_bags cuda float32 | met |",
        "| 50 | forward | 6.0x | 4.00x, codebook_bags cuda float32 | missed |",
        "| 50 | copy's rate | 70% | 70%, codebook_bags cuda float32 | met |",
    ]
    assert module.rows(found, 10, peak)[2] == (
        "| 10 | forward | codebook_bags triton float32 | 2000 | 2000 | 2000 | 2.00 (2.00 to 2.00) | 35% | 0 |"
    )


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
