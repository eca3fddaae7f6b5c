"""What a dryrun would submit, as plain structures, for both versions of TorchX."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from torchrec_compress.launch.submit import runner


@dataclass(frozen=True)
class Command:
    """The torchrun line of one node.

    Args:
        python: words before -m.
        torchrun: options by name.
        training: what follows torchrun's own options.
    """

    python: list[str]
    torchrun: dict[str, str]
    training: list[str]


@dataclass(frozen=True)
class SlurmNode:
    """One component of a heterogeneous job.

    Args:
        sbatch: options by name.
        srun: options by name.
        env: exported variables.
        command: that runs there.
    """

    sbatch: dict[str, str]
    srun: dict[str, str]
    env: dict[str, str]
    command: Command


def dryrun(app: Any, scheduler: str, **cfg: Any) -> Any:
    """Return TorchX's request for a job."""
    with runner() as found:
        if scheduler == "kubernetes":
            cfg = {"queue": "default", **cfg}
            if "validate_spec" in dict(found.scheduler_run_opts(scheduler)):
                cfg["validate_spec"] = False
        return found.dryrun(app, scheduler, cfg)


def torchrun(words: list[str]) -> Command:
    """Read `bash -c "exec PYTHON -m torch.distributed.run OPTIONS -m MODULE ..."`."""
    assert words[:2] == ["bash", "-c"] and len(words) == 3, words
    first, *rest = shlex.split(words[2])
    assert first == "exec"
    at = rest.index("torch.distributed.run")
    after = rest[at + 1 :]
    end = after.index("-m")
    options = dict(zip(after[:end:2], after[1:end:2], strict=True))
    return Command(rest[: at - 1], {key.removeprefix("--"): value for key, value in options.items()}, after[end + 1 :])


def _options(words: list[str]) -> dict[str, str]:
    split = [word.removeprefix("--").partition("=") for word in words]
    return {key: value for key, _, value in split}


def slurm_script(request: Any) -> tuple[list[SlurmNode], str]:
    """Read the sbatch script of a request: its nodes, and what follows srun."""
    script = request.request.materialize()
    groups = [_options(shlex.split(line)) for line in re.findall(r"^#SBATCH (--.*)$", script, flags=re.MULTILINE)]
    srun, after = re.split(r"\nexitcode=", script.partition("\nsrun ")[2], maxsplit=1)
    # the shell would fill in the job's number; 7 stands for it here
    words = [word.replace("$SLURM_JOB_ID", "7") for word in shlex.split(srun.replace("\\\n", " "))]
    nodes, start = [], 0
    for end in [n for n, word in enumerate(words) if word == ":"] + [len(words)]:
        part = words[start:end]
        at = part.index("bash")
        options = _options(part[:at])
        every, *exported = options.pop("export").split(",")
        assert every == "ALL"
        env = {key: value for key, _, value in (word.partition("=") for word in exported)}
        nodes.append(SlurmNode(groups[len(nodes)], options, env, torchrun(part[at:])))
        start = end + 1
    assert len(groups) == len(nodes)
    return nodes, after
