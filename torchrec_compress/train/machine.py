"""Settings of this process that make CPU training quick and quiet."""

from __future__ import annotations

import ctypes
import logging
import warnings

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(num_threads: int) -> None:
    """Set the threads, keep freed memory, and silence what users can do nothing about.

    glibc hands every buffer over 32 MB back to the system and faults its pages in again at the next step, which costs
    as much as the arithmetic on it; with higher thresholds it keeps them.

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
