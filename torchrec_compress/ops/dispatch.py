"""Which implementation serves `codebook_bag` on a CPU and on a GPU, and why not the others."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from dataclasses import dataclass

import torch

from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu import program

# "cpp" and "fbgemm" are about CPUs, "cuda" and "triton" about GPUs; on the other kind of device each means "auto"
BACKENDS = ("auto", "cpp", "fbgemm", "cuda", "triton", "torch")
_GPU_BACKENDS = ("cuda", "triton")
# what is called of FBGEMM, with the numbers of arguments
_FBGEMM_OPERATORS = {
    "split_embedding_codegen_forward_cpu": 10,
    "split_embedding_backward_codegen_dense_cpu": 12,
    "split_embedding_codegen_grad_indice_weights_cpu": 7,
}
_VARIABLE = "TORCHREC_COMPRESS_BACKEND"
_NAMES = {"fbgemm": "FBGEMM's dense embedding bags over virtual tables", "torch": "plain PyTorch"}
_NO_GPU = "there is no GPU"
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True)
class Tier:
    """One implementation.

    Args:
        name: "cpp", "fbgemm", "cuda", "triton" or "torch".
        detail: what it is, for example the path of the library.
        passed_over: why it does not serve; empty for the one that does.

    Example:
        >>> Tier("cpp", "avx2", "").passed_over
        ''
    """

    name: str
    detail: str
    passed_over: str


def requested_backend(backend: str | None = None) -> str:
    """Return what is asked for: by `backend`, else by TORCHREC_COMPRESS_BACKEND, else "auto".

    Args:
        backend: one of `BACKENDS`, or None.

    Raises:
        ValueError: it is anything else.

    Example:
        >>> requested_backend() in BACKENDS, requested_backend("torch")
        (True, 'torch')
    """
    wanted = os.environ.get(_VARIABLE, "auto") if backend is None else backend
    if wanted not in BACKENDS:
        remedy = "unset it for auto" if backend is None else f"leave it out for what {_VARIABLE} says"
        raise ValueError(f"{_asked_by(backend)}: must be one of {', '.join(BACKENDS)}, got {wanted!r}; {remedy}")
    return wanted


def _asked_by(backend: str | None) -> str:
    return _VARIABLE if backend is None else "backend"


def _load() -> tuple[str, str, str]:
    """Load the C++ library, once a process: (its instruction set, "", ""), or ("", why there is none, what to do)."""
    # a cache alone lets two threads in at once, and operators must be registered once
    with _lock:
        return _load_once()


@functools.cache
def _load_once() -> tuple[str, str, str]:
    try:
        return build.load(), "", ""
    except build.CannotBuild as error:
        return "", str(error), error.remedy


@functools.cache
def _fbgemm_reason() -> str:
    """Return why FBGEMM's kernels do not serve, or ""; imports it, and registers nothing of ours."""
    try:
        importlib.import_module("fbgemm_gpu")
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported: {error}"
    for name, num_arguments in _FBGEMM_OPERATORS.items():
        operator = getattr(torch.ops.fbgemm, name, None)
        if operator is None or len(operator.default._schema.arguments) != num_arguments:
            return f"this fbgemm_gpu has no operator {name} of {num_arguments} arguments"
    return ""


@functools.cache
def _warn(serving: str, reason: str, remedy: str, what: str = "codebook_bag") -> None:
    _log.warning(
        "%s runs on %s, which is slower: %s. %s, or set %s=%s to choose this and silence the warning.",
        what,
        _NAMES[serving],
        reason,
        remedy,
        _VARIABLE,
        serving,
    )


@functools.cache
def _warn_of_no_gpu(asked_by: str, wanted: str) -> None:
    """Log that a backend of GPUs was asked for where there is none; beside a GPU, what is on the CPU is no matter."""
    if not torch.cuda.is_available():
        _log.warning("%s=%s is about GPUs, and %s: look-ups run as with auto", asked_by, wanted, _NO_GPU)


# torch.compile and torch.export ask once, while tracing, and keep the answer: the build is no part of the graph
@torch.compiler.assume_constant_result
def cpp_serves(backend: str | None = None) -> bool:
    """Return whether the C++ kernels serve; the first call builds and loads them.

    Args:
        backend: see `requested_backend`.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: it asks for the kernels and they cannot be had.

    Example:
        >>> cpp_serves() in (True, False)
        True
    """
    wanted = requested_backend(backend)
    if wanted in ("fbgemm", "torch"):
        return False
    if wanted in _GPU_BACKENDS:
        _warn_of_no_gpu(_asked_by(backend), wanted)
    _, reason, remedy = _load()
    if reason and wanted == "cpp":
        raise RuntimeError(
            f"{_asked_by(backend)}=cpp: the C++ kernels must be there, got none: {reason}; set it to auto"
        )
    if reason:
        fbgemm_reason = _fbgemm_reason()
        reasons = f"cpp: {reason}; fbgemm: {fbgemm_reason}" if fbgemm_reason else reason
        _warn("torch" if fbgemm_reason else "fbgemm", reasons, remedy)
    return not reason


