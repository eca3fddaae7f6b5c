"""`torchrec-compress launch` as a user types it: what it says, and how it ends."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from torchrec_compress.cli import main
from torchrec_compress.launch import preflight, slurm
from torchrec_compress.launch.components import parse_shape
from torchrec_compress.launch.logs import Tail, error_report, of_rank_0
from torchrec_compress.launch.options import parse
from torchrec_compress.launch.submit import build

TINY = {
    "tensorboard": False,
    "data": {"kind": "generator", "generator": {"num_rows": 2000, "num_users": 300, "num_items": 200}},
    "model": {"name": "dlrm", "embedding_dim": 8, "hidden": [16]},
    "pretrain": {"epochs": 1, "batch_size": 256, "evals_per_epoch": 1},
}


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    """Return a config in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "output": "run"}))
    return "tiny.yaml"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Return exit status, output and errors."""
    status = 0
    try:
        main(["launch", *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CONFIG must come first, got nothing"),
        (["--scheduler", "slurm"], "CONFIG must come first, got --scheduler"),
        (["tiny.yaml"], "required: --scheduler"),
        (["tiny.yaml", "--scheduler", "slrm"], "invalid choice: 'slrm'"),
        (["none.yaml", "--scheduler", "slurm"], "none.yaml: no such config file"),
        (["tiny.yaml", "--scheduler", "local_cwd", "-j", "2y8"], "-j: must be NODESxPROCS such as 2x8"),
        (["tiny.yaml", "--scheduler", "slurm", "--paritition", "x"], "--paritition; did you mean 'partition'?"),
        (["tiny.yaml", "--scheduler", "slurm", "--modle.name", "x"], "did you mean 'model.name'?"),
        (["tiny.yaml", "--scheduler", "slurm", "--env", "A"], "--env: must be KEY=VALUE, got 'A'"),
        (["tiny.yaml", "--scheduler", "slurm", "--gpu", "many"], "invalid int value: 'many'"),
        (["tiny.yaml", "--scheduler", "slurm", "--rdzv-port", "0"], "rdzv_port: must be in"),
        (["tiny.yaml", "--scheduler", "local_cwd", "--name", "../x"], "name: must be up to 40 letters"),
        (["tiny.yaml", "--scheduler", "slurm", "--name", "a\n#SBATCH --uid=0"], "name: must be up to 40 letters"),
        (
            ["tiny.yaml", "--scheduler", "slurm", "--pretrain.epochs", "0"],
            "command line: pretrain.epochs: must be over 0",
        ),
        (["tiny.yaml", "--scheduler", "slurm", "--compression", "{method: pqq}"], "compression.method: must be one of"),
        (["tiny.yaml", "--scheduler", "kubernetes", "--dryrun", "--partition", "x"], "must go with --scheduler slurm"),
        (
            ["tiny.yaml", "--scheduler", "kubernetes", "--dryrun", "--cfg", "quue=x"],
            "must have the option, got ['quue']",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(config, capsys, arguments, message):
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and message in errors
    assert errors.count("\n") == 1 and errors.startswith("torchrec-compress: error: ")


def test_help_says_what_ctrl_c_does(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "Ctrl-C" in out and "--max-restarts" in out


def test_options_of_either_kind_stand_in_any_order():
    options, training = parse(["a.yaml", "--seed", "3", "-j", "1:2x4", "--env", "A=b=c", "--scheduler", "slurm"])
    assert (options.j, options.env, options.python) == ("1:2x4", {"A": "b=c"}, sys.executable)
    assert training == ["a.yaml", "--seed", "3"]
    assert parse(["a.yaml", "--scheduler", "kubernetes"])[0].python == "python"


def test_a_dryrun_submits_nothing(config, capsys):
    status, out, _ = run(capsys, config, "--scheduler", "kubernetes", "-j", "2x8", "--dryrun", "--seed", "3")
    assert status == 0
    found, manifest = out.split("apiVersion", 1)
    assert "ok   plan       16 ranks; the fullest holds" in found and "skip cluster    not asked: --dryrun" in found
    (job,) = yaml.safe_load_all("apiVersion" + manifest)
    assert len(job["spec"]["tasks"]) == 2 and job["spec"]["queue"] == "default"


def test_torchxconfig_fills_in_what_the_command_line_leaves_out(config, capsys):
    Path(".torchxconfig").write_text("[kubernetes]\nqueue = night\n")
    assert "queue: night" in run(capsys, config, "--scheduler", "kubernetes", "--dryrun")[1]
    arguments = (config, "--scheduler", "kubernetes", "--dryrun", "--cfg", "queue=day")
    assert "queue: day" in run(capsys, *arguments)[1]


def test_the_example_of_a_torchxconfig_is_read(config, capsys):
    example = Path(__file__).parents[2] / "launch" / "example.torchxconfig"
    Path(".torchxconfig").write_text(example.read_text())
    assert "--time=04:00:00" in run(capsys, config, "--scheduler", "slurm", "-j", "1x1", "--dryrun")[1]


def test_a_model_that_does_not_fit_is_not_submitted(config, capsys):
    arguments = ["--data.generator.num_users", "100000000", "--scheduler", "kubernetes", "--dryrun"]
    status, out, errors = run(capsys, config, *arguments, "--gpu", "1", "-j", "1x1", "--hbm", "1GB", "--memory", "2000")
    assert status == 1 and "apiVersion" not in out
    assert "FAIL plan       on 1 ranks: " in out and "->" in out
    assert errors == "torchrec-compress: error: launch: a check failed; nothing was submitted\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["--compression", "{usr: {method: int8}, '*': {method: int8}}"],
            "compression: every key must fit a table, got ['usr']",
        ),
        (["--compression", "{method: pq, num_codes: 3}"], "embedding_dim must be a multiple of num_codes = 3"),
        (["--data.tail_tables", "[usr]"], "data.tail_tables: must name tables"),
        (["--model.embedding_dim", "6"], "model.embedding_dim: must be a multiple of 4"),
    ],
)
def test_settings_that_fit_no_table_are_not_submitted(config, capsys, wrong, said):
    status, out, errors = run(capsys, config, "--scheduler", "kubernetes", "--dryrun", *wrong)
    assert status == 1 and "FAIL config" in out and said in out and "apiVersion" not in out
    assert errors == "torchrec-compress: error: launch: a check failed; nothing was submitted\n"


def test_tables_in_the_memory_of_the_host_are_told(config, capsys):
    arguments = ["--data.generator.num_users", "100000000", "--scheduler", "kubernetes", "--dryrun"]
    _, out, _ = run(capsys, config, *arguments, "--gpu", "1", "-j", "1x1", "--hbm", "1GB", "--memory", "64000")
    assert "ok   plan" in out and "GiB of its host's memory" in out


def test_an_elastic_job_is_planned_for_its_fewest_nodes(config, capsys):
    out = run(capsys, config, "--scheduler", "kubernetes", "--dryrun", "-j", "1:4x2")[1]
    assert "ok   plan       2 ranks" in out


def test_without_slurm_the_remedy_is_named(config, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    status, out, _ = run(capsys, config, "--scheduler", "slurm", "-j", "2x1")
    assert status == 1
    assert "FAIL partition  no sbatch, sinfo, scontrol, srun on PATH" in out and "--scheduler local_cwd" in out


def test_an_output_that_cannot_be_written_is_found_first(config, capsys):
    Path("file").write_text("")
    status, out, _ = run(capsys, config, "--scheduler", "local_cwd", "--output", "file/run")
    assert status == 1 and "FAIL output     file/run: Not a directory" in out


def test_a_taken_port_is_found_and_another_is_proposed():
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        found = preflight.check_port(taken.getsockname()[1])
        assert found.outcome == "FAIL" and found.remedy.startswith("--rdzv-port ")
    assert preflight.check_port(int(found.remedy.split()[1])).outcome == "ok"


def test_an_interpreter_without_the_package_is_found(config, capsys, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torchrec_compress' >&2\nexit 1\n")
    fake.chmod(0o755)
    status, out, _ = run(capsys, config, "--scheduler", "local_cwd", "--python", str(fake))
    assert status == 1 and "FAIL node       ModuleNotFoundError: no torchrec_compress" in out


def test_a_partition_is_judged_by_its_nodes(config, monkeypatch):
    text = "gpu*|up|4|64+|512000|gpu:h100:8(S:0-1)\nold|down|8|16|64000|(null)\nsmall|up|2|4|8000|(null)\n"
    monkeypatch.setattr(slurm, "missing_commands", list)
    monkeypatch.setattr(slurm, "node_groups", lambda: slurm.parse_node_groups(text))

    def look(j: str, *more: str) -> preflight.Finding:
        options, training = parse([config, "--scheduler", "slurm", "-j", j, *more])
        resource = build(options, training).roles[0].resource
        return preflight.check_partition(options, preflight.Job(parse_shape(j), resource, config))

    assert look("4x8", "--gpu", "8").outcome == "ok"
    assert "gpu has 4 of 5 nodes" in look("5x8", "--gpu", "8").detail
    assert "old is down" in look("1x1", "--partition", "old").detail
    assert "small has 0 of 1 nodes with 8 CPUs" in look("1x8", "--partition", "small").detail
    assert "did you mean 'small'" in look("1x1", "--partition", "smaller").detail
    assert look("1x1", "--partition", "none").remedy == "--partition gpu|old|small"


def test_the_state_of_a_job_is_that_of_all_its_components():
    line = "JobId={} JobState={} Reason={} Restarts={} ExitCode={}"
    both = [line.format(7, "COMPLETED", "None", 0, "0:0"), line.format(8, "RUNNING", "None", 1, "0:0")]
    assert slurm.parse_job("\n".join(both)) == slurm.JobState("RUNNING", "", 1, "0:0")
    both[1] = line.format(8, "FAILED", "NonZeroExitCode", 0, "1:0")
    found = slurm.parse_job("\n".join(both))
    assert found == slurm.JobState("FAILED", "NonZeroExitCode", 0, "1:0") and found.ended
    with pytest.raises(OSError, match="must print the state of the job"):
        slurm.parse_job("")


def test_logs_are_read_as_they_grow_and_when_they_start_over(tmp_path):
    tail = Tail(tmp_path, "*.log")
    assert tail.lines() == []
    log = tmp_path / "a.log"
    log.write_text("[0]:one\n[1]:two\n[0]:par")
    assert of_rank_0(tail.lines()) == ["one"]
    with log.open("a") as file:
        file.write("tial\n[0]: 10%\r[0]: 20%\n")
    assert tail.lines() == ["[0]:partial", "[0]: 20%"]
    log.write_text("[0]:again\n")
    assert tail.lines() == ["[0]:again"]


def test_the_first_traceback_is_the_reason(tmp_path):
    trace = "[{}]:Traceback (most recent call last):\n[{}]:ValueError: {}\n"
    (tmp_path / "1.log").write_text(trace.format(1, 1, "cause") + "[0]:noise\n")
    (tmp_path / "0.log").write_text(trace.format(0, 0, "Connection closed by peer"))
    os.utime(tmp_path / "1.log", (1, 1))
    assert error_report(sorted(tmp_path.glob("*")))[-1] == "[1]:ValueError: cause"
    (tmp_path / "1.log").write_text("[1]:torchrec-compress: error: cause\n")
    (tmp_path / "0.log").write_text("torchrun's own report\n")
    assert error_report(sorted(tmp_path.glob("*"))) == ["[1]:torchrec-compress: error: cause"]
    assert error_report([]) == []
