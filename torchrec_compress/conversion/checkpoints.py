"""Open a checkpoint of someone else's: nothing in it is executed, no link is followed, and no table is read yet."""

from __future__ import annotations

import io
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from torchrec_compress.conversion.entries import Chunk, Chunked, Entry, Held
from torchrec_compress.conversion.zipped import find_tensor
from torchrec_compress.train.engine.checkpoint_reader import read_metadata
from torchrec_compress.train.sealed import SUMS, check_regular, digest, listed, load_plain

Path_: TypeAlias = tuple[Any, ...]
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_MOST_LEVELS = 64
_AGAIN = "save it again as a state dict of tensors and plain data"


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: of it.
        kind: "dcp", "torch" or "safetensors".
        tensors: by name, in the order of the checkpoint; nested names are joined by ".".
        plain: all that is no tensor, by name.
        places: of every name, the keys that lead to it.
        extra: mappings that say more than their items, as state dicts say versions, by the keys that lead to them.
        identity: plain data that is another once the checkpoint is.
    """

    path: Path
    kind: str
    tensors: dict[str, Entry] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Path_] = field(default_factory=dict)
    extra: dict[Path_, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def kind_of_path(path: Path, is_folder: bool) -> str:
    """Return the kind of checkpoint that a path is of by its form.

    Raises:
        ValueError: the ending of the name is of none.

    Example:
        >>> kind_of_path(Path("a.pt"), False), kind_of_path(Path("step1"), True)
        ('torch', 'dcp')
    """
    if is_folder:
        return "dcp"
    if path.suffix in _TORCH:
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise ValueError(
        f"{path}: must be a folder (torch.distributed.checkpoint), or end in .pt, .pth or .safetensors, got "
        f"{path.suffix or 'no ending'!r}"
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Return what a checkpoint holds.

    Args:
        path: of a folder, or of a file.

    Raises:
        ValueError: it is missing, a link, cut short, or holds anything but tensors and plain data; chunks of a tensor
            are missing.
        ImportError: what reads it is not installed.
    """
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: must be a checkpoint, got nothing there ({error.strerror})") from None
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path}: must be a file or a folder, got a link; name what it leads to")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: must be readable, got no permission; chmod or chown it")
    kind = kind_of_path(path, stat.S_ISDIR(mode))
    if kind == "dcp":
        return _open_folder(path)
    problem = check_regular(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    found = _open_torch(path) if kind == "torch" else _open_safetensors(path)
    found.identity = {path.name: _identity_of(path)}
    return found


def _identity_of(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _open_torch(path: Path) -> Checkpoint:
    found = Checkpoint(path, "torch")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 (bytes of a stranger raise whatever they like)
        _check_mapped(path, error)
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path}: must be a zip archive of torch.save that holds tensors and plain data alone, got "
            f"{type(error).__name__}: {first[:200]}; nothing in it ran; {_AGAIN}"
        ) from None  # torch's own text advises to load it unsafely
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: must hold a mapping, got {type(value).__name__}; {_AGAIN}")
    for place, leaf in _leaves(value, (), path, found.extra):
        name = ".".join(map(str, place))
        if name in found.places:
            raise ValueError(f"{path}: names must differ once joined by '.', got {name!r} twice")
        found.places[name] = place
        if isinstance(leaf, Tensor):
            found.tensors[name] = Held(_checked(leaf, name, path))
        else:
            found.plain[name] = leaf
    return found


def _check_mapped(path: Path, error: Exception) -> None:
    """Raise OSError where a file could not be opened because it is larger than the machine's memory and swap."""
    if "unable to mmap" in str(error) and "Cannot allocate memory" in str(error):
        raise OSError(
            f"{path}: its {path.stat().st_size} bytes could not be mapped: Linux maps a file of this kind only up to "
            "the size of memory and swap, unless vm.overcommit_memory is 1; set it, or save a folder of "
            "torch.distributed.checkpoint, whose files are mapped to be read alone"
        ) from None


def _leaves(value: Any, place: Path_, path: Path, extra: dict[Path_, Any]) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, Mapping) and (value or not place):
        if len(place) > _MOST_LEVELS:
            raise ValueError(f"{path}: must be nested in at most {_MOST_LEVELS} levels, got more")
        if isinstance(value, OrderedDict):
            extra[place] = value
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key), path, extra)
    else:
        yield place, value


