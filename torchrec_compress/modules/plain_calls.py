"""A call of PyTorch's own embedding modules as a batch of one feature, and what comes out as PyTorch shapes it.

Padding is a weight of zero or a row that is put in its place, never an id that is taken out: no shape depends on the
values of a batch, so that graphs are compiled and exported whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.decoder import bag_means
from torchrec_compress.ops import check_ids, check_offsets


@dataclass(frozen=True)
class Call:
    """How a module reads the tensors of a call.

    Args:
        name: of table and feature.
        where: names the module in errors.
        num_checked: ids must be below it; None where the collection looks at them.
        padding_idx: whose weight is zero, or None.
        mode: of bags.
        has_last: whether offsets end with the number of ids.
        is_weighted: whether the collection takes weights.
    """

    name: str
    where: str
    num_checked: int | None
    padding_idx: int | None = None
    mode: str = "sum"
    has_last: bool = False
    is_weighted: bool = False

    def check_type(self, name: str, numbers: Tensor) -> None:
        """Raise ValueError unless ids or offsets are of a type that kernels read."""
        if not isinstance(numbers, Tensor):
            raise ValueError(f"{self.where}: {name} must be a tensor, got {type(numbers).__name__}")
        if numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{self.where}: {name} must be int32 or int64, got {numbers.dtype}; call {name}.long()")

    def check_range(self, ids: Tensor) -> Tensor:
        """Return ids, (L,), or raise ValueError where one is out of range that nobody else looks at."""
        where = f"table {self.name!r}, feature {self.name!r}"
        return ids if self.num_checked is None else check_ids(ids, self.num_checked, where)


def batch_of_ids(ids: Tensor, call: Call) -> KeyedJaggedTensor:
    """Return ids of any shape as one bag of one feature: to unpooled rows, bags mean nothing.

    Raises:
        ValueError: they are no integers, or one is out of range.
    """
    call.check_type("input", ids)
    flat = call.check_range(ids.reshape(-1))
    return _one_feature(call.name, flat, None, torch.arange(2, device=ids.device) * flat.shape[0])


def batch_of_bags(ids: Tensor, offsets: Tensor | None, weights: Tensor | None, call: Call) -> KeyedJaggedTensor:
    """Return bags as a batch of one feature; where there are none, a batch of one empty bag.

    Args:
        ids: (B, N), or (L,) with offsets.
        offsets: (B,), or (B + 1,) where they include the last; or None.
        weights: of the ids' shape, or None; a padding id's becomes zero.
        call: how the module reads them.

    Raises:
        ValueError: they do not go together, or an id is out of range.
    """
    _check_bags(ids, offsets, weights, call)
    flat = call.check_range(ids.reshape(-1))
    if offsets is None:
        offsets = torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
    else:
        end = torch.full((0 if call.has_last else 1,), flat.shape[0], dtype=offsets.dtype, device=offsets.device)
        offsets = torch.cat([offsets, end])
        check_offsets(offsets, flat.shape[0], call.where)
    if offsets.shape[0] == 1:  # TorchRec's own tables fail on a batch of no bags
        offsets = torch.cat([offsets, offsets])
    if call.is_weighted:
        weights = torch.ones_like(flat, dtype=torch.float32) if weights is None else weights.reshape(-1)
        if call.padding_idx is not None:
            weights = weights.masked_fill(flat == call.padding_idx, 0.0)
    return _one_feature(call.name, flat, weights, offsets)


def finished_bags(
    pooled: Tensor, features: KeyedJaggedTensor, ids: Tensor, offsets: Tensor | None, call: Call
) -> Tensor:
    """Return the bags that were asked for, (B, D): means are divided by how many of their ids are no padding."""
    if call.mode == "mean" and call.is_weighted:
        kept = nn.functional.pad((features.values() != call.padding_idx).cumsum(0), (1, 0))
        pooled = bag_means(pooled, kept.index_select(0, features.offsets()).diff())
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - int(call.has_last)
    return pooled if num_bags else pooled[:0]


def padded_rows(rows: Tensor, ids: Tensor, padding_row: Tensor | None, padding_idx: int | None) -> Tensor:
    """Return rows, (L, D), in the shape of their ids, (*S, D), with the padding row in place of a padding id's."""
    shaped = rows.reshape(*ids.shape, rows.shape[1])
    if padding_row is None:
        return shaped
    return torch.where((ids == padding_idx).unsqueeze(-1), padding_row.to(rows.dtype), shaped)


def _one_feature(name: str, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> KeyedJaggedTensor:
    counts = {"stride": offsets.shape[0] - 1, "length_per_key": [ids.shape[0]], "offset_per_key": [0, ids.shape[0]]}
    # told how many ids there are, TorchRec asks no tensor: no device is waited for, no graph is cut
    return KeyedJaggedTensor([name], ids, weights, lengths=offsets.diff(), offsets=offsets, **counts)


def _check_bags(ids: Tensor, offsets: Tensor | None, weights: Tensor | None, call: Call) -> None:
    """Raise ValueError where `torch.nn.EmbeddingBag` would for the shapes of a batch, or for weights of means."""
    call.check_type("input", ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{call.where}: input must have 1 or 2 dimensions, got shape {list(ids.shape)}")
    if ids.dim() == 2 and offsets is not None:
        raise ValueError(
            f"{call.where}: offsets must be None with input of 2 dimensions, whose rows are the bags, got shape "
            f"{list(offsets.shape)}; leave them out, or flatten the input"
        )
    if ids.dim() == 1 and offsets is None:
        raise ValueError(
            f"{call.where}: offsets must be given with input of 1 dimension, got None; give where each bag begins, or "
            "input of 2 dimensions"
        )
    if offsets is not None:
        call.check_type("offsets", offsets)
        if offsets.dim() != 1:
            raise ValueError(f"{call.where}: offsets must have 1 dimension, got shape {list(offsets.shape)}")
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise ValueError(f"{call.where}: per_sample_weights must be a tensor, got {type(weights).__name__}")
    if call.mode != "sum":
        raise ValueError(
            f"{call.where}: per_sample_weights must be None with mode {call.mode!r}, as in torch.nn.EmbeddingBag, got "
            f"shape {list(weights.shape)}; make the module with mode='sum'"
        )
    if weights.shape != ids.shape:
        raise ValueError(
            f"{call.where}: per_sample_weights must have the shape of input, {list(ids.shape)}, got "
            f"{list(weights.shape)}; give one per id"
        )