@torch.compiler.assume_constant_result
def fbgemm_serves(backend: str | None = None) -> bool:
    """Return whether FBGEMM serves what the C++ kernels do not; the first call imports it.

    Args:
        backend: see `requested_backend`.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: it asks for FBGEMM, which cannot be had.

    Example:
        >>> fbgemm_serves() in (True, False)
        True
    """
    wanted = requested_backend(backend)
    if wanted == "torch":
        return False
    reason = _fbgemm_reason()
    if reason and wanted == "fbgemm":
        raise RuntimeError(
            f"{_asked_by(backend)}=fbgemm: FBGEMM's kernels must be there, got none: {reason}; set it to auto"
        )
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


def _gpu_passed_over(backend: str | None) -> dict[str, str]:
    """Return why each implementation on a GPU is passed over, fastest first; "" for the one that serves, if any."""
    return _choose({"cuda": _cuda_reason(), "triton": _triton_reason(), "torch": ""}, {}, backend)


def _choose(reasons: dict[str, str], others: dict[str, str], backend: str | None) -> dict[str, str]:
    """Let one tier serve, and add to `reasons`, fastest first, why the rest of those that could do not.

    `others` says what a slower tier serves that the faster ones do not read.
    """
    wanted, serving = requested_backend(backend), ""
    for name, reason in reasons.items():
        if not reason and serving and name in others:
            reasons[name] = f"slower than {serving}; serves {others[name]}"
        elif not reason and wanted in reasons and name != wanted:
            reasons[name] = f"{_asked_by(backend)}={wanted}"
        elif not reason and serving:
            reasons[name] = f"slower than {serving}"
        elif not reason:
            serving = name
    return reasons


@torch.compiler.assume_constant_result
def gpu_tier(backend: str | None = None) -> str:
    """Return what serves on a GPU: "cuda", "triton" or "torch".

    Args:
        backend: see `requested_backend`.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: it asks for a tier that cannot be had.

    Example:
        >>> gpu_tier() in ("cuda", "triton", "torch")
        True
    """
    reasons, wanted = _gpu_passed_over(backend), requested_backend(backend)
    if reasons.get(wanted):
        raise RuntimeError(
            f"{_asked_by(backend)}={wanted}: its kernels must be there, got none: {reasons[wanted]}; set it to auto"
        )
    serves = next(name for name, reason in reasons.items() if not reason)
    if serves == "torch" and wanted != "torch":
        _warn(serves, f"cuda: {reasons['cuda']}; triton: {reasons['triton']}", "Install cuda-bindings or triton")
    return serves


@torch.compiler.assume_constant_result
def cuda_serves(backend: str | None = None) -> bool:
    """Return whether the CUDA kernels serve trained rows on a GPU; Triton has none for them, so PyTorch does else.

    Args:
        backend: see `requested_backend`.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: it asks for a tier that cannot be had.

    Example:
        >>> cuda_serves("torch")
        False
    """
    serving = gpu_tier(backend)
    if serving == "triton":
        reason = _gpu_passed_over(backend)["cuda"]
        _warn("torch", f"triton has no kernels for it; cuda: {reason}", "Install cuda-bindings", "trained_bag")
    return serving == "cuda"


def tiers(device: str = "cpu", backend: str | None = None) -> list[Tier]:
    """Return every implementation, fastest first, with the reason each other one is passed over.

    Args:
        device: "cpu" or "cuda"; without a GPU nothing serves on the latter.
        backend: see `requested_backend`.

    Example:
        >>> sum(not tier.passed_over for tier in tiers())
        1
    """
    return _cpu_tiers(backend) if device == "cpu" else _gpu_tiers(backend)


def _gpu_tiers(backend: str | None) -> list[Tier]:
    details = {
        "cuda": "CUDA kernels of codes and of trained rows, compiled by NVRTC when first used; unmeasured",
        "triton": "Triton kernels of codes, beside plain PyTorch for trained rows; unmeasured",
        "torch": "plain PyTorch",
    }
    reasons = _gpu_passed_over(backend) if torch.cuda.is_available() else dict.fromkeys(details, _NO_GPU)
    return [Tier(name, detail, reasons[name]) for name, detail in details.items()]


def _cpu_tiers(backend: str | None) -> list[Tier]:
    wanted = requested_backend(backend)  # "cuda" and "triton" are not about CPUs
    # what is not asked for is neither built nor imported
    instructions, reason, _ = _load() if wanted not in ("fbgemm", "torch") else ("", "", "")
    reasons = {"cpp": reason, "fbgemm": "" if wanted == "torch" else _fbgemm_reason(), "torch": ""}
    _choose(reasons, {"fbgemm": "int64 codes", "torch": "float64 codebooks and other devices"}, backend)
    kernels = f"C++ kernels ({instructions}), {build.library_path()}" if instructions else "C++ kernels"
    return [Tier(name, {"cpp": kernels, **_NAMES}[name], reason) for name, reason in reasons.items()]
