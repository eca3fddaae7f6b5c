"""Compiled CUDA programs on disk, so that they are not compiled anew in every process."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torchrec_compress.ops.cache import CannotBuild, cache_folder, distrust, make_private

_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def cached(source: str, options: Sequence[bytes], version: tuple[int, int], build: Callable[[], bytes]) -> bytes:
    """Return a program's machine code from the cache folder, or build it and keep it there.

    Processes that start at once may each build the same program; whole files replace one another, so none of them
    reads half a file. There is no lock: a program takes less than a second, and network file systems do not lock well.
    A file that is damaged, or that others may have written, is built anew. Where the folder cannot or must not be used,
    programs are built without it, and the log says so once.

    Args:
        source: the program's whole text.
        options: of the compiler, the GPU's architecture among them.
        version: of the compiler.
        build: compiles the program.

    Raises:
        Whatever `build` raises; nothing is kept then.

    Example:
        >>> cached("text", [b"--gpu-architecture=sm_90"], (13, 0), lambda: b"code")  # doctest: +SKIP
        b'code'
    """
    try:
        path = cubin_path(source, options, version)
        for folder in (path.parent.parent, path.parent):
            make_private(folder)
        content = path.read_bytes() if os.path.lexists(path) and not distrust(path) else b""
    except CannotBuild as error:
        _warn(str(error))
        return build()
    except OSError as error:
        _warn(f"{path.parent} cannot be read: {error.strerror}")
        return build()
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if code and hashlib.sha256(code).digest() == digest:
        return code
    code = build()
    try:
        _write(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        _warn(f"{path.parent} cannot be written: {error.strerror}")
    return code


def cubin_path(source: str, options: Sequence[bytes], version: tuple[int, int]) -> Path:
    """Return where a program's machine code is kept; the name is a hash of all that decides it.

    Raises:
        CannotBuild: there is no cache folder.

    Example:
        >>> cubin_path("text", [], (13, 0)).suffix
        '.cubin'
    """
    key = hashlib.sha256(repr((source, list(options), version)).encode()).hexdigest()
    return cache_folder() / "cubins" / f"{key[:32]}.cubin"


def _write(path: Path, content: bytes) -> None:
    """Put a file into place by a rename, which other processes see whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def _warn(reason: str) -> None:
    _log.warning("GPU kernels: CUDA programs are compiled in every process, because %s.", reason)
