"""Every test runs on one thread, from one seed, with uninitialised memory filled with NaN."""

import logging
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist

from tests.sharding.ranks import Ranks

# the same examples on every machine: a failure in CI is a failure at home
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)

# a cluster, or jobs of many processes that a test kills at a chosen moment: one at a time, wherever they stand
_JOBS = ("tests/launch/", "tests/train/test_ranks.py")


def _group(nodeid: str) -> str:
    """Return what a worker runs in one go, and another worker none of: a file, or all the jobs."""
    return "jobs" if nodeid.startswith(_JOBS) else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out groups in the order of collection; `pytest -n 2` needs no further option, and another --dist is kept."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let a worker begin with the jobs, the group that takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _group(item.nodeid) != "jobs")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def as_before() -> Iterator[None]:
    """End a process group that a file's tests have begun, and undo what they did to loggers."""
    known = {name: getattr(logger, "level", logging.NOTSET) for name, logger in logging.root.manager.loggerDict.items()}
    level, filters = logging.root.level, list(logging.root.filters)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    logging.root.setLevel(level)
    logging.root.filters[:] = filters
    for name, before in known.items():
        logger = logging.root.manager.loggerDict[name]
        if isinstance(logger, logging.Logger) and logger.level != before:
            logger.setLevel(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN (and integers with their largest value), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """A process group of two ranks, shared by all tests."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """A process group of four ranks, shared by all tests."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
