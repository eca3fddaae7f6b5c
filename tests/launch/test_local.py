"""The real training on this machine's processes, as a user starts it and stops it."""

import signal

import pytest

from tests.launch.training import Launch, assert_equal, metrics, wait_for_checkpoint, workers, write_config

pytestmark = pytest.mark.slow
LOCAL = ("--scheduler", "local_cwd", "-j", "1x2")


def test_a_job_that_is_interrupted_saves_and_the_same_command_continues_it(alone, tmp_path):
    config = write_config("dense", tmp_path)
    launch = Launch(config, *LOCAL)
    wait_for_checkpoint(tmp_path / "run")
    launch.process.send_signal(signal.SIGINT)
    assert launch.end() == 1
    assert launch.lines[-1].endswith(": cancelled; the same command continues it")
    assert not (tmp_path / "run" / "summary.json").exists() and workers(tmp_path / "run") == []
    launch = Launch(config, *LOCAL)
    assert launch.end() == 0, launch.text()
    assert launch.lines[-1] == f"{launch.handle()}: SUCCEEDED"
    assert_equal(metrics(tmp_path / "run"), alone("dense"))
