"""The options of `torchrec-compress launch`; whatever else stands on its command line is the training's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from torchrec_compress.schema import nearest
from torchrec_compress.train.config import RunConfig

SCHEDULERS = ("local_cwd", "slurm", "kubernetes")
_DESCRIPTION = """Check that a training will run where it is sent, then start it with TorchX.

CONFIG and --key.sub VALUE are those of `torchrec-compress train`. The exit status is 0 when the job ended well
(or was submitted, without --wait), 1 when it or a check failed, and 2 when the command line is wrong.
Ctrl-C while waiting: a job on Slurm or Kubernetes goes on; a local one gets SIGTERM, and the same command resumes it.
"""


@dataclass(frozen=True)
class LaunchOptions:
    """Where and how a training runs.

    Args:
        scheduler: of TorchX: local_cwd (this machine, always waited for), slurm or kubernetes.
        j: [MIN_NODES:]NODESxPROCS.
        dryrun: whether to print what would be submitted, and submit nothing.
        wait: whether to wait for the end and to print the lines of rank 0.
        name: of the job.
        cpu: CPUs of a node; 0 is one per process.
        gpu: GPUs of a node.
        memory: MB of a node; 0 is 4096 per process.
        resource: a named resource of TorchX in place of the three.
        hbm: memory of a GPU, for the plan.
        max_restarts: how often torchrun starts the workers again within the job.
        max_retries: how often the scheduler starts the whole job again.
        rdzv_port: port of the rendezvous on node 0.
        env: environment variables of the job.
        python: interpreter on the nodes.
        image: container image.
        mounts: volumes of the container.
        partition: of Slurm.
        time: limit of a Slurm job, such as 04:00:00.
        cfg: further options of TorchX's scheduler, by name.
    """

    scheduler: str
    j: str = "1x2"
    dryrun: bool = False
    wait: bool = False
    name: str = "dlrm"
    cpu: int = 0
    gpu: int = 0
    memory: int = 0
    resource: str | None = None
    hbm: str = "80GB"
    max_restarts: int = 0
    max_retries: int = 0
    rdzv_port: int = 29500
    env: dict[str, str] = field(default_factory=dict)
    python: str = ""
    image: str = "torchrec-compress:latest"
    mounts: list[str] = field(default_factory=list)
    partition: str | None = None
    time: str | None = None
    cfg: dict[str, str] = field(default_factory=dict)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"launch: {message}")


def parse(arguments: Sequence[str]) -> tuple[LaunchOptions, list[str]]:
    """Split the command line into the options of the launch and those of the training.

    Args:
        arguments: CONFIG, then options of either kind in any order.

    Returns:
        The options, and the arguments of `torchrec-compress train`, CONFIG first.

    Raises:
        ValueError: no CONFIG, no scheduler, a bad value, or a name close to an option of the launch.
        SystemExit: --help.

    Example:
        >>> options, training = parse(["a.yaml", "--scheduler", "slurm", "-j", "2x8", "--seed", "3"])
        >>> options.j, training
        ('2x8', ['a.yaml', '--seed', '3'])
    """
    parser = _parser()
    if "--help" in arguments or "-h" in arguments:
        parser.print_help()
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"launch: CONFIG must come first, got {arguments[0] if arguments else 'nothing'}")
    found, training = parser.parse_known_args(list(arguments[1:]))
    _refuse_misspelt(training)
    values: dict[str, Any] = vars(found)
    values["env"] = _pairs(values["env"], "--env")
    values["cfg"] = _pairs(values["cfg"], "--cfg")
    # the nodes of a cluster see this interpreter through the shared file system; a container has its own
    values["python"] = values["python"] or ("python" if found.scheduler == "kubernetes" else sys.executable)
    return LaunchOptions(**values), [arguments[0], *training]


def _parser() -> argparse.ArgumentParser:
    usage = f"torchrec-compress launch CONFIG --scheduler {{{','.join(SCHEDULERS)}}} -j 2x8 [options] [--key.sub VALUE]"
    parser = _Parser(
        usage=usage,
        description=_DESCRIPTION,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--scheduler", required=True, choices=SCHEDULERS, help="where the job runs")
    add("-j", default="1x2", metavar="NODESxPROCS", help="processes; MIN_NODES:NODESxPROCS goes on with fewer nodes")
    add("--dryrun", action="store_true", help="check, print what would be submitted, submit nothing")
    add("--wait", action="store_true", help="print the lines of rank 0 until the end (local_cwd always does)")
    add("--name", default="dlrm", help="of the job")
    add("--cpu", type=int, default=0, help="CPUs of a node; one per process")
    add("--gpu", type=int, default=0, help="GPUs of a node; none")
    add("--memory", type=int, default=0, metavar="MB", help="memory of a node; 4096 per process")
    add("--resource", metavar="NAME", help="a named resource of TorchX, in place of the three")
    add("--hbm", default="80GB", metavar="SIZE", help="memory of a GPU, for the plan (2**30 bytes to a GB); 80GB")
    add("--max-restarts", type=int, default=0, metavar="N", help="torchrun starts the workers again N times")
    add("--max-retries", type=int, default=0, metavar="N", help="the scheduler starts the job again N times")
    add("--rdzv-port", type=int, default=29500, metavar="PORT", help="of the rendezvous on node 0; 29500")
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable; may be repeated")
    add("--python", default="", help="interpreter on the nodes; this one (a container: python)")
    add("--image", default="torchrec-compress:latest", help="container image")
    add("--mounts", action="append", default=[], metavar="K=V,...", help="volume, as in TorchX; may be repeated")
    add("--partition", help="Slurm's partition; its default one")
    add("--time", help="limit of a Slurm job, such as 04:00:00")
    add("--cfg", action="append", default=[], metavar="KEY=VALUE", help="option of TorchX's scheduler; may be repeated")
    return parser


def _refuse_misspelt(training: list[str]) -> None:
    own = [found.name.replace("_", "-") for found in fields(LaunchOptions)]
    theirs = [found.name for found in fields(RunConfig)]
    for word in training:
        name = word[2:].partition("=")[0] if word.startswith("--") else ""
        if not name or "." in name or name in theirs:
            continue
        if nearest(name, own) and nearest(name, own) == nearest(name, own + theirs):
            raise ValueError(f"launch: unknown option --{name}{nearest(name, own)}")


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    split = [text.partition("=") for text in texts]
    bad = [text for text, (key, equals, _) in zip(texts, split, strict=True) if not key or not equals]
    if bad:
        raise ValueError(f"{option}: must be KEY=VALUE, got {bad[0]!r}")
    return {key: value for key, _, value in split}
