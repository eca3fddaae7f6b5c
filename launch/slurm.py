"""What Slurm says about partitions and jobs, read from sinfo, srun and scontrol.

TorchX cannot be asked: its 0.7.0 needs job accounting for every question, which many clusters lack, and its nightly
misreads pending jobs of Slurm before 24.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_RUNNING_STATES = {"CONFIGURING", "COMPLETING", "PENDING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "RUNNING"}
_RUNNING_STATES |= {"SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD"}


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike: one line of sinfo.

    Args:
        partition: their partition.
        is_default: whether jobs that name none go there.
        available: "up", or why not.
        nodes: how many.
        cpus: of a node.
        memory: of a node, in MB.
        gpus: of a node.
    """

    partition: str
    is_default: bool
    available: str
    nodes: int
    cpus: int
    memory: int
    gpus: int


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job.

    Args:
        state: such as PENDING or COMPLETED; of several components the one that matters most.
        reason: why it waits or ended; "" where Slurm names none.
        restarts: how often it was started again.
        exit_code: of the job, as Slurm writes it, status:signal.
    """

    state: str
    reason: str
    restarts: int
    exit_code: str

    @property
    def ended(self) -> bool:
        """Whether the job is over, well or not."""
        return self.state not in _RUNNING_STATES


def missing_commands() -> list[str]:
    """Return those of Slurm's commands that are not on PATH."""
    return [name for name in ("sbatch", "sinfo", "scontrol", "srun") if shutil.which(name) is None]


def node_groups() -> list[NodeGroup]:
    """Return every partition's nodes.

    Raises:
        OSError: Slurm does not answer; the text is sinfo's.
    """
    return parse_node_groups(_ask(["sinfo", "--noheader", "--format=%P|%a|%D|%c|%m|%G"]))


def parse_node_groups(text: str) -> list[NodeGroup]:
    """Read sinfo's lines PARTITION|AVAIL|NODES|CPUS|MEMORY|GRES.

    Example:
        >>> parse_node_groups("gpu*|up|4|64+|512000|gpu:h100:8(S:0-1)")
        [NodeGroup(partition='gpu', is_default=True, available='up', nodes=4, cpus=64, memory=512000, gpus=8)]
    """
    groups = []
    for line in text.splitlines():
        name, available, nodes, cpus, memory, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", gres))
        group = NodeGroup(
            partition=name.rstrip("*"),
            is_default=name.endswith("*"),
            available=available,
            nodes=int(nodes),
            cpus=int(cpus.rstrip("+")),
            memory=int(memory.rstrip("+")),
            gpus=gpus,
        )
        groups.append(group)
    return groups


def run_on_node(command: Sequence[str], partition: str | None, seconds: int = 20) -> str | None:
    """Run a command on one free node.

    Args:
        command: and its arguments.
        partition: where; None is the default one.
        seconds: to wait for a free node.

    Returns:
        What it wrote, or None where no node was free in time.

    Raises:
        OSError: it failed; the text is its last line of errors.
    """
    where = ["--partition", partition] if partition else []
    options = ["--nodes=1", "--ntasks=1", "--time=2", f"--immediate={seconds}", "--job-name=preflight", "--quiet"]
    try:
        return _ask(["srun", *where, *options, *command], seconds + 90)
    except OSError as error:
        if re.search("Unable to allocate resources: .*(immediately|busy|not available)", str(error)):
            return None
        raise


def job_state(job: str) -> JobState | None:
    """Return the state of a job, or None where Slurm knows it no more (it forgets a job some minutes after its end).

    Args:
        job: its number.

    Raises:
        OSError: Slurm does not answer.
    """
    try:
        return parse_job(_ask(["scontrol", "--oneliner", "show", "job", job]))
    except OSError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def parse_job(text: str) -> JobState:
    """Read scontrol's lines, one for each component of a heterogeneous job.

    The job is over when every component is; it went well when all went well.

    Example:
        >>> parse_job("JobId=7 JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0")
        JobState(state='RUNNING', reason='', restarts=1, exit_code='0:0')
    """
    parts = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if "JobState=" in line]
    if not parts:
        raise OSError(f"scontrol: must print the state of the job, got {text[:200]!r}")
    going = [part for part in parts if part["JobState"] in _RUNNING_STATES]
    failed = [part for part in parts if part["JobState"] != "COMPLETED"]
    chosen = (going or failed or parts)[0]
    reason = chosen.get("Reason", "None")
    return JobState(
        chosen["JobState"],
        "" if reason == "None" else reason,
        max(int(part.get("Restarts", 0)) for part in parts),
        chosen.get("ExitCode", ""),
    )


def _ask(command: Sequence[str], seconds: int = 60) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]}: no answer within {seconds} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise OSError(f"{command[0]}: {said[-1]}")
    return done.stdout
