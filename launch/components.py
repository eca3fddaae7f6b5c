"""TorchX component: the training of a compressed DLRM as a job.

TorchX runs this file by its path as well as by its module name, on machines that may lack the rest of the package:
it imports the standard library and TorchX only, and the annotations of all functions, private ones too, stay those that
TorchX 0.7.0 can read (Optional, Dict and List of plain types).
"""

import re
import shlex
from typing import Dict, List, NamedTuple, Optional, Tuple

from torchx import specs
from torchx.specs import macros

ROLE = "dlrm"
_MB_PER_PROCESS = 4096


class Shape(NamedTuple):
    """How many processes a job has, and where.

    Args:
        min_nodes: nodes that the job can go on with.
        nodes: nodes that it asks for.
        processes: processes of a node.
    """

    min_nodes: int
    nodes: int
    processes: int


def parse_shape(text: str) -> Shape:
    """Read the value of -j.

    Args:
        text: NODESxPROCS, or MIN_NODES:NODESxPROCS for a job that goes on with fewer nodes.

    Returns:
        The shape.

    Raises:
        ValueError: it is neither.

    Example:
        >>> parse_shape("1:4x8")
        Shape(min_nodes=1, nodes=4, processes=8)
    """
    found = re.fullmatch(r"(?:([1-9]\d*):)?([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"-j: must be NODESxPROCS such as 2x8, or MIN_NODES:NODESxPROCS such as 1:4x8, got {text!r}")
    nodes = int(found[2])
    least = int(found[1] or nodes)
    if least > nodes:
        raise ValueError(f"-j: MIN_NODES must not be above NODES, got {text!r}")
    return Shape(least, nodes, int(found[3]))


def dlrm(
    *args: str,
    j: str = "1x2",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    env: Optional[Dict[str, str]] = None,
    output: str = "",
    python: str = "python",
    image: str = "torchrec-compress:latest",
    mounts: Optional[List[str]] = None,
    name: str = "dlrm",
) -> specs.AppDef:
    """Train a compressed DLRM under torchrun on one or more nodes.

    Args:
        args: what `torchrec-compress train` takes, CONFIG first, then --key.sub VALUE
        j: [MIN_NODES:]NODESxPROCS, such as 2x8, or 1:4x8 for a job that goes on with fewer nodes
        cpu: CPUs of a node; 0 asks for one per process
        gpu: GPUs of a node
        memMB: memory of a node in MB; 0 asks for 4096 per process
        h: a named resource of TorchX, in place of cpu, gpu and memMB
        max_restarts: how often torchrun starts the workers again within the job
        max_retries: how often the scheduler starts the whole job again
        rdzv_port: port of the rendezvous on node 0; two jobs that share a node need two ports
        env: environment variables, KEY=VALUE,KEY=VALUE
        output: folder of checkpoints and metrics, seen by every node; the config's own where it is empty
        python: interpreter on the nodes
        image: container image (docker and Kubernetes)
        mounts: volumes of the container, as in TorchX's own components: type=volume,src=CLAIM,dst=/runs
        name: of the job
    """
    shape = parse_shape(j)
    _check(list(args), output, name, max_restarts, max_retries, rdzv_port)
    resource = specs.resource(
        cpu=cpu or shape.processes, gpu=gpu, memMB=memMB or _MB_PER_PROCESS * shape.processes, h=h
    )
    plain, quoted = _environment(env or {}, max(1, int(resource.cpu) // shape.processes))
    start = ["exec", *(["env", *(f"{key}={value}" for key, value in quoted.items())] if quoted else []), python]
    train = ["-m", "torchrec_compress", "train", *args, *(["--output", output] if output else [])]
    command = f"{_words(start)} {_torchrun(shape, max_restarts, rdzv_port)} {_words(train)}"
    role = specs.Role(
        name=ROLE,
        image=image,
        entrypoint="bash",
        args=["-c", command],
        env=plain,
        num_replicas=shape.nodes,
        min_replicas=shape.min_nodes,
        max_retries=max_retries,
        port_map={"c10d": rdzv_port},
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=name, roles=[role])


def _torchrun(shape: Shape, max_restarts: int, rdzv_port: int) -> str:
    nodes = str(shape.nodes) if shape.min_nodes == shape.nodes else f"{shape.min_nodes}:{shape.nodes}"
    # torchrun finds node 0 by the name that the scheduler has given to it, which only a shell on the node knows
    endpoint = f"$${{{macros.rank0_env}:=localhost}}:{rdzv_port}" if shape.nodes > 1 else "localhost:0"
    return (
        f"-m torch.distributed.run --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id {macros.app_id} "
        f"--nnodes {nodes} --nproc_per_node {shape.processes} --max_restarts {max_restarts} --tee 3 --role ''"
    )


def _check(args: List[str], output: str, name: str, max_restarts: int, max_retries: int, rdzv_port: int) -> None:
    if not args or args[0].startswith("-"):
        raise ValueError(f"dlrm: the first argument must be a training config, got {args[0] if args else 'none'}")
    if output and any(arg.partition("=")[0] == "--output" for arg in args):
        raise ValueError(
            "dlrm: the output folder must be given once, got it as an option of the job and of the training"
        )
    # it becomes a folder's name, a word of sbatch's line and a name in Kubernetes
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise ValueError(f"name: must be up to 40 letters, digits, '_' and '-', a letter or digit first, got {name!r}")
    if not 0 < rdzv_port < 2**16:
        raise ValueError(f"rdzv_port: must be in [1, 65535], got {rdzv_port}")
    for option, value in (("max_restarts", max_restarts), ("max_retries", max_retries)):
        if value < 0:
            raise ValueError(f"{option}: must not be negative, got {value}")


def _environment(env: Dict[str, str], threads: int) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Return the variables for the scheduler and those that must go on the command line.

    sbatch reads `--export=ALL,KEY=VALUE,...` up to the next comma, so a value with one in it would arrive cut.
    """
    known = {
        "OMP_NUM_THREADS": str(threads),
        "LOGLEVEL": "WARNING",
        # torchrun keeps one TCPStore over all restarts (torch 2.13), and gloo then reads the addresses of dead ranks
        # from it: one restart in three hangs or fails. With this every restart has a store of its own.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # every line of a log says which rank wrote it: rank 0 may be on any node
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}]:",
        **env,
    }
    bad = [key for key in known if not re.fullmatch(r"[A-Za-z_]\w*", key)]
    if bad:
        raise ValueError(f"env: a name must be letters, digits and underscores, got {bad}")
    cut = {key for key, value in known.items() if set(value) & set(",\n")}
    plain = {key: value.replace("$", "$$") for key, value in known.items() if key not in cut}
    return plain, {key: known[key] for key in sorted(cut)}


def _words(words: List[str]) -> str:
    """Quote words for the shell, and dollar signs for TorchX, which fills in its macros at those."""
    return shlex.join(words).replace("$", "$$")
