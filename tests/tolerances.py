"""How far results may lie from a float64 reference, one table for all tests; CI uses the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

ABSOLUTE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def assert_near(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Compare values with a reference of any floating dtype; tolerances grow with `scale`, the size of the values."""
    limit = ABSOLUTE[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=limit, atol=limit * scale)


def assert_trains_alike(got: Tensor, expected: Tensor, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Compare values with a reference, and by a random loss the gradients of what each was made of."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    loss = torch.randn_like(got)
    ours = torch.autograd.grad((got * loss).sum(), mine)
    for one, other in zip(ours, torch.autograd.grad((expected * loss).sum(), theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
