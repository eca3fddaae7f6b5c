"""Code that would make a GPU wait for the host, or the host for a GPU, found on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# values that become Python numbers, and results whose size hangs on values
_WAITS = ("_local_scalar_dense", "nonzero", "_unique", "unique", "masked_select", "is_nonzero", "equal", "_to_copy")


class NoWaits(TorchDispatchMode):
    """Refuses operators that wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        copies = name == "_to_copy" and (kwargs or {}).get("device") is None  # a cast
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if by_mask or (not copies and name.startswith(_WAITS)):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))