def _checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return a tensor whose values each lie in the file."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        kinds = ("is_meta", "is_quantized", "is_nested")
        got = [kind for kind in kinds if getattr(tensor, kind)] or tensor.layout
        raise ValueError(f"{path}: {name!r} must be a dense tensor, got {got}; {_AGAIN}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name!r} must hold each of its values, got {tuple(tensor.shape)} of "
            f"{tensor.untyped_storage().nbytes()} bytes; call contiguous() before it is saved"
        )
    return tensor


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError(
            f"{path}: must be read by safetensors, which is not installed; pip install torchrec-compress[convert]"
        ) from None
    found = Checkpoint(path, "safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                found.tensors[name], found.places[name] = Held(file.get_tensor(name)), (name,)
    except Exception as error:  # noqa: BLE001
        _check_mapped(path, error)
        raise ValueError(f"{path}: must be a safetensors file, got {type(error).__name__}: {error}") from None
    return found


def _open_folder(path: Path) -> Checkpoint:
    names = {file.name for file in path.iterdir() if check_regular(file) is None}
    if ".metadata" not in names:
        raise ValueError(f"{path}: must be a folder of torch.distributed.checkpoint, got no .metadata file in it")
    _verify(path, names)
    about = read_metadata(path / ".metadata", names, "regular files of its folder")
    found = Checkpoint(path, "dcp")
    planned = about.planner_data if isinstance(about.planner_data, dict) else {}
    for name, what in about.state_dict_metadata.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: names must be text, got {type(name).__name__}")
        place = planned.get(name, (name,))
        found.places[name] = tuple(place) if isinstance(place, (list, tuple)) else (name,)
        try:
            if isinstance(what, TensorStorageMetadata):
                found.tensors[name] = _chunked(path, name, what, about)
            elif isinstance(what, BytesStorageMetadata):
                found.plain[name] = _plain(path, name, about)
            else:
                raise ValueError(f"must be a tensor or plain data, got {type(what).__name__}")
        except (AttributeError, TypeError, OSError) as error:
            raise ValueError(f"{path}: {name!r}: damaged ({type(error).__name__}: {error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from None
    files = sorted({info.relative_path for info in about.storage_data.values()})
    found.identity = {name: _identity_of(path / name) for name in [".metadata", *files]}
    return found


def _verify(path: Path, names: set[str]) -> None:
    """Raise ValueError where the folder lists checksums, as ours do, and a file that is read has another."""
    sums = listed(path)
    if sums is None:
        return
    for name in sorted(name for name in names if name == ".metadata" or name.endswith((".distcp", ".pt"))):
        if name not in sums:
            raise ValueError(f"{path / name}: must be listed in {SUMS} beside it, got none; was the writer cut off?")
        if digest(path / name) != sums[name]:
            raise ValueError(f"{path / name}: is truncated or changed (its checksum differs from {SUMS})")


def _info(path: Path, index: MetadataIndex, about: dcp.Metadata) -> tuple[Path, int, int]:
    """Return file, offset and length of what is stored."""
    info: Any = about.storage_data.get(index)
    if info is None:
        raise ValueError(
            f"must be stored, got no place for the chunk at {list(index.offset or [])}; a shard is missing"
        )
    if getattr(info, "transform_descriptors", None):
        raise ValueError(
            f"must be stored as torch saves it, got {info.transform_descriptors}; save it without extensions"
        )
    file, start, length = path / info.relative_path, int(info.offset), int(info.length)
    if start < 0 or length < 0 or start + length > file.stat().st_size:
        raise ValueError(
            f"{info.relative_path} must hold {start + length} bytes, got {file.stat().st_size}: it is cut short"
        )
    return file, start, length


def _plain(path: Path, name: str, about: dcp.Metadata) -> Any:
    file, start, length = _info(path, MetadataIndex(name), about)
    with file.open("rb") as opened:
        opened.seek(start)
        return load_plain(io.BytesIO(opened.read(length)), "its plain data", _AGAIN)


def _chunked(path: Path, name: str, what: TensorStorageMetadata, about: dcp.Metadata) -> Chunked:
    """Return a tensor of which every value is stored once."""
    size, dtype = tuple(map(int, what.size)), what.properties.dtype
    if not isinstance(dtype, torch.dtype) or any(number < 0 for number in size):
        raise ValueError(f"must be a tensor, got {dtype} {size}")
    chunks = [_chunk(path, name, each, dtype, about) for each in what.chunks]
    _check_cover(size, chunks)
    return Chunked(size, dtype, chunks)


def _chunk(path: Path, name: str, what: ChunkStorageMetadata, dtype: torch.dtype, about: dcp.Metadata) -> Chunk:
    offsets, sizes = tuple(map(int, what.offsets)), tuple(map(int, what.sizes))
    file, start, length = _info(path, MetadataIndex(name, what.offsets), about)
    with file.open("rb") as opened:
        found = find_tensor(opened, start, length)
    if found.dtype != dtype or found.shape != sizes:
        raise ValueError(f"the chunk at {list(offsets)} must be {dtype} {sizes}, got {found.dtype} {found.shape}")
    return Chunk(file, found.start, offsets, sizes)


def _check_cover(size: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Raise ValueError unless boxes lie in a tensor and cover it, none over another."""
    volume, covered = 1, 0
    for number in size:
        volume *= number
    held = [chunk for chunk in chunks if all(chunk.sizes)]
    for chunk in held:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
            at >= 0 and at + length <= whole for at, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        if not inside:
            raise ValueError(f"chunks must lie in {size}, got {chunk.sizes} at {chunk.offsets}")
        box = 1
        for number in chunk.sizes:
            box *= number
        covered += box
    held.sort(key=lambda chunk: chunk.top)
    for number, one in enumerate(held):
        for other in held[number + 1 :]:
            if size and other.top >= one.top + one.height:
                break
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            ):
                raise ValueError(f"chunks must not overlap, got {one.offsets} and {other.offsets}")
    if covered != volume:
        raise ValueError(f"must hold {volume} values, got {covered}: a shard is missing; save all ranks' shards")
