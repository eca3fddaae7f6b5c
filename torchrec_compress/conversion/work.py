"""The folder beside the result where a conversion stands: large tensors in files that are mapped, and how far it is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_compress.conversion.entries import Entry, Held
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.sealed import (
    SUMS,
    check_regular,
    is_done,
    load_tensors,
    read_json,
    save_tensors,
    sync,
    write_json,
)

_STATE = "conversion.json"
_LOCK = "lock"
_PUBLISHED = "published.json"
_PART = re.compile(r"\..+\.\d+")  # a file that was being written
_LAST = (_PUBLISHED, SUMS, _LOCK)  # what is deleted last, when the result and its report are in place


class Work:
    """A folder that one process works in, and that a killed conversion is continued from.

    Args:
        target: what is to appear; the folder is `target`.part.
        is_folder: whether that is a folder.

    Raises:
        ValueError: something stands there already, is a link, or another process works in it.
        OSError: it cannot be written.
    """

    def __init__(self, target: Path, is_folder: bool) -> None:
        self.target, self.root = target, target.with_name(f"{target.name}.part")
        self._is_folder = is_folder
        if not target.parent.is_dir():
            raise ValueError(f"{target}: must lie in a folder that exists, got none; mkdir {target.parent}")
        room = os.pathconf(target.parent, "PC_NAME_MAX") - len(os.fsencode(f"{target.name}.report.json"))
        if room < 0:
            raise ValueError(f"{target}: the name must be {-room} bytes shorter, as that of the report is longer")
        if os.path.lexists(target) and not os.path.lexists(self.root):
            raise ValueError(_taken(target))
        if self.root.is_symlink() or (self.root.exists() and not self.root.is_dir()):
            raise ValueError(
                f"{self.root}: must be a folder of a killed conversion or nothing, got another thing; move it away"
            )
        if self.root.exists() and not (self.root / _STATE).is_file():
            # nothing of a stranger's is deleted
            others = [
                left.name for left in self.root.iterdir() if left.name not in _LAST and not _PART.fullmatch(left.name)
            ]
            if others:
                raise ValueError(f"{self.root}: must be left by a killed conversion, got {others[:3]}; move it away")
        self.root.mkdir(exist_ok=True)
        self._lock = self._locked()

    @property
    def result(self) -> Path:
        """Where the result is written before it is renamed."""
        return self.root / ("result" if self._is_folder else f"result{self.target.suffix}")

    def _locked(self) -> int:
        path = self.root / _LOCK
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ValueError(
                f"{self.root}: must be used by one process, got another one at work; wait for it"
            ) from None
        return lock

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)

    def start(self, identity: Mapping[str, Any]) -> None:
        """Note what is converted, or raise ValueError where that is another conversion than the one that was killed."""
        path = self.root / _STATE
        is_begun = path.exists() and is_done(path)  # it is written before anything else is
        if is_begun:
            try:
                check_same(path, read_json(path, f"delete {self.root}"), dict(identity))
            except ValueError as error:
                raise ValueError(f"{error}; or delete {self.root} to begin anew") from None
        if os.path.lexists(self.target) and not (is_begun and self.published()):
            raise ValueError(_taken(self.target))
        if not is_begun:
            with self._told():
                write_json(path, dict(identity))

    def published(self) -> bool:
        """Return whether a killed conversion had put its result in place, but not cleaned up."""
        path = self.root / _PUBLISHED
        return path.exists() and is_done(path) and not self.result.exists() and self.target.exists()

    def mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose values lie in a file, those that were written before among them.

        Raises:
            OSError: the disk has no room for it; said here, since a full disk would end a process that writes to it.
        """
        path, size = self.root / name, torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError(f"{path}: must be a regular file, got something else; delete {self.root}")
            os.ftruncate(file, size)
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            raise self.failed(error) from error
        finally:
            os.close(file)
        numbers = torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).reshape(shape)

    def sync(self, name: str) -> None:
        """Make what was written into a mapped file durable."""
        if (self.root / name).exists():
            with self._told():
                sync(self.root / name)

    def copied(self, name: str, entry: Entry) -> Tensor:
        """Return a tensor of a checkpoint as one piece: as it is mapped, or copied into a file by blocks."""
        return entry.tensor if isinstance(entry, Held) else self.placed(name, entry)

    def placed(self, name: str, entry: Entry) -> Tensor:
        """Return a tensor of a checkpoint, copied into a file by blocks."""
        found = self.mapped(name, entry.shape, entry.dtype)
        entry.copy_to(found)
        return found

    def is_done(self, name: str) -> bool:
        """Return whether tensors of a name were saved whole."""
        path = self.root / f"{name}.pt"
        return path.exists() and is_done(path)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return tensors that were saved."""
        return load_tensors(self.root / f"{name}.pt", f"delete {self.root}")

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors, whole or not at all."""
        with self._told():
            save_tensors(self.root / f"{name}.pt", tensors)

    def drop(self, name: str) -> None:
        """Delete tensors that were saved, where they were."""
        (self.root / f"{name}.pt").unlink(missing_ok=True)

    def publish(self, write: Callable[[Path], None], report: Callable[[], Mapping[str, Any]]) -> None:
        """Write the result aside and let it appear as a whole, then clean up.

        Raises:
            OSError: it could not be written.
            ValueError: something has appeared in its place.
        """
        if self.result.exists():
            _remove(self.result)
        try:
            write(self.result)
            _sync_all(self.result)
        except (OSError, RuntimeError) as error:
            _remove(self.result)
            raise self.failed(error) from error
        write_json(self.root / _PUBLISHED, {**report(), "files": files_of(self.result)})
        if os.path.lexists(self.target):
            raise ValueError(f"{self.target}: must not exist, got something that has appeared; move it away, run again")
        self.result.rename(self.target)
        sync(self.target.parent)

    def finish(self) -> tuple[Path, dict[str, Any]]:
        """Put the report beside the result, delete the folder, and return where the report is, and what it says."""
        found = read_json(self.root / _PUBLISHED, f"delete {self.root}")
        path = self.target.with_name(f"{self.target.name}.report.json")
        aside = self.root / "report.json"
        aside.write_bytes((self.root / _PUBLISHED).read_bytes())
        aside.replace(path)
        for left in self.root.iterdir():
            if left.name not in (_STATE, *_LAST):
                _remove(left)
        (self.root / _STATE).unlink()
        clear_away(self.target)
        return path, found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Have errors of writing say what to do."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> OSError:
        """Return the error of a write that failed, with what to do."""
        code = error.errno if isinstance(error, OSError) else None
        advice = "free some space" if code in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see to it"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return OSError(f"{self.target}: could not be written ({said}); {advice}, the same command continues")


def files_of(result: Path) -> dict[str, list[int]]:
    """Return size in bytes and time of the last change, in ns, of each file of a result, by its name in it."""
    files = sorted(result.iterdir()) if result.is_dir() else [result]
    found = [(path.name if result.is_dir() else "", path.stat()) for path in files]
    return {name: [about.st_size, about.st_mtime_ns] for name, about in found}


def _taken(target: Path) -> str:
    return f"{target}: must not exist, got something there; delete it, or name another one"


def clear_away(target: Path) -> bool:
    """Delete what is left of a folder whose result and report are in place; return whether nothing is there now."""
    root = target.with_name(f"{target.name}.part")
    if root.is_dir() and not root.is_symlink() and {left.name for left in root.iterdir()} <= set(_LAST):
        shutil.rmtree(root)
    return not os.path.lexists(root)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    for each in [*path.iterdir(), path] if path.is_dir() else [path]:
        if each.is_dir() or check_regular(each) is None:
            sync(each)
