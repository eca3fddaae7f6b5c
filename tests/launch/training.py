"""The real training on data small enough for tests, alone and with a hand on its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from tests.launch.cluster import free_ports, processes, until

# how far a launched training may be from the one in a single process, per metric
TOLERANCE = 1e-5
SECONDS = 150
_STAGE = {"epochs": 2, "batch_size": 128, "evals_per_epoch": 2, "patience": 0, "checkpoint_every": 5}
_DENSE: dict[str, Any] = {
    "tensorboard": False,
    "data": {"kind": "generator", "generator": {"num_rows": 16_000, "num_users": 600, "num_items": 400}},
    "model": {"name": "deepfm", "embedding_dim": 8, "hidden": [16]},
    "pretrain": {**_STAGE, "optim": {"adaptive_l2": 0.01}},  # from counts of all ranks
}
_MEC = {"*": {"method": "mec", "num_codes": 2, "num_hot_rows": 20, "fit_options": {"num_steps": 20}}}
CONFIGS = {
    "dense": _DENSE,
    "absent": {**_DENSE, "data": {"kind": "parquet", "path": "absent.parquet"}},
    "mec": {**_DENSE, "pretrain": _STAGE, "compression": _MEC, "retrain": {**_STAGE, "epochs": 1}},
}


class Launch:
    """`torchrec-compress launch CONFIG OPTIONS` as a process, and what it prints.

    Args:
        config: path of the config.
        options: of the launch and of the training.
    """

    def __init__(self, config: str, *options: str) -> None:
        port = ["--rdzv-port", str(free_ports(1)[0])]
        command = [sys.executable, "-W", "ignore", "-m", "torchrec_compress", "launch", config, *port, *options]
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    def end(self) -> int:
        """Wait for the end and return the exit status."""
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self._reader.join(10)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def text(self) -> str:
        """Return all that was printed."""
        return "\n".join(self.lines)

    def handle(self) -> str:
        """Return TorchX's handle of the job."""
        until(lambda: "submitted " in self.text() or self.process.poll() is not None, SECONDS, self.text)
        found = re.search(r"submitted (\S+)", self.text())
        assert found, self.text()
        return found[1]


def write_config(name: str, folder: Path) -> str:
    """Write a config into a folder and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**CONFIGS[name], "output": str(folder / "run")}))
    return str(path)


def metrics(run: Path) -> dict[str, float]:
    """Return what a finished run says of its test set."""
    found = json.loads((run / "summary.json").read_text())["metrics"]["test"]
    return {name: found[name] for name in ("auc", "logloss")}


def train_alone(name: str, folder: Path) -> dict[str, float]:
    """Train in a single process, without torchrun, and return its metrics."""
    command = [sys.executable, "-W", "ignore", "-m", "torchrec_compress", "train", write_config(name, folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return metrics(folder / "run")


def assert_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    """Compare metrics within the tolerance."""
    assert found.keys() == expected.keys()
    far = {name: (found[name], expected[name]) for name in found if abs(found[name] - expected[name]) > TOLERANCE}
    assert not far, far


def wait_for_checkpoint(run: Path, number: int = 1) -> None:
    """Wait until a run has finished so many checkpoints, or kept them; fail when it ended before that."""

    def checkpoints() -> bool:
        assert not (run / "summary.json").exists(), "the training ended before it could be killed"
        return len({path.parent for path in run.glob("**/step*/*")}) >= number

    until(checkpoints, SECONDS, lambda: sorted(map(str, run.rglob("*"))))


def workers(run: Path) -> list[int]:
    """Return the training processes of a run, torchrun's own apart."""
    return [pid for pid, line, env in processes() if "torchrec_compress train" in line and _is_worker(line, env, run)]


def _is_worker(line: str, environment: str, run: Path) -> bool:
    return str(run.parent) in line and "torch.distributed.run" not in line and "RANK=" in environment


def kill(pids: list[int]) -> None:
    """End processes as a failing machine would."""
    assert pids, "there must be processes to kill"
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def hold(pids: list[int]) -> None:
    """Stop processes where they are, until they are sent SIGCONT."""
    assert pids, "there must be processes to hold"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
