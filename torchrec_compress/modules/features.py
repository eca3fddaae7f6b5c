"""Batches of jagged features: checked, and split by feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.ops import can_check, check_ids, check_weights

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("check_ids")

HALF = (torch.float16, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class LookedUpTable:
    """A table of ours that features look up.

    Args:
        name: of the user's table.
        num_embeddings: its rows, the range of the ids.
        features: that look it up.
        keys: of their outputs.
    """

    name: str
    num_embeddings: int
    features: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def where(self) -> str:
        """The table, as errors name it."""
        return f"table {self.name!r}"

    def ids(self, jagged: Mapping[str, JaggedTensor]) -> list[Tensor]:
        """Return the ids of every feature of a batch.

        Raises:
            ValueError: an id is out of range.
        """
        return [
            check_ids(jagged[name].values(), self.num_embeddings, f"{self.where}, feature {name!r}")
            for name in self.features
        ]


@dataclass(frozen=True)
class IdRange:
    """The ids of a feature that a table holds: [0, num_embeddings)."""

    table: str
    feature: str
    num_embeddings: int


def check_ranges(jagged: dict[str, JaggedTensor], ranges: Sequence[IdRange]) -> None:
    """Raise ValueError when an id is out of range."""
    for wanted in ranges:
        where = f"table {wanted.table!r}, feature {wanted.feature!r}"
        check_ids(jagged[wanted.feature].values(), wanted.num_embeddings, where)


def check_here(ids: object, on_meta: bool, where: str) -> None:
    """Raise ValueError unless ids are a tensor with values, where a table has some; `where` names the call."""
    if not isinstance(ids, Tensor) or (ids.is_meta and not on_meta):
        got = "a tensor on the meta device" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{where}: ids must be a tensor of integers, (L,), with values, got {got}")


def check_features(features: KeyedJaggedTensor, wanted: list[str], where: str, on_meta: bool = False) -> None:
    """Raise ValueError for no batch, for one that lacks a feature, or for tensors of it that do not go together.

    A batch without values is for tables without (`on_meta`): of it, TorchRec's own tables return what lay in memory.
    Whether there are as many ids as lengths say is looked at on a CPU alone, as no device is waited for.
    """
    if not isinstance(features, KeyedJaggedTensor):
        raise ValueError(f"{where}: a batch must be a KeyedJaggedTensor, got {type(features).__name__}")
    ids, lengths, weights = features.values(), features.lengths(), features.weights_or_none()
    if lengths.dtype not in _INDICES or lengths.dim() < 1:
        raise ValueError(
            f"{where}: lengths must be a list of int32 or int64, got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if ids.dtype not in _INDICES or ids.dim() != 1:
        raise ValueError(f"{where}: ids must be a list of int32 or int64, got {ids.dtype} of shape {tuple(ids.shape)}")
    if lengths.is_cpu and can_check(lengths) and (count := int(lengths.sum())) != len(ids):
        raise ValueError(f"{where}: lengths must add up to the {len(ids)} ids of the batch, got {count}")
    if weights is not None and weights.shape[:1] != ids.shape[:1]:
        raise ValueError(f"{where}: weights must be one per id, {len(ids)}, got shape {tuple(weights.shape)}")
    devices = {str(tensor.device) for tensor in (ids, lengths, weights) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{where}: the batch must be on one device, got {sorted(devices)}")
    if ids.is_meta and not on_meta:
        raise ValueError(f"{where}: the batch must have values, got one on the meta device; move it to the tables'")
    missing = [name for name in wanted if name not in features.keys()]  # noqa: SIM118 (keys() is a list)
    if missing:
        raise ValueError(f"{where}: the batch must have the features {missing}, got only {features.keys()}")


def check_batch_weights(features: KeyedJaggedTensor, where: str) -> None:
    """Raise ValueError when the batch lacks the weights of a weighted collection, or one is not finite.

    Args:
        features: the batch.
        where: names the collection in errors.
    """
    weights = features.weights_or_none()
    if weights is None:
        raise ValueError(
            f"{where}: the batch must carry weights with is_weighted=True, got none; give the batch weights"
        )
    check_weights(weights, where)


def widened(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the batch with float32 weights in place of half-precision ones, which FBGEMM permutes and splits not all.

    What a trace has in place of a batch is returned as it is: TorchRec's pipelines send ahead what a model is given.
    """
    weights = features.weights_or_none() if isinstance(features, KeyedJaggedTensor) else None
    if weights is None or weights.dtype not in HALF:
        return features
    variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=weights.float(),
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        length_per_key=features.length_per_key(),
        offset_per_key=features.offset_per_key(),
        inverse_indices=features.inverse_indices_or_none(),
    )


def split_features(features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
    """Return the bags of every feature; TorchRec's own `to_dict` fails on a batch of no bags."""
    if features.lengths().numel() > 0:
        return features.to_dict()
    nothing = JaggedTensor(
        features.values(),
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=torch.zeros(1, dtype=features.lengths().dtype, device=features.device()),
    )
    return dict.fromkeys(features.keys(), nothing)
