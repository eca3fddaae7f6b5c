"""Every test runs on one thread, from one seed, with uninitialised memory filled with NaN."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.sharding.ranks import Ranks

# the same examples on every machine: a failure in CI is a failure at home
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
