"""Two hosts on one machine: namespaces of their own for network, name and mounts, joined by a virtual cable.

They belong to two sleeping processes and are gone with them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launch.cluster import processes, until

NAMES = ("node0", "node1")
_ADDRESSES = ("10.77.0.10", "10.77.0.11")
_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
_AS_HOST = 'mount --bind "$1" /etc/hosts && hostname "$0" && ip link set lo up && exec sleep infinity'


def why_not() -> str:
    """Return why no hosts can be made here, or ""."""
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


class Hosts:
    """Two hosts that see each other and nothing else.

    Args:
        folder: for their /etc/hosts.
    """

    def __init__(self, folder: Path) -> None:
        self._hosts = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for ip, name in zip(_ADDRESSES, NAMES, strict=True))]
        self._hosts.write_text("\n".join(lines) + "\n")
        self._holders: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Make the namespaces and the cable."""
        for name in NAMES:
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "sh", "-c", _AS_HOST]
            self._holders.append(subprocess.Popen([*command, name, str(self._hosts)]))
        until(lambda: all(self._sleeps(holder.pid) for holder in self._holders), 10, lambda: "hosts do not start")
        first, second = (str(holder.pid) for holder in self._holders)
        cable = ["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        subprocess.run(cable, check=True)
        for holder, address in zip(self._holders, _ADDRESSES, strict=True):
            inside = ["nsenter", "--target", str(holder.pid), "--net", "ip"]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
            subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)

    def _sleeps(self, pid: int) -> bool:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")

    def run(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, in the current folder.

        Args:
            number: of the host.
            command: and its arguments.
            environment: on top of this process's.
            log: for what it prints; appended to.
        """
        spaces = ["nsenter", "--target", str(self._holders[number].pid), "--net", "--uts", "--mount"]
        with log.open("ab") as out:
            return subprocess.Popen(
                [*spaces, f"--wd={os.getcwd()}", *command],
                env={**os.environ, **environment},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def processes_of(self, number: int) -> list[int]:
        """Return everything that runs on a host, but for the process that it belongs to."""
        holder = self._holders[number].pid
        space = os.readlink(f"/proc/{holder}/ns/net")
        found = []
        for pid, _, _ in processes():
            with contextlib.suppress(OSError):
                if pid != holder and os.readlink(f"/proc/{pid}/ns/net") == space:
                    found.append(pid)
        return found

    def stop(self) -> None:
        """End everything on both hosts, and the hosts."""
        for number, holder in enumerate(self._holders):
            for pid in self.processes_of(number):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            holder.kill()
            holder.wait(10)
