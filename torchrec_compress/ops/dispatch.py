"""Which implementation serves `codebook_bag` on a CPU, and why not the others."""

from __future__ import annotations

import functools
import logging
import os
import threading
from dataclasses import dataclass

import torch

from torchrec_compress.ops import native

BACKENDS = ("auto", "cpp", "torch")
_VARIABLE = "TORCHREC_COMPRESS_BACKEND"
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True)
class Tier:
    """One implementation.

    Args:
        name: "cpp" or "torch".
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
    """Return what TORCHREC_COMPRESS_BACKEND asks for: "auto" (the default), "cpp" or "torch".

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
def _warn(reason: str) -> None:
    _log.warning(
        "codebook_bag runs on plain PyTorch, which is slower: %s. Install a C++ compiler, or set %s=torch to choose "
        "this and silence the warning.",
        reason,
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
        _warn(reason)
    return not reason


def tiers() -> list[Tier]:
    """Return every implementation on a CPU, fastest first, with the reason each other one is passed over.

    Example:
        >>> sum(not tier.passed_over for tier in tiers())
        1
    """
    wanted = requested_backend()
    if wanted == "torch":
        forced = f"{_VARIABLE}=torch"
        return [Tier("cpp", "C++ kernels", forced), Tier("torch", "plain PyTorch", "")]
    instructions, reason = _load()
    if reason:
        plain = f"{_VARIABLE}=cpp" if wanted == "cpp" else ""
        return [Tier("cpp", "C++ kernels", reason), Tier("torch", "plain PyTorch", plain)]
    detail = f"C++ kernels ({instructions}), {native.library_path()}"
    rest = "slower; serves other inputs than uint8 or int16 codes with float32 codebooks on a CPU"
    return [Tier("cpp", detail, ""), Tier("torch", "plain PyTorch", rest)]
