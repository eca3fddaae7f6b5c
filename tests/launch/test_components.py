"""The component by itself: what it accepts, what it refuses, and how TorchX finds it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs.finder import get_component, get_components

from tests.launch.parsed import torchrun
from torchrec_compress.launch import components
from torchrec_compress.launch.components import Shape, dlrm, parse_shape

ROOT = Path(__file__).parents[2]


def role(*args, **options):
    (found,) = dlrm(*(args or ("a.yaml",)), **options).roles
    return found


def test_torchx_accepts_its_signature_and_help(capsys):
    ComponentTestCase().validate(components, "dlrm")
    text = capsys.readouterr().out
    assert "MIN_NODES" in text and "--max_restarts" in text


@pytest.mark.parametrize(
    ("text", "shape"), [("1x2", Shape(1, 1, 2)), ("2x8", Shape(2, 2, 8)), ("1:4x8", Shape(1, 4, 8))]
)
def test_the_shape_of_a_job(text, shape):
    assert parse_shape(text) == shape
    found = role(j=text)
    assert (found.min_replicas, found.num_replicas) == shape[:2]
    options = torchrun([found.entrypoint, *found.args]).torchrun
    assert options["nproc_per_node"] == str(shape.processes)
    assert options["nnodes"] == text.partition("x")[0]


@pytest.mark.parametrize("text", ["2y8", "8", "0x2", "2x0", "x8", "-1x2", "2x8x1", "1:2", "2 x 8", ""])
def test_a_bad_shape_is_refused(text):
    with pytest.raises(ValueError, match=r"^-j: must be NODESxPROCS such as 2x8"):
        dlrm("a.yaml", j=text)


def test_more_least_nodes_than_nodes_are_refused():
    with pytest.raises(ValueError, match="MIN_NODES must not be above NODES, got '4:2x1'"):
        dlrm("a.yaml", j="4:2x1")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {}, "first argument must be a training config, got none"),
        (("--seed", "3"), {}, "first argument must be a training config, got --seed"),
        (("a.yaml", "--output", "x"), {"output": "y"}, "output folder must be given once"),
        (("a.yaml",), {"rdzv_port": 70000}, "rdzv_port: must be in"),
        (("a.yaml",), {"max_restarts": -1}, "max_restarts: must not be negative"),
        (("a.yaml",), {"max_retries": -1}, "max_retries: must not be negative"),
        (("a.yaml",), {"env": {"A B": "1"}}, "env: a name must be letters"),
    ],
)
def test_bad_options_are_refused(args, options, message):
    with pytest.raises(ValueError, match=message):
        dlrm(*args, **options)


def test_one_node_needs_no_port_and_several_meet_at_node_0():
    assert "--rdzv_endpoint localhost:0" in role(j="1x4").args[1]
    assert "--rdzv_endpoint $${${rank0_env}:=localhost}:2345" in role(j="2x4", rdzv_port=2345).args[1]


def test_resources_follow_the_processes_unless_they_are_given():
    found = role(j="2x8").resource
    assert (found.cpu, found.gpu, found.memMB) == (8, 0, 8 * 4096)
    found = role(j="2x8", cpu=64, gpu=8, memMB=1000)
    assert (found.resource.cpu, found.resource.gpu, found.resource.memMB) == (64, 8, 1000)
    assert found.env["OMP_NUM_THREADS"] == "8"
    assert role(j="1x1", h="aws_t3.medium").resource.memMB > 0


def test_restarts_of_gloo_get_a_store_of_their_own():
    assert role().env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role(env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}).env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "0"


def test_arguments_reach_the_training_as_they_were_given():
    given = ["a b.yaml", "--compression", '{"*": {"method": "$x"}}', "--seed", "3"]
    found = role(*given, output="runs/x", python="/opt/my env/python")
    command = torchrun([found.entrypoint, *[word.replace("$$", "$") for word in found.args]])
    assert command.python == ["/opt/my env/python"]
    assert command.training == ["torchrec_compress", "train", *given, "--output", "runs/x"]


def test_a_value_with_a_comma_goes_on_the_command_line():
    """sbatch would cut it there."""
    found = role(env={"A": "1,2", "B": "3"})
    assert found.env["B"] == "3" and "A" not in found.env
    assert shlex.split(found.args[1])[:3] == ["exec", "env", "A=1,2"]


def test_torchx_finds_it_beside_its_own_components():
    names = set(get_components())
    assert {name for name in names if name.startswith("compress.")} == {"compress.dlrm"}
    assert "utils.echo" in names and any(name.startswith("dist.") for name in names)
    assert get_component("compress.dlrm").fn(*["a.yaml"]).name == "dlrm"


def test_it_runs_by_path_where_the_package_is_not_installed(tmp_path):
    """With nothing but the file and TorchX."""
    copy = tmp_path / "launch" / "components.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / "launch" / "components.py").read_text())
    command = [sys.executable, "-W", "ignore", "-m", "torchx.cli.main", "run", "--dryrun", "-s", "local_cwd"]
    done = subprocess.run(
        [*command, "launch/components.py:dlrm", "-j", "2x4", "--", "a.yaml", "--seed", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 4" in done.stdout and "torchrec_compress train a.yaml --seed 3" in done.stdout
