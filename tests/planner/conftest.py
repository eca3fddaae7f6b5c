"""Process groups of two and four ranks for the tests that measure."""

from collections.abc import Iterator

import pytest

from tests.sharding.ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request) -> Iterator[Ranks]:
    group = Ranks(request.param)
    yield group
    group.stop()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for machines with kernels, whatever the suite runs on."""
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "auto")
