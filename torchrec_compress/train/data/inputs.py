"""Which files a run reads, and how one tells that they are still the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.sealed import digest

MANIFEST = "conversion.json"  # of a folder that `data criteo` wrote
VOCAB_FILE = "vocab.json"  # rows per table of contiguous ids
_PATTERNS = {"parquet": ("**/*.parquet",), "criteo": (MANIFEST, "*.npy", "*.npz", VOCAB_FILE)}


def identify(config: DataConfig) -> dict[str, Any]:
    """Return what tells the content of the data files, by name.

    That is size and SHA-256 of every file; with `data.streaming`, for files that are too large to be read twice, size
    and time of change. A folder that `data criteo` wrote is told by its manifest, which has the checksums of the rest.

    Args:
        config: kind, path and streaming.
    """
    path = Path(str(config.path))
    if config.kind == "generator":
        return {}
    if path.is_file():  # a TSV is converted once, by the size and time of it
        return {path.name: _identify(path, by_time=config.streaming or config.kind == "criteo")}
    found = sorted({file for pattern in _PATTERNS[config.kind] for file in path.glob(pattern)})
    files = [file for file in found if file.is_file() and is_data(file)]
    if path / MANIFEST in files:
        return {MANIFEST: _identify(path / MANIFEST, by_time=False)}
    return {str(file.relative_to(path)): _identify(file, by_time=config.streaming) for file in files}


def is_data(path: Path) -> bool:
    """Return whether a file of a folder is one of its data: hidden and half-written ones, "." and "_", are not."""
    return not path.name.startswith((".", "_"))


def _identify(path: Path, *, by_time: bool) -> dict[str, Any]:
    found = path.stat()
    told = {"mtime_ns": found.st_mtime_ns} if by_time else {"sha256": digest(path)}
    return {"bytes": found.st_size, **told}


def identify_source(path: Path) -> dict[str, Any]:
    """Return size and time of change of a file, which may be too large to be read twice."""
    return _identify(path, by_time=True)
