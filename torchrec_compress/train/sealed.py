"""Files with checksums: `SHA256SUMS` beside them lists their SHA-256 as sha256sum does; they are verified, then parsed.

A file that is not listed counts as not there: its writer was killed, or is older than checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

SUMS = "SHA256SUMS"
_BLOCK = 1 << 20
_SETTLED = 2_000_000_000  # nanoseconds; clocks of file systems are coarse
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\x00-\x1f]+)\n")
_AGAIN = "delete it, the same command makes it again"
# files that this process has read whole, by path: their checksum at the time of a size and a change
_digests: dict[Path, tuple[tuple[int, ...], str]] = {}


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once, and list its checksum.

    Raises:
        OSError: it could not be written.
    """
    part = _part(path)
    part.write_text(text)
    _publish(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
        OSError: it could not be written.
    """
    write_text(path, to_json(path, value, indent=1) + "\n")


def to_json(path: Path, value: Any, indent: int | None = None) -> str:
    """Return plain data as JSON, which has no NaN.

    Raises:
        ValueError: a number that is not finite; the message names the file.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: must hold finite numbers, got {value!r}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, whole or not at all.

    Raises:
        OSError: they could not be written.
    """
    part = _part(path)
    try:
        torch.save({name: value.detach() for name, value in tensors.items()}, part)
        _publish(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); free some space, the same command continues") from error


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder appear with all of its files, unless another process was quicker.

    Args:
        folder: that is to appear.
        write: fills the folder that it is given.

    Raises:
        OSError: it could not be written.
    """
    part = _part(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.is_dir():
            raise


def is_done(path: Path) -> bool:
    """Return whether a file is there with its checksum; says so where only the checksum is missing."""
    if not path.is_file():
        return False
    if path.name in (listed(path.parent) or {}):
        return True
    tqdm.write(f"{path}: has no checksum (its writer was cut off, or is older than checksums); it is made again")
    return False


def read_text(path: Path, remedy: str = _AGAIN) -> str:
    """Return a file's verified text.

    Args:
        path: of the file.
        remedy: what the user can do where it is damaged.

    Raises:
        ValueError: it is missing, has no checksum, or another one; the message names it.
    """
    with open_verified(path, remedy) as file:
        return file.read().decode()


def read_json(path: Path, remedy: str = _AGAIN, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return a file's verified plain data by key.

    Args:
        path: of the file.
        remedy: what the user can do where it is damaged.
        keys: that must be there.

    Raises:
        ValueError: as `read_text`, or the content is not that: a checksum tells what was written, not by whom.
    """
    text = read_text(path, remedy)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, got an error: {error}; {remedy}") from error
    if not isinstance(found, dict) or not set(keys) <= set(found):
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: must be a mapping with the keys {sorted(keys)}, got {got}; {remedy}")
    return found


def load_tensors(path: Path, remedy: str = _AGAIN) -> dict[str, Tensor]:
    """Return a file's verified tensors by name; arguments as for `read_text`.

    Raises:
        ValueError: as `read_text`, or the content is anything but tensors by name; none of it ran.
    """
    with open_verified(path, remedy) as file:
        found = load_plain(file, f"{path}", remedy)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: must hold tensors by name, got {type(found).__name__}; {remedy}")
    return found


def load_plain(file: BinaryIO, where: str, remedy: str = _AGAIN) -> Any:
    """Return tensors and plain data that torch saved; a pickle of anything else is refused, and none of it runs.

    Args:
        file: opened.
        where: names it in errors.
        remedy: what the user can do where it is something else.

    Raises:
        ValueError: it is something else.
    """
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # noqa: BLE001 (bytes that are no tensors raise whatever they like)
        problem = f"must hold tensors, got {type(error).__name__}, nothing in it ran"
        raise ValueError(f"{where}: {problem}; {remedy}") from None  # torch's own text advises to load it unsafely


def open_verified(path: Path, remedy: str = _AGAIN) -> BinaryIO:
    """Open a file whose content is verified; what is read from it is what was verified, whatever happens to the path.

    Arguments and errors as for `read_text`.
    """
    wanted = (listed(path.parent) or {}).get(path.name)
    if wanted is None:
        raise ValueError(f"{path}: must be listed in {SUMS} beside it, got none (its writer was cut off?); {remedy}")
    problem = check_regular(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}; {remedy}")
    file = path.open("rb")
    if _hash(file) != wanted:
        file.close()
        raise ValueError(f"{path}: is truncated or changed (its checksum differs from {SUMS}); {remedy}")
    file.seek(0)
    return file


def listed(folder: Path) -> dict[str, str] | None:
    """Return the checksums by name that a folder lists, or None where it has no list.

    Raises:
        ValueError: the list is damaged; the message names it.
    """
    path = folder / SUMS
    if not path.exists():
        return None
    problem = check_regular(path)
    text = path.read_bytes().decode(errors="replace") if problem is None else ""
    found = {match[2]: match[1] for match in _LINE.finditer(text)}
    is_whole = "".join(f"{digest}  {name}\n" for name, digest in found.items()) == text
    if problem is not None or not is_whole or {".", ".."} & set(found):
        raise ValueError(
            f"{path}: must be lines of a SHA-256 and a name, as sha256sum writes, {problem or 'got others'}; delete "
            "it, and what it listed is made again"
        )
    return found


def digest(path: Path) -> str:
    """Return a file's SHA-256; a file that has not changed since is not read again by this process."""
    found = path.stat()
    key = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    known = _digests.get(path)
    if known is not None and known[0] == key:
        return known[1]
    with path.open("rb") as file:
        result = _hash(file)
    if time.time_ns() - found.st_mtime_ns > _SETTLED:  # a younger file may change again and keep its time
        _digests[path] = key, result
    return result


def check_regular(path: Path) -> str | None:
    """Return why a file must not be read: it is missing, or a link that may lead out of its folder; else None."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return f"is missing ({error.strerror})"
    return None if stat.S_ISREG(mode) else "must be a regular file, got a link or something else"


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """List checksums by name, instead of what was listed."""
    part = _part(folder / SUMS)
    part.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    sync(part)
    part.replace(folder / SUMS)


def _publish(part: Path, path: Path) -> None:
    """Give a durable file its name. Killed in between it is not listed, so that it counts as not there."""
    sync(part)
    sums, new = listed(path.parent) or {}, digest(part)
    if sums.get(path.name) == new and path.is_file() and digest(path) == new:
        part.unlink()
        return
    if sums.pop(path.name, new) != new:
        write_sums(path.parent, sums)
    part.replace(path)
    write_sums(path.parent, {**sums, path.name: new})


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def sync(path: Path) -> None:
    """Make a file's or a folder's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(file: BinaryIO) -> str:
    found = hashlib.sha256()
    for block in iter(lambda: file.read(_BLOCK), b""):
        found.update(block)
    return found.hexdigest()
