"""The real training over two hosts with networks of their own, and the loss of one of them."""

import sys

import pytest
from torchx.specs import macros

from tests.launch.hosts import NAMES, Hosts, why_not
from tests.launch.training import SECONDS, assert_equal, kill, metrics, wait_for_checkpoint, write_config
from torchrec_compress.launch.components import dlrm

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(f"no hosts of their own: {reason}")
    found = Hosts(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.stop()


class Nodes:
    """The component's command on both hosts.

    Args:
        hosts: where it runs.
        config: of the training.
        folder: for logs.
        options: of the component.
    """

    def __init__(self, hosts, config, folder, **options):
        (role,) = dlrm(config, j="2x1", python=sys.executable, **options).roles
        self.hosts, self.folder = hosts, folder
        self.roles = [
            macros.Values(img_root="", app_id="job", replica_id=str(number), rank0_env="NODE0").apply(role)
            for number in range(2)
        ]

    def start(self, number):
        role, log = self.roles[number], self.folder / f"node{number}.log"
        return self.hosts.run(number, [role.entrypoint, *role.args], {**role.env, "NODE0": NAMES[0]}, log)

    def logs(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("node?.log")))


def test_a_host_that_is_lost_and_comes_back_leaves_the_metrics_of_one_process(hosts, alone, tmp_path):
    nodes = Nodes(hosts, write_config("dense", tmp_path), tmp_path, max_restarts=2)
    first, second = nodes.start(0), nodes.start(1)
    wait_for_checkpoint(tmp_path / "run")
    kill(hosts.processes_of(1))
    assert second.wait(SECONDS) == -9
    second = nodes.start(1)
    assert [first.wait(SECONDS), second.wait(SECONDS)] == [0, 0], nodes.logs()
    assert_equal(metrics(tmp_path / "run"), alone("dense"))
