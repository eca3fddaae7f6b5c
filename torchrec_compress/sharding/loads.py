"""Loads that failed on one rank, which the others hear of with the next batch.

`load_state_dict` is no collective, as TorchRec's is none: one rank may load while others do something else, and so it
must not wait for them. The rank whose shard is bad raises at once, and alone; what it holds then is of no use beside
what the others have loaded, so all ranks raise with the next batch, when they agree on its ids anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class NotesLoads(nn.Module):
    """A sharded part that remembers that its last load failed on this rank, until one succeeds.

    Attributes:
        load_fault: what that load, or that of the collection around it, raised, or None.
    """

    load_fault: str | None = None

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as torch does, and remember what it raises."""
        try:
            found = super().load_state_dict(state_dict, *args, **kwargs)
        except (ValueError, RuntimeError, KeyError) as error:
            self.load_fault = str(error)
            raise
        self.load_fault = None
        return found

    def check_loaded(self) -> None:
        """Raise ValueError where the last load failed on this rank; every check of a batch begins with it."""
        if self.load_fault is not None:
            raise ValueError(failed(self.load_fault))


def failed(fault: str) -> str:
    """Return what is said of a load that failed before this batch.

    Example:
        >>> failed("codes: must be integers, got torch.float32")
        'codes: must be integers, got torch.float32 (load_state_dict raised it before this batch; load on all ranks)'
    """
    return f"{fault} (load_state_dict raised it before this batch; load on all ranks)"
