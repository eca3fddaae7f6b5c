"""Settings of this process that make CPU training quick and quiet, and what this machine is slow at."""

from __future__ import annotations

import ctypes
import logging
import time
import warnings
from collections.abc import Iterable

import torch

from torchrec_compress.train.config import RunConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_WORTH_SAYING = 2.0  # times as long as float32


def prepare(num_threads: int) -> None:
    """Set the threads, keep freed memory, and silence what users can do nothing about.

    glibc hands every buffer over 32 MB back to the system and faults its pages in again at the next step, which costs
    as much as the arithmetic on it; with higher thresholds it keeps them, until `give_back` is called.

    Args:
        num_threads: of torch and FBGEMM. FBGEMM's CPU kernels lose by more than one where other processes compete.
    """
    torch.set_num_threads(num_threads)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    # torchrec 1.8 on torch 2.13: deprecated arguments that it passes itself, and notes about plans for GPU clusters
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|torchrec|fbgemm_gpu|tensordict)\b")
    warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor instead")
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(lambda record: not str(record.msg).startswith("Sharding spec not found"))
    # stages fit every table that they compress, so a note about start codes would mislead
    logging.getLogger("torchrec_compress.modules").setLevel(logging.ERROR)


def give_back() -> None:
    """Give the pages of freed memory back to the system, where `prepare` or pieces that live on had them kept.

    What is freed between buffers that live on is kept in pieces, too small for the next evaluation or the next run's
    rows; a process that trained several models of Globo.com news held 10 GB, 8 of them free. Call it where a phase
    ends: the next one faults its pages in again once.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def slow_settings(configs: Iterable[RunConfig]) -> list[str]:
    """Return a line for each setting of some of these runs that makes this machine slow.

    Processors without instructions for bfloat16 multiply its matrices number by number, 30 to 50 times as slowly as
    float32 ones (AVX2, torch 2.13).

    Example:
        >>> slow_settings([RunConfig()])
        []
    """
    on_cpu = any(
        config.model.bfloat16 and (config.parallel.device == "cpu" or not torch.cuda.is_available())
        for config in configs
    )
    cost = _bfloat16_cost() if on_cpu else 0.0
    if cost < _WORTH_SAYING:
        return []
    return [
        f"model.bfloat16: matrix products take {cost:.0f} times as long in bfloat16 as in float32 on this CPU; set "
        "model.bfloat16=false (other settings, hence other runs than those with true)"
    ]


@torch.no_grad()
def _bfloat16_cost() -> float:
    """Return how long a product of bfloat16 matrices takes, in times of the float32 one; the best of three each."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 256, dtype=dtype), torch.ones(256, 128, dtype=dtype)
        torch.mm(left, right)  # the first call sets up
        rounds = []
        for _ in range(3):
            begun = time.perf_counter()
            torch.mm(left, right)
            rounds.append(time.perf_counter() - begun)
        seconds[dtype] = min(rounds)
    return seconds[torch.bfloat16] / max(seconds[torch.float32], 1e-9)
