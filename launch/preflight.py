"""Look before a launch: does the model fit, is there a place for it, would the nodes run it?"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchx.specs import Resource

from torchrec_compress.schema import nearest
from torchrec_compress.train.config import RunConfig

from . import slurm
from .components import Shape
from .options import LaunchOptions

# Runs on a node. Importing the package checks that torch, torchrec and fbgemm fit together, and that they load there.
_PROBE = """
import json, os, socket, sys
from torchrec_compress.versions import installed_versions
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("", int(sys.argv[1])))
        free = True
    except OSError:
        free = False
print(json.dumps({"host": socket.gethostname(), "versions": installed_versions(), "free": free,
                  "config": os.path.isfile(sys.argv[2])}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: its name.
        outcome: "ok", "FAIL", or "skip" where it could not be asked.
        detail: what was found.
        remedy: what to do about a failure.
    """

    what: str
    outcome: Literal["ok", "FAIL", "skip"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.outcome:5}{self.what:11}{self.detail}"
        return text + (f"\n{'':16}-> {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Job:
    """What is to be placed.

    Args:
        shape: nodes and processes.
        resource: of a node.
        path: of the config file.
    """

    shape: Shape
    resource: Resource
    path: str


def preflight(config: RunConfig, options: LaunchOptions, job: Job) -> Iterator[Finding]:
    """Look at everything that can be asked, cheapest first.

    Args:
        config: the training's.
        options: of the launch.
        job: to be placed.

    Yields:
        What was found, as soon as it is.
    """
    yield check_plan(config, options.hbm, job)
    if options.scheduler == "kubernetes":
        yield check_kubernetes(options)
        detail = f"not asked: the image {options.image} brings python, versions and {job.path}"
        yield Finding("node", "skip", detail)
        return
    yield check_output(config)
    if options.scheduler == "local_cwd":
        if job.shape.nodes > 1:
            yield check_port(options.rdzv_port)
        yield from check_node(lambda probe: _here([options.python, "-W", "ignore", *probe]), options, job.path)
        return
    found = check_partition(options, job)
    yield found
    if found.outcome == "ok":
        command = [options.python, "-W", "ignore"]
        yield from check_node(lambda probe: slurm.run_on_node([*command, *probe], options.partition), options, job.path)


def check_plan(config: RunConfig, hbm: str, job: Job) -> Finding:
    """Plan the tables for the fewest nodes that the job can go on with; nothing is allocated.

    Args:
        config: the training's.
        hbm: memory of a GPU.
        job: to be placed.
    """
    from torchrec_compress.dry_run.config import PlanConfig, TableSpec
    from torchrec_compress.dry_run.plan import quiet_plan
    from torchrec_compress.planner.text import size
    from torchrec_compress.train.check import check_tables, compression_of
    from torchrec_compress.train.plan_from_training import from_training, known_rows

    try:
        rows = known_rows(config)
    except ValueError as error:
        return Finding("plan", "skip", f"not known before the data is read: {error}")
    try:
        check_tables(config, compression_of(config.compression), rows)
    except ValueError as error:
        return Finding("config", "FAIL", str(error), f"mend it in {job.path} or on the command line")
    try:
        keys = from_training(config)
    except ValueError as error:
        return Finding("plan", "skip", f"not known before the data is read: {error}")
    ranks, on_gpu = job.shape.min_nodes * job.shape.processes, job.resource.gpu > 0
    keys |= {
        "tables": {name: TableSpec(**spec) for name, spec in keys["tables"].items()},
        "world_size": ranks,
        "local_world_size": job.shape.processes,
        "device": "cuda" if on_gpu else "cpu",
        "hbm": hbm,
        "ddr": f"{job.resource.memMB / job.shape.processes}MB",
    }
    try:
        report, _ = quiet_plan(PlanConfig(**keys))
    except ValueError as error:
        first, _, rest = str(error).partition("\n")
        more = "ask for more memory, nodes or compression; `torchrec-compress plan` shows the whole plan"
        return Finding("plan", "FAIL", f"on {ranks} ranks: {first}", rest.strip().replace("\n", f"\n{'':19}") or more)
    most, host = (max(getattr(rank, key) for rank in report.ranks) for key in ("device_bytes", "host_bytes"))
    left = min(rank.capacity_bytes for rank in report.ranks)
    spilt = f" and {size(host)} of its host's memory" if host else ""
    return Finding("plan", "ok", f"{ranks} ranks; the fullest holds {size(most)} of {size(left)}{spilt}")


def check_output(config: RunConfig) -> Finding:
    """Make the run's folder, where checkpoints go; one that was begun must have been so with these settings."""
    from torchrec_compress.train.identity import check_unchanged

    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".preflight"
        probe.write_text("")
        probe.unlink()
        check_unchanged(config, folder)
    except ValueError as error:
        return Finding("output", "FAIL", str(error), "give a new folder: --output DIR")
    except OSError as error:
        return Finding(
            "output", "FAIL", f"{folder}: {error.strerror}", "give a folder that can be written: --output DIR"
        )
    return Finding("output", "ok", f"{folder} can be written; checkpoints go there, and every node must see it")


def check_port(port: int) -> Finding:
    """Try to listen on the rendezvous' port of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return Finding("port", "FAIL", f"{port} on this machine: {error.strerror}", f"--rdzv-port {_free_port()}")
    return Finding("port", "ok", f"{port} is free on this machine")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def check_kubernetes(options: LaunchOptions) -> Finding:
    """Look for the client, and for a cluster unless nothing will be submitted."""
    try:
        from kubernetes import config as clusters
    except ImportError:
        return Finding("cluster", "FAIL", "the kubernetes client is not installed", "pip install kubernetes")
    if options.dryrun:
        return Finding("cluster", "skip", "not asked: --dryrun")
    try:
        _, active = clusters.list_kube_config_contexts()
    except clusters.ConfigException as error:
        return Finding("cluster", "FAIL", f"no cluster is configured: {error}", "set KUBECONFIG, or use --dryrun")
    return Finding("cluster", "ok", f"context {active['name']}")


def check_partition(options: LaunchOptions, job: Job) -> Finding:
    """Look for a partition with enough nodes that are large enough."""
    absent = slurm.missing_commands()
    if absent:
        remedy = "run this on a login node of the cluster, or use --scheduler local_cwd"
        if options.dryrun:
            return Finding("partition", "skip", f"not asked: no {', '.join(absent)} on PATH")
        return Finding("partition", "FAIL", f"no {', '.join(absent)} on PATH", remedy)
    try:
        groups = slurm.node_groups()
    except OSError as error:
        if options.dryrun:
            return Finding("partition", "skip", f"not asked: {error}")
        return Finding("partition", "FAIL", str(error), "is Slurm running, and SLURM_CONF right?")
    names = sorted({group.partition for group in groups})
    here = [group for group in groups if (options.partition or group.partition) == group.partition]
    here = [group for group in here if options.partition or group.is_default]
    if not here:
        said = f"no partition {options.partition!r}" if options.partition else "no default partition"
        close = nearest(options.partition or "", names).replace("; ", ". ")
        return Finding("partition", "FAIL", said + close, f"--partition {'|'.join(names)}")
    name, down = here[0].partition, [group for group in here if group.available != "up"]
    if down:
        return Finding("partition", "FAIL", f"{name} is {down[0].available}", f"--partition {'|'.join(names)}")
    return _room(name, here, job)


def _room(name: str, groups: list[slurm.NodeGroup], job: Job) -> Finding:
    wanted, nodes = job.resource, job.shape.nodes
    fit = [g for g in groups if g.cpus >= wanted.cpu and g.memory >= wanted.memMB and g.gpus >= wanted.gpu]
    count = sum(group.nodes for group in fit)
    asked = f"{wanted.cpu} CPUs, {wanted.memMB} MB, {wanted.gpu} GPUs"
    if count < nodes:
        largest = "; ".join(f"{g.nodes} x {g.cpus} CPUs, {g.memory} MB, {g.gpus} GPUs" for g in groups)
        remedy = f"ask for less by --cpu, --memory, --gpu or -j; {name} has {largest}"
        return Finding("partition", "FAIL", f"{name} has {count} of {nodes} nodes with {asked}", remedy)
    return Finding("partition", "ok", f"{name} has {count} nodes with {asked}; {nodes} wanted")


def check_node(ask: Callable[[list[str]], str | None], options: LaunchOptions, path: str) -> Iterator[Finding]:
    """Ask a node for its versions, the config and the port.

    Args:
        ask: runs python with the given arguments on a node and returns what it wrote, or None where no node was free;
            raises OSError where python failed.
        options: of the launch.
        path: of the config file.

    Yields:
        What was found.
    """
    if options.dryrun:
        yield Finding("node", "skip", "not asked: --dryrun")
        return
    try:
        said = ask(["-c", _PROBE, str(options.rdzv_port), path])
    except OSError as error:
        remedy = f"make {options.python} import torchrec_compress there, or name another one with --python"
        yield Finding("node", "FAIL", str(error), remedy)
        return
    if said is None:
        yield Finding("node", "skip", "not asked: no node was free")
        return
    node = json.loads(said.splitlines()[-1])
    versions = ", ".join(f"{name} {number}" for name, number in node["versions"].items())
    yield Finding("node", "ok", f"{node['host']}: {versions}")
    if not node["config"]:
        yield Finding("node", "FAIL", f"{node['host']} does not see {path}", "keep the config on a shared file system")
    if options.scheduler == "slurm" and not node["free"]:
        yield Finding("port", "FAIL", f"{options.rdzv_port} is taken on {node['host']}", f"--rdzv-port {_free_port()}")


def _here(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]}: no answer within 120 s") from error
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"{command[0]}: status {done.returncode}"])[-1])
    return done.stdout


def report(findings: Iterator[Finding]) -> bool:
    """Print findings as they come.

    Returns:
        Whether none failed.
    """
    well = True
    for finding in findings:
        print(finding, flush=True)
        well = well and finding.outcome != "FAIL"
    if not well:
        sys.stderr.write("torchrec-compress: error: launch: a check failed; nothing was submitted\n")
    return well
