"""Read a checkpoint of torch.distributed.checkpoint, which someone else may have written.

No byte of it is parsed before its checksum is verified, and none is ever executed.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import is_dataclass
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from torchrec_compress.train.ranks import Ranks, gather
from torchrec_compress.train.sealed import SUMS, check_regular, digest, listed

FORMAT = 3
META = "meta.json"
_LISTED_IN_META = 2  # the format whose checksums were in meta.json, which had none itself

# all that the pickle of a checkpoint's metadata may name
_CLASSES: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in (filesystem._StorageInfo, torch.Size)},
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # Python 3.13
}

_FILLED = tuple(kind for kind in _CLASSES.values() if is_dataclass(kind))


class _Unpickler(pickle._Unpickler):
    """An unpickler of metadata, which makes and fills instances of its classes and calls nothing else."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 writes members of an Enum
            return _member
        raise pickle.UnpicklingError(f"must not name {module}.{name}")

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _FILLED):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("must fill instances of metadata only, no class")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _member(kind: Any, name: str) -> Any:
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"must not read an attribute of {kind}")
    return kind[name]


class _Reader(dcp.FileSystemReader):
    """A reader of files that are in the folder itself and verified."""

    def __init__(self, path: Path, verified: set[str]) -> None:
        super().__init__(path)
        self._found = read_metadata(path / ".metadata", verified)

    def read_metadata(self) -> metadata.Metadata:  # type: ignore[override]
        """Return the metadata; that of single ranks, which other versions of torch ask for, is not written here."""
        if self._found.storage_meta is None:
            self._found.storage_meta = metadata.StorageMeta()
        self._found.storage_meta.load_id = self.load_id
        return self._found


def read_metadata(path: Path, verified: set[str], what: str = f"files that {SUMS} lists") -> metadata.Metadata:
    """Return a checkpoint's metadata; nothing that it names is called.

    Args:
        path: of the file.
        verified: names of the files that it may name.
        what: says which these are, for errors.

    Raises:
        ValueError: it names other classes or other files than it may.
    """
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f"must be a checkpoint's metadata, got {type(found).__name__}")
        files = {info.relative_path for info in found.storage_data.values()}
    except Exception as error:  # bytes that are no pickle raise whatever they like
        raise ValueError(f"{path}: is refused, nothing in it ran ({type(error).__name__}: {error})") from error
    if not files <= verified:
        raise ValueError(f"{path}: must name {what}, got {sorted(map(str, files - verified))[:3]}")
    return found


class _Planner(dcp.DefaultLoadPlanner):
    """The usual planner, but that plain data is read as such: torch's own unpickles it whatever it is."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _pickled(plain))


def _pickled(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def read(path: Path, state: dict[str, Any], ranks: Ranks | None = None) -> None:
    """Fill a state in place from a checkpoint's folder, verified: all ranks together, or this process alone.

    Args:
        path: of the checkpoint.
        state: tensors, sharded or not, and plain data by name; names are those that were saved, or fewer.
        ranks: None is this process alone, whatever the others do.

    Raises:
        ValueError: a file is missing, truncated or changed, or names what it must not; a tensor is missing or has
            another shape.
    """
    is_alone = ranks is None or ranks.world == 1
    group = None if ranks is None else ranks.waiting
    problem = damage(path, ranks)
    if problem is not None:
        raise ValueError(f"{path}: {problem}; delete {path.parent} to train that stage anew")
    reader = _Reader(path, set(_expected(path)))
    try:
        dcp.load(state, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=is_alone)
    except CheckpointException as error:
        raise ValueError(f"{path}: must fit the model and its optimizers, got {reason(error)}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """Return the verified plain data of a checkpoint's folder.

    Raises:
        ValueError, KeyError: it is damaged, or of another format.
        OSError: there is none.
    """
    sums, text = listed(path), (path / META).read_text()
    if sums is not None and digest(path / META) != sums.get(META):
        raise ValueError(f"{META} is truncated or changed (its checksum differs)")
    meta = json.loads(text)
    wanted = _LISTED_IN_META if sums is None else FORMAT
    if meta.get("format") != wanted:
        raise ValueError(f"must be of format {wanted}, got {meta.get('format')}")
    if path.name != f"step{meta['step']:09d}":
        raise ValueError(f"must be that of step {meta['step']} by its name")
    return meta


def damage(path: Path, ranks: Ranks | None = None) -> str | None:
    """Return what is wrong with a checkpoint's files, or None; ranks read a share each and return the same."""
    share = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    try:
        found = _damage(path, *share)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"damaged ({error})"
    all_found = [found] if ranks is None else gather(found, ranks)
    return next((text for text in all_found if text is not None), None)


def _damage(path: Path, rank: int, world: int) -> str | None:
    if path.is_symlink():
        return "must be a folder, got a link"
    sums = _expected(path)
    used = {".metadata", *(file.name for file in path.iterdir() if file.suffix in (".distcp", ".pt"))}
    if not used <= set(sums):
        return f"{min(used - set(sums))} has no checksum"
    for number, (name, wanted) in enumerate(sorted(sums.items())):
        if number % world != rank:
            continue
        problem = check_regular(path / name)
        if problem is not None:
            return f"{name} {problem}"
        if digest(path / name) != wanted:
            return f"{name} is truncated or changed (its checksum differs)"
    return None


def _expected(path: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files by name."""
    meta, sums = read_meta(path), listed(path)
    found = meta["files"] if sums is None else sums
    if any("/" in name or name in (".", "..") for name in found):
        raise ValueError("names files of other folders")
    return found


def reason(error: BaseException) -> str:
    """Return the innermost cause in one line; torch wraps each rank's error in a long report."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
