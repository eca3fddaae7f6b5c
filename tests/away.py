"""A device that is not there: tensors on the CPU that say they lie elsewhere, and meet no others, as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# PyTorch knows the name and asks for no driver before an operation reaches it
AWAY = torch.device("xla", 0)
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")  # CUDA takes indices from the CPU
_MOVES = ("aten::_to_copy", "aten::copy_")


class Away(Tensor):
    """A tensor elsewhere, whose values lie in `inner` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        options: dict[str, Any] = {"dtype": inner.dtype, "strides": inner.stride(), "device": "meta"}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **options)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: AWAY)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_away(device: Any) -> bool:
    return torch.device(device).type in (AWAY.type, "meta")  # meta is what backward knows of an `Away`


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, unless a GPU would refuse it."""
    name, tensors = func._schema.name, [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    away = [each for each in tensors if isinstance(each, Away)]
    here = [each for each in tensors if not isinstance(each, Away) and each.dim() > 0]
    is_indexed = name in _INDEXED and isinstance(args[0], Away)
    if away and here and name not in _MOVES and not is_indexed:
        told = [(tuple(each.shape), each.device.type) for each in tensors]
        raise RuntimeError(f"{name}: all tensors must be on one device, got {told}")
    makes_away = bool(away)
    if kwargs.get("device") is not None:
        makes_away, kwargs = _is_away(kwargs["device"]), {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    elif name == "aten::copy_":
        makes_away = isinstance(args[0], Away)
    plain = tree_map(lambda each: each.inner if isinstance(each, Away) else each, (args, kwargs))
    found = func(*plain[0], **{key: value for key, value in plain[1].items() if key != "pin_memory"})
    same = {id(each.inner): each for each in away}  # of operations in place

    def back(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return same.get(id(each), Away(each) if makes_away else each)

    return tree_map(back, found)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """`torch.tensor`, which allocates before any operation is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or not _is_away(given.get("device") or "cpu"):
            return func(*args, **given)
        found = func(*args, **{key: value for key, value in given.items() if key != "device"})
        return found if isinstance(found, Away) else Away(found)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within, `Away` tensors are computed with, and meet no tensors of the CPU but single numbers and indices."""
    with _Operations(), _Values():
        yield
