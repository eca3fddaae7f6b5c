"""Whole tensors, or blocks of their rows, into the shards of this rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrec_compress.modules.format import check_fits
from torchrec_compress.modules.trained_rows import note_rows
from torchrec_compress.seams import local_shards


@torch.no_grad()
def load_plain(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into a sharded module.

    Args:
        module: wrapped or not.
        state: whole tensors by the module's own names.

    Raises:
        ValueError: names or shapes do not fit, or values do not fit into a dtype.
    """
    own = module.state_dict()
    if set(own) != set(state):
        raise ValueError(f"load_plain: names must fit, got {sorted(set(own) ^ set(state))[:4]} on one side only")
    for name, value in own.items():
        copy_whole(name, state[name], value)
    note_rows(module)


@torch.no_grad()
def copy_whole(name: str, source: Tensor, target: object) -> None:
    """Copy what this rank holds of a tensor.

    Args:
        name: of it, for errors.
        source: the whole.
        target: a tensor, or one that is sharded, as a state dict holds it.

    Raises:
        ValueError: shapes do not fit, or values do not fit into the dtype.
    """
    check_fits(name, source, target.dtype)  # type: ignore[attr-defined]  # the whole, so that all ranks raise alike
    for local, offsets in local_shards(target):
        part = source
        for axis, first in enumerate(offsets or []):
            part = part.narrow(axis, int(first), local.shape[axis])
        if part.shape != local.shape:
            raise ValueError(f"load_plain: {name!r} must have shape {tuple(local.shape)}, got {tuple(part.shape)}")
        local.copy_(part)


@torch.no_grad()
def copy_rows(first: int, rows: Tensor, target: object) -> None:
    """Copy what this rank holds of a block of rows.

    Args:
        first: number of the first row.
        rows: (L, width).
        target: a tensor, or one that is sharded, as a state dict holds it.
    """
    for local, offsets in local_shards(target):
        top, left = (0, 0) if offsets is None else (int(offsets[0]), int(offsets[1]))
        start, stop = max(first, top), min(first + len(rows), top + len(local))
        if start < stop:
            block = rows[start - first : stop - first, left : left + local.shape[1]]
            local[start - top : stop - top] = block.to(local.device)
