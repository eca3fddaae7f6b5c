"""Which implementation serves `codebook_bag` on a CPU and on a GPU, and why not the others."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from dataclasses import dataclass

import torch

from torchrec_compress.ops import native
from torchrec_compress.ops.gpu import program

# "cpp" is about CPUs, "cuda" and "triton" about GPUs; on the other kind of device each of them means "auto"
BACKENDS = ("auto", "cpp", "cuda", "triton", "torch")
_VARIABLE = "TORCHREC_COMPRESS_BACKEND"
_NO_GPU = "there is no GPU"
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True)
class Tier:
    """One implementation.

    Args:
        name: "cpp", "cuda", "triton" or "torch".
        detail: what it is, for example the path of the library.
        passed_over: why it does not serve; empty for the one that does.

    Example:
        >>> Tier("cpp", "avx2", "").passed_over
        ''
    """

    name: str
    detail: str
    passed_over: str


def requested_backend() -> str:
    """Return what TORCHREC_COMPRESS_BACKEND asks for: "auto" (the default) or another of `BACKENDS`.

    Raises:
        ValueError: it is anything else.

    Example:
        >>> requested_backend() in BACKENDS
        True
    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"{_VARIABLE}: must be one of {', '.join(BACKENDS)}, got {wanted!r}; unset it for auto")
    return wanted


def _load() -> tuple[str, str]:
    """Load the C++ library, once a process: (its instruction set, ""), or ("", why there is none)."""
    # a cache alone lets two threads in at once, and operators must be registered once
    with _lock:
        return _load_once()


@functools.cache
def _load_once() -> tuple[str, str]:
    try:
        return native.load(), ""
    except native.CannotBuild as error:
        return "", str(error)


@functools.cache
def _warn(reason: str, remedy: str) -> None:
    _log.warning(
        "codebook_bag runs on plain PyTorch, which is slower: %s. %s, or set %s=torch to choose this and silence the "
        "warning.",
        reason,
        remedy,
        _VARIABLE,
    )


# torch.compile and torch.export ask once, while tracing, and keep the answer: the build is no part of the graph
@torch.compiler.assume_constant_result
def cpp_serves() -> bool:
    """Return whether the C++ kernels serve; the first call builds and loads them.

    Raises:
        ValueError: TORCHREC_COMPRESS_BACKEND is unknown.
        RuntimeError: it asks for the kernels and they cannot be had.

    Example:
        >>> cpp_serves() in (True, False)
        True
    """
    wanted = requested_backend()
    if wanted == "torch":
        return False
    reason = _load()[1]
    if reason and wanted == "cpp":
        raise RuntimeError(f"{_VARIABLE}=cpp: the C++ kernels must be there, got none: {reason}; set it to auto")
    if reason:
        _warn(reason, "Install a C++ compiler")
    return not reason


@functools.cache
def _cuda_reason() -> str:
    """Return why the CUDA kernels do not serve, or ""; compiles a small one."""
    if not torch.cuda.is_available():
        return _NO_GPU
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA GPUs"
    signature = program.Signature(2, 2, 4, False, torch.uint8, torch.float32, None, None, False, False, False)
    try:
        program.compile_program(program.Program("HOT_ROWS", signature, ()), torch.cuda.get_device_capability())
    except program.CannotCompile as error:
        return str(error)
    return ""


def _triton_reason() -> str:
    """Return why the Triton kernels do not serve, or ""."""
    if not torch.cuda.is_available():
        return _NO_GPU
    if importlib.util.find_spec("triton") is None:
        return "the Python package triton is not installed"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients are added with atomics, and deterministic algorithms are asked for"
    return ""


def _gpu_passed_over() -> dict[str, str]:
    """Return why each implementation on a GPU is passed over, fastest first; "" for the one that serves, if any."""
    wanted, serving = requested_backend(), ""
    found = {"cuda": _cuda_reason(), "triton": _triton_reason(), "torch": ""}
    for name, reason in found.items():
        if not reason and wanted in found and name != wanted:
            found[name] = f"{_VARIABLE}={wanted}"
        elif not reason and serving:
            found[name] = f"slower than {serving}"
        elif not reason:
            serving = name
    return found


@torch.compiler.assume_constant_result
def gpu_tier() -> str:
    """Return what serves on a GPU: "cuda", "triton" or "torch".

    Raises:
        ValueError: TORCHREC_COMPRESS_BACKEND is unknown.
        RuntimeError: it asks for a tier that cannot be had.

    Example:
        >>> gpu_tier() in ("cuda", "triton", "torch")
        True
    """
    reasons, wanted = _gpu_passed_over(), requested_backend()
    if reasons.get(wanted):
        raise RuntimeError(
            f"{_VARIABLE}={wanted}: its kernels must be there, got none: {reasons[wanted]}; set it to auto"
        )
    serves = next(name for name, reason in reasons.items() if not reason)
    if serves == "torch" and wanted != "torch":
        _warn(f"cuda: {reasons['cuda']}; triton: {reasons['triton']}", "Install cuda-bindings or triton")
    return serves


def tiers(device: str = "cpu") -> list[Tier]:
    """Return every implementation, fastest first, with the reason each other one is passed over.

    Args:
        device: "cpu" or "cuda"; without a GPU nothing serves on the latter.

    Example:
        >>> sum(not tier.passed_over for tier in tiers())
        1
    """
    return _cpu_tiers() if device == "cpu" else _gpu_tiers()


def _gpu_tiers() -> list[Tier]:
    details = {
        "cuda": "CUDA kernels, compiled by NVRTC when first used; unmeasured",
        "triton": "Triton kernels; unmeasured",
        "torch": "plain PyTorch",
    }
    reasons = _gpu_passed_over() if torch.cuda.is_available() else dict.fromkeys(details, _NO_GPU)
    return [Tier(name, detail, reasons[name]) for name, detail in details.items()]


def _cpu_tiers() -> list[Tier]:
    wanted = requested_backend()  # "cuda" and "triton" are not about CPUs
    if wanted == "torch":
        forced = f"{_VARIABLE}=torch"
        return [Tier("cpp", "C++ kernels", forced), Tier("torch", "plain PyTorch", "")]
    instructions, reason = _load()
    if reason:
        plain = f"{_VARIABLE}=cpp" if wanted == "cpp" else ""
        return [Tier("cpp", "C++ kernels", reason), Tier("torch", "plain PyTorch", plain)]
    detail = f"C++ kernels ({instructions}), {native.library_path()}"
    rest = "slower; serves float64 codebooks, int64 codes and other devices"
    return [Tier("cpp", detail, ""), Tier("torch", "plain PyTorch", rest)]
