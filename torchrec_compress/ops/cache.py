"""The folder of compiled code. What lies there runs in the user's processes, so nobody else may write it.

Folders are made for their owner alone. One that is another user's, that others may write to, or that is a symbolic
link is refused, and so is a file; a checksum tells a damaged file from a whole one. Folders above the cache, such as
the user's home, are trusted.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CannotBuild(Exception):
    """Why there is no C++ library: no compiler, one that failed, or no folder to keep it in.

    Args:
        reason: why.
        remedy: what to do, the start of a sentence.
    """

    def __init__(self, reason: str, remedy: str = "Set TORCHREC_COMPRESS_CACHE to a folder of your own") -> None:
        super().__init__(reason)
        self.remedy = remedy


def cache_folder() -> Path:
    """Return where compiled code is kept: $TORCHREC_COMPRESS_CACHE, or torchrec_compress in the user's cache folder.

    Raises:
        CannotBuild: the user has no home folder, as in some containers.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    own, base = os.environ.get("TORCHREC_COMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own or base:
        return Path(own or Path(str(base), "torchrec_compress")).absolute()
    try:
        return Path.home() / ".cache" / "torchrec_compress"
    except RuntimeError as error:
        raise CannotBuild(f"there is no cache folder: {error}; set TORCHREC_COMPRESS_CACHE") from error


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone; check one that is there.

    Raises:
        CannotBuild: the folder is a symbolic link, another user's, or others may write to it.
        OSError: it cannot be made.

    Example:
        >>> make_private(Path("/"))  # doctest: +SKIP
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not os.path.lexists(path)]):
        missing.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise CannotBuild(
            f"the cache folder {folder} must not be a symbolic link, got one; set TORCHREC_COMPRESS_CACHE to where it "
            "leads"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise CannotBuild(f"the cache folder {folder} cannot be used: it is no folder")
    if found.st_uid != os.geteuid():
        raise CannotBuild(
            f"the cache folder {folder} must be of user {os.geteuid()}, whose processes run what lies there, got one "
            f"of user {found.st_uid}; set TORCHREC_COMPRESS_CACHE to another folder"
        )
    if found.st_mode & _OTHERS_WRITE:
        raise CannotBuild(
            f"the cache folder {folder} must not be writable by others, whose files would run, got mode "
            f"{stat.S_IMODE(found.st_mode):o}; run chmod go-w on it once you trust what lies there, or set "
            "TORCHREC_COMPRESS_CACHE to another folder"
        )


def distrust(path: Path) -> str:
    """Return why a file of the cache must not run, or "".

    Args:
        path: of a file that is there.

    Example:
        >>> distrust(Path("/"))
        'it is no plain file'
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return "it is no plain file"
    if found.st_uid != os.geteuid():
        return f"it is user {found.st_uid}'s"
    if found.st_mode & _OTHERS_WRITE:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""
