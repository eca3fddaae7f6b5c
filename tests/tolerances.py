"""How far results may lie from a float64 reference, one table for all tests; CI uses the same."""

import torch
from torch import Tensor

ABSOLUTE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def assert_near(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Compare values with a reference of any floating dtype; tolerances grow with `scale`, the size of the values."""
    limit = ABSOLUTE[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=limit, atol=limit * scale)
