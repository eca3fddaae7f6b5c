"""What a run leaves behind: metrics.jsonl, TensorBoard logs, summary.json, the resolved config and the versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import zlib
from importlib import metadata
from pathlib import Path

from torchrec_compress.train.sealed import to_json


class Journal:
    """Write metrics as they come.

    Args:
        folder: of the stage.
        tensorboard: whether to write TensorBoard logs beside metrics.jsonl.
        keep_until: on resuming, lines of later steps are dropped, since they will be written again.
    """

    def __init__(self, folder: Path, tensorboard: bool, keep_until: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        kept = [line for number, line in enumerate(lines, 1) if self._step(line, number, len(lines)) <= keep_until]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Append one line of numbers, with its CRC-32.

        Raises:
            ValueError: a number that is not finite.
        """
        line = to_json(self._path, {"step": step, "kind": kind, **values})
        with self._path.open("a") as file:
            file.write(f'{line[:-1]}, "crc32": {zlib.crc32(line.encode())}}}\n')
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush everything."""
        if self._writer is not None:
            self._writer.close()

    def _step(self, line: str, number: int, last: int) -> float:
        """Return the step of a line; older ones have no checksum."""
        content, has_checksum, checksum = line.rpartition(', "crc32": ')
        try:
            found = json.loads(line)
            if not has_checksum or checksum == f"{zlib.crc32(f'{content}}}'.encode())}}}":
                return found["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == last:  # a killed run may have cut it
                return float("inf")
        raise ValueError(f"{self._path}: line {number} is damaged (its checksum differs); delete the line or the file")


def write_atomically(path: Path, text: str) -> None:
    """Replace at once the content of a file that nothing but people read."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def versions() -> dict[str, str]:
    """Return what the numbers depend on: packages, Python, processor and the commit of the source."""
    result = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for name in ("torchrec-compress", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        result["commit"] = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        result["commit"] = "unknown"
    return result
