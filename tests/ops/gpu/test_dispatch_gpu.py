"""Which implementation serves on a GPU, and what importing the package leaves alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrec_compress.ops import dispatch, tiers, trained_bags
from torchrec_compress.ops.gpu import program

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU for which everything compiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(program, "compile_program", lambda program, capability: b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TORCHREC_COMPRESS_BACKEND", raising=False)
    for cached in (dispatch._cuda_reason, dispatch._warn):
        cached.cache_clear()
    yield
    for cached in (dispatch._cuda_reason, dispatch._warn):
        cached.cache_clear()


def reasons() -> dict[str, str]:
    return {tier.name: tier.passed_over for tier in tiers("cuda")}


def refuse(program, capability):
    raise dispatch.program.CannotCompile("NVRTC does not load: no such library")


def test_without_a_gpu_nothing_serves_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert reasons() == dict.fromkeys(("cuda", "triton", "torch"), "there is no GPU")


def test_the_cuda_kernels_come_first(gpu):
    assert dispatch.gpu_tier() == "cuda"
    assert reasons() == {"cuda": "", "triton": "slower than cuda", "torch": "slower than cuda"}


def test_without_nvrtc_triton_serves(gpu, monkeypatch):
    monkeypatch.setattr(program, "compile_program", refuse)
    assert dispatch.gpu_tier() == "triton"
    assert reasons()["cuda"] == "NVRTC does not load: no such library"


def test_trained_rows_have_cuda_kernels_and_no_others(gpu, monkeypatch, caplog):
    assert dispatch.cuda_serves() and not dispatch.cuda_serves("torch")
    assert not caplog.messages
    monkeypatch.setattr(program, "compile_program", refuse)
    dispatch._cuda_reason.cache_clear()
    assert [dispatch.cuda_serves(), dispatch.cuda_serves()] == [False, False]
    (warning,) = caplog.messages
    assert warning.startswith(
        "trained_bag runs on plain PyTorch, which is slower: triton has no kernels for it; cuda: NV"
    )


@pytest.mark.parametrize("backend", [None, "cuda"])
def test_trained_rows_ask_for_the_kernels_of_their_device(backend, gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(trained_bags, "cpp_serves", lambda backend: asked.append(("cpp", backend)) or True)
    monkeypatch.setattr(trained_bags, "cuda_serves", lambda backend: asked.append(("cuda", backend)) or True)
    with FakeTensorMode():
        assert trained_bags._serving(torch.empty(1, 9, device="cuda"), backend) == "cuda"
        assert trained_bags._serving(torch.empty(1, 9), backend) == "cpp"
        assert trained_bags._serving(torch.empty(1, 9, device="meta"), backend) == "torch"
    assert asked == [("cuda", backend), ("cpp", backend)]


def test_triton_does_not_serve_where_bits_must_repeat(gpu, monkeypatch, caplog):
    monkeypatch.setattr(program, "compile_program", refuse)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [dispatch.gpu_tier(), dispatch.gpu_tier()] == ["torch", "torch"]
    assert "deterministic algorithms are asked for" in reasons()["triton"]
    (warning,) = caplog.messages
    assert "NVRTC does not load" in warning and "Install cuda-bindings or triton" in warning


@pytest.mark.parametrize("wanted", ["cuda", "triton", "torch"])
def test_a_tier_can_be_demanded(wanted, gpu, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", wanted)
    assert dispatch.gpu_tier() == wanted
    others = {name: reason for name, reason in reasons().items() if name != wanted}
    assert set(others.values()) == {f"TORCHREC_COMPRESS_BACKEND={wanted}"}


def test_a_tier_that_is_demanded_must_be_there(gpu, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="BACKEND=triton: its kernels must be there, got none: the Python package"):
        dispatch.gpu_tier()


def test_the_kernels_of_a_cpu_mean_auto(gpu, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
    assert dispatch.gpu_tier() == "cuda"


def test_nothing_is_served_by_kernels_that_a_gpu_lacks(monkeypatch):
    monkeypatch.setattr(program, "missing", lambda: "nothing is installed")
    with pytest.raises(program.CannotCompile, match="nothing is installed"):
        program.compile_program.__wrapped__(program.Program("HOT_ROWS", None, ()), (9, 0))


def test_importing_needs_no_compiler():
    # torch and torchrec import Triton where it is installed, so it is hidden
    code = (
        "import sys, torch;"
        "sys.modules.update({'triton': None, 'cuda': None, 'cuda.bindings': None});"
        "import torchrec_compress.ops;"
        "assert not torch.cuda.is_initialized();"
        "assert 'torchrec_compress.ops.gpu.triton_kernels' not in sys.modules"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
