"""Folders that a conversion wrote: a manifest with its settings, its inputs and the checksums of what it made.

Until all is made it lies in a folder of its own, where nothing takes it for data. Files are checked block by block as
they are read, since they may be too large to be read twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchrec_compress.train.data.inputs import MANIFEST
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.sealed import is_done, read_json, write_json

FORMAT = 1
_UNFINISHED = ".unfinished"
_BEGUN = "begun.json"
_LOCK = ".lock"
_BLOCK = 1 << 24  # bytes under one checksum
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_REMEDY = "delete its folder and convert again"


@contextmanager
def begin(target: Path, told: dict[str, Any]) -> Iterator[Path | None]:
    """Yield the folder in which the results are made, or None where they are there already; no one else is in there.

    Args:
        target: folder of the results.
        told: "settings" and "sources", plain data.

    Raises:
        ValueError: the folder has what other settings or inputs led to, or what no manifest tells of.
    """
    _refuse_others(target)
    target.mkdir(parents=True, exist_ok=True)
    with (target / _LOCK).open("w") as lock:
        _lock(lock.fileno(), target)
        told = {"format": FORMAT, **told}
        if (target / MANIFEST).exists():
            manifest = read_json(target / MANIFEST, _REMEDY)
            check_same(target / MANIFEST, {key: manifest.get(key) for key in told}, told)
            check_files(target, manifest)
            shutil.rmtree(target / _UNFINISHED, ignore_errors=True)  # killed at the very end
            yield None
            return
        unfinished = target / _UNFINISHED
        begun = {"format": FORMAT, "settings": told["settings"]}  # a source may be mended before it goes on
        if is_done(unfinished / _BEGUN):
            check_same(unfinished / _BEGUN, read_json(unfinished / _BEGUN, _REMEDY), begun)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write_json(unfinished / _BEGUN, begun)
        yield unfinished


def finish(target: Path, told: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Make the results appear; killed in between, they appear when this is called again.

    Args:
        target: folder of the results.
        told: as for `begin`.
        files: what `sums_of` returned, by path in the folder.
    """
    for name in files:
        source = target / _UNFINISHED / name
        if source.exists():
            (target / name).parent.mkdir(exist_ok=True)
            source.replace(target / name)
    manifest = {"format": FORMAT, **told, "files": files}
    check_files(target, manifest)
    write_json(target / MANIFEST, manifest)
    shutil.rmtree(target / _UNFINISHED)


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError where a file that a manifest lists is missing or has another size."""
    for name, sums in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != sums["bytes"]:
            state = "is missing" if size is None else f"must have {sums['bytes']} bytes, got {size}"
            raise ValueError(f"{path}: {state}, as {MANIFEST} lists it; {_REMEDY}")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder of data, or None where the files are not of a conversion.

    Raises:
        ValueError: the conversion is not finished, or its manifest or a file is damaged; the message names it.
    """
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, _REMEDY)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder / MANIFEST}: must be of format {FORMAT}, got {manifest.get('format')}; {_REMEDY}"
            )
        check_files(folder, manifest)
        return manifest
    found = next((path for path in (folder / _UNFINISHED, folder / _LOCK, *_parts(folder)) if path.exists()), None)
    if found is not None:
        raise ValueError(
            f"{found}: is of a conversion that broke off, or whose {MANIFEST} is gone; convert again, or delete it"
        )
    return None


def sums_of(path: Path) -> dict[str, Any]:
    """Return the size and the CRC-32 of every block of a file, which is made durable."""
    found = []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            found.append(zlib.crc32(block))
    return {"bytes": path.stat().st_size, "crc32": found}


class CheckedFile:
    """A file whose blocks are verified when they are first needed, by any thread.

    Args:
        path: of the file.
        sums: as `sums_of` returned them.
    """

    def __init__(self, path: Path, sums: dict[str, Any]) -> None:
        self._path, self._sums = path, sums["crc32"]
        self._left = set(range(len(self._sums)))

    def check(self, first: int, last: int) -> None:
        """Verify what the bytes [first, last) lie in.

        Raises:
            ValueError: it was changed.
        """
        for block in range(first // _BLOCK, -(-last // _BLOCK)):
            if block not in self._left:
                continue
            with self._path.open("rb") as file:
                file.seek(block * _BLOCK)
                found = zlib.crc32(file.read(_BLOCK))
            if found != self._sums[block]:
                raise ValueError(
                    f"{self._path}: is changed or damaged from byte {block * _BLOCK} on (a checksum differs from "
                    f"{MANIFEST}); {_REMEDY}"
                )
            self._left.discard(block)


def _refuse_others(target: Path) -> None:
    """Raise ValueError where a folder has files that no conversion of this version tells of, and leave it as it is."""
    known = (target / MANIFEST).exists() or (target / _UNFINISHED).is_dir()
    found = [] if known else [*target.glob("*.npy"), *target.glob("hashes/*.npy")]
    if found:
        raise ValueError(
            f"{found[0]}: is of a conversion that is not finished or that has no {MANIFEST}; delete {target}, or "
            "choose another folder"
        )


def _parts(folder: Path) -> list[Path]:
    """Return the parts that a conversion of an older version left behind."""
    return [*folder.glob(".*.npy"), *folder.glob("hashes/.*.npy")]


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        tqdm.write(f"{target}: its file system has no locks; see to it that nothing else converts into it meanwhile")
