from collections.abc import Iterator

import pytest

from tests.sharding.ranks import Ranks


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    """A process group of one rank, shared by all tests."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()
