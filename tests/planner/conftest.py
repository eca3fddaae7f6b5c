"""Process groups of two and four ranks for the tests that measure."""

import pytest

from tests.sharding.ranks import Ranks


@pytest.fixture(params=["two_ranks", "four_ranks"])
def ranks(request) -> Ranks:
    """Return one of the process groups of all tests."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for machines with kernels, whatever the suite runs on."""
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "auto")
