"""The rows of codes that ids have, on the C++ kernels of a CPU; arguments as in ops/coded_ids.py."""

from __future__ import annotations

import torch
from torch import Tensor


def cpp_coded_rows(index: Tensor, ids: Tensor) -> Tensor:
    """Return the rows, (L,) int64."""
    return torch.ops.torchrec_compress.coded_rows.default(index, ids)


def register() -> None:
    """Register the shape of the operator, once the library is loaded."""
    torch.library.register_fake("torchrec_compress::coded_rows", _fake)


def _fake(index: Tensor, ids: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int64)
