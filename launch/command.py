"""`torchrec-compress launch`: look, submit, wait."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchrec_compress.train.config import RunConfig

from .options import LaunchOptions

if TYPE_CHECKING:
    from torchx.runner import Runner


def launch(config: RunConfig, options: LaunchOptions, training: Sequence[str]) -> bool:
    """Check, submit and, where asked, wait.

    Args:
        config: the training's, resolved.
        options: of the launch.
        training: CONFIG and overrides, as the training takes them.

    Returns:
        Whether the job was submitted, or ended well where it was waited for.

    Raises:
        ValueError: a bad option, or settings of the training that cannot work.
        OSError: the scheduler does not answer, or refuses the job.
    """
    try:
        from .submit import build, prepare, runner
    except ImportError as error:
        raise ValueError(f"launch: needs TorchX, got {error}; pip install 'torchrec-compress[launch]'") from error
    from torchrec_compress.train.check import check_config

    from .components import parse_shape
    from .preflight import Job, preflight, report

    check_config(config)
    shape = parse_shape(options.j)
    app = build(options, training)  # bad options stop here, before anything is asked
    logs = Path(config.output) / "logs"
    with runner() as found:
        if not report(preflight(config, options, Job(shape, app.roles[0].resource, training[0]))):
            return False
        request = prepare(found, options, app, logs)
        if options.dryrun:
            print(request)
            return True
        try:
            handle = found.schedule(request)
        except subprocess.CalledProcessError as error:
            raise OSError(f"launch: {error.cmd[0]} refused the job; its reason stands above") from error
        return _follow(found, handle, options, logs)


def _follow(found: Runner, handle: str, options: LaunchOptions, logs: Path) -> bool:
    from torchx.schedulers.local_scheduler import SignalException

    from .wait import wait_local, wait_slurm, wait_torchx

    job = handle.rpartition("/")[2]
    print(f"submitted {handle}", flush=True)
    try:
        if options.scheduler == "local_cwd":
            return wait_local(found, handle, logs)
        if not options.wait:
            return True
        return wait_slurm(job, Path.cwd()) if options.scheduler == "slurm" else wait_torchx(found, handle)
    except (KeyboardInterrupt, SignalException):  # TorchX turns signals into an error of its own
        end = {"slurm": f"goes on: squeue -j {job}, scancel {job}", "kubernetes": "goes on: kubectl get vcjob"}
        if options.scheduler == "local_cwd":
            found.cancel(handle)
        print(f"{handle}: {end.get(options.scheduler, 'cancelled; the same command continues it')}", flush=True)
        return False
