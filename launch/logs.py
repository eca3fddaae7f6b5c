"""Read the logs of a job while they are written: the lines of rank 0, and the error that ended it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_RANK = re.compile(r"\[(\d+)\]:(.*)")
_REPORT_LINES = 40


class Tail:
    """New whole lines of files that grow, may not exist yet, and start over when a job is started again.

    Args:
        folder: of the logs.
        pattern: of the files in it.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder = folder
        self.pattern = pattern
        self._read: dict[Path, int] = {}

    def files(self) -> list[Path]:
        """Return the files that are there now, by name."""
        return sorted(self.folder.glob(self.pattern))

    def lines(self) -> list[str]:
        """Return the lines that were added since the last call, file by file."""
        found: list[str] = []
        for path in self.files():
            start = self._read.get(path, 0)
            if path.stat().st_size < start:
                start = 0
            with path.open("rb") as file:
                file.seek(start)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read[path] = start + len(whole) + len(newline)
            # a progress bar rewrites its line: what counts is how it stood last
            found += [line.rpartition("\r")[2] or line for line in whole.decode(errors="replace").split("\n") if line]
        return found


def of_rank_0(lines: Iterable[str]) -> list[str]:
    """Return what rank 0 wrote, without the mark of its rank.

    Example:
        >>> of_rank_0(["[0]:epoch 1", "[1]:warning", "torchrun speaks"])
        ['epoch 1']
    """
    marked = [_RANK.fullmatch(line) for line in lines]
    return [found[2] for found in marked if found and found[1] == "0"]


def error_report(paths: Iterable[Path]) -> list[str]:
    """Return the lines that tell why a job failed.

    They are the first traceback of a rank, or else what ranks call errors, or else the end of the last log.

    Args:
        paths: the job's logs.
    """
    found = sorted(paths, key=lambda path: path.stat().st_mtime)
    texts = [path.read_text(errors="replace").splitlines() for path in found]
    for lines in texts:
        for start, line in enumerate(lines):
            mark = _RANK.match(line)
            if mark and "Traceback (most recent call last)" in line:
                return [one for one in lines[start:] if one.startswith(f"[{mark[1]}]:")][:_REPORT_LINES]
    errors = [line for lines in texts for line in lines if _RANK.match(line) and re.search("[Ee]rror", line)]
    ends = [lines[-_REPORT_LINES:] for lines in texts if lines]
    return errors[:_REPORT_LINES] or (ends[-1] if ends else [])
