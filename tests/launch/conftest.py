"""One Slurm for all tests, and what the trainings come to in a single process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, search_path, why_not
from tests.launch.training import train_alone


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Return the cluster; Slurm's commands of this process go to it."""
    monkeypatch.setenv("PATH", search_path())
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    return slurm_cluster


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Return a function of a config's name to its metrics when trained in a single process."""
    known: dict[str, dict[str, float]] = {}

    def train(name: str) -> dict[str, float]:
        if name not in known:
            folder: Path = tmp_path_factory.mktemp(f"alone-{name}")
            known[name] = train_alone(name, folder)
        return known[name]

    return train
