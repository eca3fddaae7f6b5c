"""The dtype of embeddings: what the sharders of a collection's parts were told, put together by one rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import nn

from torchrec_compress.seams import as_dtype, output_types

_ALLOWED = (None, torch.float32, torch.float16, torch.bfloat16)


def dtype_asked(where: str, kind: Any) -> torch.dtype | None:
    """Return the dtype of embeddings that is asked for by one of TorchRec's data types, or of FBGEMM's; None stays.

    Raises:
        ValueError: it is none of float32, float16 and bfloat16.
    """
    dtype = as_dtype(kind)
    if dtype not in _ALLOWED:
        raise ValueError(f"{where}: output_dtype must be FP32, FP16 or BF16, got {kind}")
    return dtype


class OutputType(NamedTuple):
    """What the sharder of a part was told.

    Attributes:
        of_tables: for each table, None where nothing is said of it.
        of_all: by fused parameters, of every table of the collection that has nothing of its own.
    """

    of_tables: Sequence[torch.dtype | None] = ()
    of_all: torch.dtype | None = None


def output_dtype(parts: Iterable[Any], dense: nn.Module | None) -> torch.dtype | None:
    """Return the dtype of a collection's embeddings, the widest that was told, or None where nothing was.

    Args:
        parts: of the collection, sharded or not.
        dense: TorchRec's own collection of tables that stay as they are.
    """
    told = [part.output_type for part in parts if hasattr(part, "output_type")]
    of_all = next((each.of_all for each in told if each.of_all is not None), None)
    found = [dtype for each in told for dtype in each.of_tables]
    found += [dtype or of_all for dtype in output_types(dense)] if told else []
    if not any(found):
        return None
    return reduce(torch.promote_types, [torch.float32 if dtype is None else dtype for dtype in found])
