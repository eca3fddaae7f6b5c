"""Write a checkpoint of each kind, block by block, from tensors that are mapped."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.train.engine.checkpoint_reader import reason

CHUNK_BYTES = 32 << 20  # of a tensor, as a folder keeps it: what a rank must read for a row of it


def nested(places: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any], source: Checkpoint) -> dict[Any, Any]:
    """Return values in mappings of mappings, as they were in the checkpoint.

    Args:
        places: the keys that lead to each value, by name.
        values: by name.
        source: whose state dicts say the versions of their modules.
    """
    found: dict[Any, Any] = _mapping((), source)
    for name, value in values.items():
        at: Any = found
        place = places[name]
        for depth, key in enumerate(place[:-1], start=1):
            at = at.setdefault(key, _mapping(place[:depth], source))
        at[place[-1]] = value
    return _with_lists(found) if source.kind == "dcp" else found


def _with_lists(value: Any) -> Any:
    """Return mappings as they are, but those by numbers as lists: a folder calls no item of a mapping by a number."""
    if not isinstance(value, dict):
        return value
    for key in value:
        value[key] = _with_lists(value[key])
    is_list = bool(value) and all(type(key) is int for key in value) and sorted(value) == list(range(len(value)))
    return [value[number] for number in range(len(value))] if is_list else value


def _mapping(place: tuple[Any, ...], source: Checkpoint) -> Any:
    if place not in source.extra:
        return {}
    found = copy.copy(source.extra[place])  # with what it says beside its items
    found.clear()
    return found


def write_torch(path: Path, value: Mapping[Any, Any]) -> None:
    """Write one file as torch.save does.

    Raises:
        OSError, RuntimeError: it could not be written.
    """
    torch.save(value, path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors alone.

    Raises:
        OSError: it could not be written.
    """
    from safetensors.torch import save_file

    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def check_safetensors(path: Path, plain: Mapping[str, Any]) -> None:
    """Raise ValueError where a file of tensors alone cannot hold it all, ImportError where nothing writes it."""
    if plain:
        raise ValueError(
            f"{path}: a safetensors file must hold tensors alone, got {sorted(plain)[:3]}; name a folder or a .pt file"
        )
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{path}: must be written by safetensors, which is not installed; pip install torchrec-compress[convert]"
        ) from None


class _Writer(dcp.FileSystemWriter):
    """A writer whose bytes are the same each time."""

    def storage_meta(self) -> StorageMeta:
        """Return what names neither the folder nor the moment."""
        return StorageMeta(checkpoint_id=None, save_id=None)


class _Planner(dcp.DefaultSavePlanner):
    """The usual planner, but that large tensors are cut into chunks of rows, as sharded ones are."""

    def create_local_plan(self) -> SavePlan:
        """Return what is written."""
        plan = super().create_local_plan()
        items = [part for item in plan.items for part in _cut(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the whole tensor."""
        return self.state_dict[index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Tensor | io.BytesIO:
        """Return the rows of a chunk."""
        found = super().transform_object(write_item, object)
        about = write_item.tensor_data
        if not isinstance(found, Tensor) or about is None or write_item.type != WriteItemType.SHARD:
            return found
        return found.detach()[about.chunk.offsets[0] : about.chunk.offsets[0] + about.chunk.sizes[0]]


def _cut(item: WriteItem) -> list[WriteItem]:
    about = item.tensor_data
    if item.type != WriteItemType.TENSOR or about is None or not about.size or about.properties.dtype is None:
        return [item]
    numbers = about.size.numel()
    if numbers * about.properties.dtype.itemsize <= CHUNK_BYTES or about.size[0] < 2:
        return [item]
    rows = max(1, CHUNK_BYTES // (numbers // about.size[0] * about.properties.dtype.itemsize))
    found = []
    for first in range(0, about.size[0], rows):
        rest = [0] * (len(about.size) - 1)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size([first, *rest]),
            sizes=torch.Size([min(rows, about.size[0] - first), *about.size[1:]]),
        )
        index = MetadataIndex(item.index.fqn, chunk.offsets)
        data = dataclasses.replace(about, chunk=chunk)
        found.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
    return found


def write_folder(path: Path, value: Mapping[Any, Any]) -> None:
    """Write a folder as torch.distributed.checkpoint does, by this process alone.

    Raises:
        OSError: it could not be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant here
            dcp.save(dict(value), storage_writer=_Writer(path), planner=_Planner(), no_dist=True)
    except CheckpointException as error:
        raise OSError(reason(error)) from error
