"""A real Slurm of two nodes on this machine, all of it in one folder and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("node0", "node1")
# slurmd wants its node's name to be the host's and to resolve; both are true in namespaces of its own only
_AS_NODE = 'mount --bind "$1" /etc/hosts && hostname "$0" && exec slurmd -D -N "$0"'


def why_not() -> str:
    """Return why no Slurm can run here, or ""."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    probe = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True, check=False)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


def search_path() -> str:
    """Return PATH with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(holds: Callable[[], object], seconds: float, what: Callable[[], object]) -> None:
    """Wait for a condition; fail with what() after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


def processes() -> Iterator[tuple[int, str, str]]:
    """Yield number, command line and environment of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
            yield int(folder.name), line.replace(b"\0", b" ").decode(), environment.decode(errors="replace")


class Cluster:
    """slurmctld, munged and a slurmd for each node, in the foreground, children of this process.

    Args:
        folder: for keys, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        for name in ("state", "log", "run", "munge", *(f"state/{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
        (self.folder / "slurm.conf").write_text(self._config())
        munge = {"key": "key", "socket": "s", "pid": "pid", "log": "log", "seed": "seed"}
        files = [f"--{name}-file={self.folder}/munge/{file}" for name, file in munge.items() if name != "socket"]
        self._run("munged", ["munged", "--foreground", "--force", f"--socket={self.folder}/munge/s", *files])
        until((self.folder / "munge" / "s").exists, 20, self.log)
        self._run("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            hosts = str(self.folder / "hosts")
            self._run(node, ["unshare", "--mount", "--uts", "sh", "-c", _AS_NODE, node, hosts])
        until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", 30, self.log)

    def _config(self) -> str:
        here, (controller, *ports) = self.folder, free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000"
            for name, port in zip(NODES, ports, strict=True)
        ]
        return f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for its old credential to expire
AuthInfo=socket={here}/munge/s,cred_expire=5
StateSaveLocation={here}/state
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/%n.pid
SlurmdSpoolDir={here}/state/%n
SlurmctldLogFile={here}/log/slurmctld
SlurmdLogFile={here}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# how long whoever is asked to end may take to save, as by default; a busy machine needs more than a few seconds
KillWait=30
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
# components of one job start together by backfill only
SchedulerParameters=bf_interval=1,sched_interval=1,bf_hetjob_immediate
{os.linesep.join(nodes)}
PartitionName=test Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes={NODES[0]} Default=NO State=DOWN
"""

    def _run(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as out:
            # the kernel ends the daemon when this process dies before it could
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm's prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    def look_again(self) -> None:
        """Change something: backfill, which alone starts jobs of several components, rests in a cluster where nothing
        changes, and a requeued job would wait for two minutes."""
        self.ask("scontrol", "update", f"NodeName={NODES[0]}", f"Comment={time.monotonic()}")

    def log(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in (self.folder / "log").iterdir())

    def on_node(self, node: str, word: str) -> list[int]:
        """Return processes of a node whose command line has a word in it."""
        space = os.readlink(f"/proc/{self._daemons[node].pid}/ns/uts")
        found = []
        for number, line, _ in processes():
            with contextlib.suppress(OSError):
                if word in line and os.readlink(f"/proc/{number}/ns/uts") == space:
                    found.append(number)
        return found

    def stop(self) -> None:
        """End all jobs, then all daemons, then whatever still names this cluster in its environment."""
        self.ask("scancel", "--full", "--signal=KILL", *self.ask("squeue", "-h", "-o", "%A").split())
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.get(name)
            if daemon is not None:
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                daemon.kill()
                daemon.wait(10)
        for number in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        until(lambda: not self._left(), 10, self._left)

    def _left(self) -> list[int]:
        mine = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        return [number for number, _, environment in processes() if mine in environment and number != os.getpid()]
