"""Process groups of two and four ranks for the tests that measure."""

from collections.abc import Iterator

import pytest

from tests.sharding.ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request) -> Iterator[Ranks]:
    group = Ranks(request.param)
    yield group
    group.stop()
