"""What a run leaves behind: metrics.jsonl, TensorBoard logs, summary.json, the resolved config and the versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


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
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        kept = [line for line in lines if _step(line) <= keep_until]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Append one line of numbers."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush everything."""
        if self._writer is not None:
            self._writer.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the last line of a killed run may be cut


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content at once."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


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
