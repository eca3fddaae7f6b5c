"""What a piece of code makes: the sizes of the tensors that its operators return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Notes the elements of every tensor that an operator returns, forward and backward; views count as well.

    Attributes:
        floats: (elements, operator) of the floating-point tensors.
        integers: the same of all others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.floats: list[tuple[int, str]] = []
        self.integers: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            made = self.floats if tensor.is_floating_point() else self.integers
            made.append((tensor.numel(), str(func)))
        return out


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [tensor for part in out for tensor in _tensors(part)] if isinstance(out, tuple | list) else []
