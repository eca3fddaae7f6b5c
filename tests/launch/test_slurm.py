"""The real training as a job of a real Slurm: it completes, restarts and resumes."""

import re

import pytest

from tests.launch.cluster import until
from tests.launch.training import (
    SECONDS,
    Launch,
    assert_equal,
    hold,
    kill,
    metrics,
    wait_for_checkpoint,
    workers,
    write_config,
)
from torchrec_compress.launch.slurm import job_state

pytestmark = pytest.mark.slow


def launch_on_slurm(config: str, *options: str) -> Launch:
    """Launch on two nodes, and wait."""
    return Launch(config, "--scheduler", "slurm", "-j", "2x1", "--memory", "3000", "--wait", *options)


def number_of(launch: Launch) -> str:
    """Return the number of a launch's job."""
    return launch.handle().rpartition("/")[2]


def test_a_job_of_two_nodes_completes_with_the_metrics_of_one_process(slurm, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = launch_on_slurm(write_config("dense", tmp_path), "--partition", "test")
    assert launch.end() == 0, launch.text()
    assert "ok   partition  test has 2 nodes with 1 CPUs, 3000 MB, 0 GPUs; 2 wanted" in launch.text()
    assert re.search(r"ok   node       node[01]: torch 2", launch.text())
    assert "test: auc 0." in launch.text()  # a line of rank 0, wherever that ran
    assert launch.lines[-1].endswith(": COMPLETED")
    assert len(list(tmp_path.glob(f"slurm-{number_of(launch)}-dlrm-?.out"))) == 2
    assert_equal(metrics(tmp_path / "run"), alone("dense"))


def restarted(slurm, launch: Launch) -> None:
    """Wait until the job runs for the second time."""

    def runs_again() -> bool:
        slurm.look_again()
        found = job_state(number_of(launch))
        return found is not None and (found.state, found.restarts) == ("RUNNING", 1)

    until(runs_again, SECONDS, launch.text)


def assert_completed(launch: Launch) -> None:
    assert launch.end() == 0, launch.text()
    found = job_state(number_of(launch))
    assert found is not None and (found.state, found.restarts) == ("COMPLETED", 1)
    assert "started again 1 time(s)" in launch.text()


def test_a_job_that_loses_a_node_resumes(slurm, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = launch_on_slurm(write_config("dense", tmp_path), "--max-retries", "1")
    wait_for_checkpoint(tmp_path / "run")
    kill(slurm.on_node("node1", "torchrec_compress train"))
    restarted(slurm, launch)
    assert_completed(launch)
    assert_equal(metrics(tmp_path / "run"), alone("dense"))


def test_a_killed_worker_is_started_again_within_the_job_and_a_requeued_job_resumes(
    slurm, alone, tmp_path, monkeypatch
):
    """A worker dies, torchrun starts all workers again; then Slurm ends the job, which saves, and queues it."""
    monkeypatch.chdir(tmp_path)
    launch = launch_on_slurm(write_config("mec", tmp_path), "--max-restarts", "2", "--max-retries", "0")
    run = tmp_path / "run"
    wait_for_checkpoint(run)
    first = set(workers(run))
    kill([pid for pid in slurm.on_node("node1", "torchrec_compress train") if pid in first])
    until(lambda: len(found := set(workers(run))) == 2 and not found & first, SECONDS, launch.text)
    saved = set(run.glob("**/step*"))  # now, since the first workers may save once more before they are ended
    until(lambda: set(run.glob("**/step*")) - saved, SECONDS, launch.text)
    hold(workers(run))  # in the middle of a stage, where they can save; Slurm wakes them before it asks them to end
    assert not list(run.glob("full/*/summary.json")), "the stage ended before the job could be asked to end"
    found = job_state(number_of(launch))
    assert found is not None and (found.state, found.restarts) == ("RUNNING", 0)
    slurm.ask("scontrol", "requeue", number_of(launch))
    restarted(slurm, launch)
    assert_completed(launch)
    assert "asked to end, saved at step" in launch.text()
    assert_equal(metrics(run), alone("mec"))


def test_a_job_that_fails_says_why(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = launch_on_slurm(write_config("absent", tmp_path))
    assert launch.end() == 1, launch.text()
    assert "skip plan" in launch.text()
    assert re.search(r"\[\d\]:.*error: .*absent.parquet", launch.text())
    assert re.search(r"error: launch: the job ended as FAILED, exit code \d+:\d+; logs: ", launch.lines[-1])


def test_a_wrong_partition_is_found_before_the_job_is_submitted(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config("dense", tmp_path)
    for partition, said in (("tset", "no partition 'tset'. did you mean 'test'?"), ("closed", "closed is down")):
        launch = launch_on_slurm(config, "--partition", partition)
        assert launch.end() == 1
        assert f"FAIL partition  {said}" in launch.text() and "job " not in launch.text()
    assert slurm.ask("squeue", "-h") == ""
