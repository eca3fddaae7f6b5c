"""Wait for a job: the lines of rank 0 while it runs, and how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from torchx.runner import Runner

from . import slurm
from .components import ROLE
from .logs import Tail, error_report, of_rank_0

_SECONDS = 1.0


def wait_slurm(job: str, folder: Path, seconds: float = _SECONDS) -> bool:
    """Wait for a job of Slurm; a requeued job is waited for again.

    Args:
        job: its number.
        folder: where it was submitted from, which is where srun writes its logs.
        seconds: between two questions.

    Returns:
        Whether it completed.

    Raises:
        OSError: Slurm does not answer, or has forgotten the job.
    """
    tail = Tail(folder, f"slurm-{job}-{ROLE}-*")
    shown, ended = "", 0
    while ended < 2:  # a job that requeues itself looks failed for an instant
        found = slurm.job_state(job)
        if found is None:
            raise OSError(f"job {job}: Slurm knows it no more; its logs are {folder}/slurm-{job}-*")
        restarts = f", started again {found.restarts} time(s)" if found.restarts else ""
        text = f"job {job}: {found.state}{f' ({found.reason})' if found.reason else ''}{restarts}"
        if text != shown:
            print(text, flush=True)
            shown = text
        _show(tail)
        ended = ended + 1 if found.ended else 0
        if ended < 2:
            time.sleep(seconds)
    return _outcome(found.state == "COMPLETED", f"{found.state}, exit code {found.exit_code}", tail)


def wait_local(found: Runner, handle: str, folder: Path, seconds: float = _SECONDS) -> bool:
    """Wait for a job of local_cwd in this process, whose children its workers are.

    Args:
        found: the runner that started it.
        handle: of the job.
        folder: of the logs.
        seconds: between two looks.

    Returns:
        Whether it succeeded.
    """
    # the session's and the job's folders, whose names TorchX chooses, are above the role's
    return _wait(found, handle, Tail(folder, f"**/{handle.rpartition('/')[2]}/{ROLE}/*/std*.log"), seconds)


def wait_torchx(found: Runner, handle: str, seconds: float = 10.0) -> bool:
    """Wait for a job of Kubernetes by what TorchX says of it; `kubectl logs` shows its lines.

    Args:
        found: the runner.
        handle: of the job.
        seconds: between two questions.

    Returns:
        Whether it succeeded.
    """
    return _wait(found, handle, Tail(Path("."), ""), seconds)


def _wait(found: Runner, handle: str, tail: Tail, seconds: float) -> bool:
    shown = ""
    while True:
        status = found.status(handle)
        if status is None:
            raise OSError(f"{handle}: the scheduler knows it no more")
        state = status.state.name
        if state != shown:
            print(f"{handle}: {state}", flush=True)
            shown = state
        _show(tail)
        if status.is_terminal():
            return _outcome(state == "SUCCEEDED", state, tail)
        time.sleep(seconds)


def _show(tail: Tail, write: Callable[[str], None] = print) -> None:
    for line in of_rank_0(tail.lines()):
        write(line)
    sys.stdout.flush()


def _outcome(well: bool, state: str, tail: Tail) -> bool:
    if well:
        return True
    lines = error_report(tail.files())
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    where = f"; logs: {', '.join(str(path) for path in tail.files())}" if tail.files() else ""
    sys.stderr.write(f"torchrec-compress: error: launch: the job ended as {state}{where}\n")
    return False
