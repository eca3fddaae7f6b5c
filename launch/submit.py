"""Submit a training by TorchX."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchx import runner as torchx_runner
from torchx.runner import Runner
from torchx.runner import config as torchx_config
from torchx.specs import AppDef, AppDryRunInfo

from .components import dlrm
from .options import LaunchOptions


@contextmanager
def runner() -> Iterator[Runner]:
    """Yield TorchX's runner; jobs of local_cwd end with it.

    TorchX warns of its own deprecations, and at every Kubernetes job with retries of a fault of Volcano 1.4.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torchx\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with torchx_runner.get_runner() as found:
            yield found


def build(options: LaunchOptions, training: Sequence[str]) -> AppDef:
    """Return the job.

    Args:
        options: of the launch.
        training: CONFIG and overrides.

    Raises:
        ValueError: a bad option.
    """
    return dlrm(
        *training,
        j=options.j,
        cpu=options.cpu,
        gpu=options.gpu,
        memMB=options.memory,
        h=options.resource,
        max_restarts=options.max_restarts,
        max_retries=options.max_retries,
        rdzv_port=options.rdzv_port,
        env=dict(options.env),
        python=options.python,
        image=options.image,
        mounts=[word for mount in options.mounts for word in mount.split(",")],
        name=options.name,
    )


def prepare(found: Runner, options: LaunchOptions, app: AppDef, logs: Path) -> AppDryRunInfo[Any]:
    """Return what would be submitted; printing it shows the sbatch script or the Kubernetes manifest.

    Args:
        found: TorchX's runner.
        options: of the launch; what they leave out of the scheduler's own, a `.torchxconfig` here or at home fills in.
        app: the job.
        logs: folder for the logs of local_cwd.

    Raises:
        ValueError: an option that the scheduler does not have, or a bad value of one.
    """
    name, known = options.scheduler, dict(found.scheduler_run_opts(options.scheduler))
    given: dict[str, Any] = dict(options.cfg)
    if name == "slurm":
        given |= {key: value for key in ("partition", "time") if (value := getattr(options, key))}
    elif options.partition or options.time:
        raise ValueError(f"--partition, --time: must go with --scheduler slurm, got {name}")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"--cfg: {name} must have the option, got {unknown}; it has {sorted(known)}")
    cfg: dict[str, Any] = dict(found.scheduler_run_opts(name).cfg_from_str(_joined(given))) if given else {}
    torchx_config.apply(name, cfg, dirs=[str(Path.cwd()), str(Path.home())])
    if name == "local_cwd":
        cfg.setdefault("log_dir", str(logs))
    if name == "kubernetes":
        cfg.setdefault("queue", "default")
        if options.dryrun and "validate_spec" in known:
            cfg.setdefault("validate_spec", False)  # it would ask a cluster
    return found.dryrun(app, name, cfg)


def _joined(given: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in given.items())
