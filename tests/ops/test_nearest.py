"""Nearest centroids and their sums: the C++ kernels and PyTorch against brute force in float64."""

import pytest
import torch

from torchrec_compress.ops import centroid_sums, nearest_with_distance
from torchrec_compress.ops.dispatch import cpp_serves


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and not cpp_serves("auto"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize(
    ("num_points", "num_centroids", "width"),
    [(0, 3, 2), (1, 1, 1), (95, 64, 3), (97, 65, 8), (777, 1000, 17), (5000, 256, 8), (200, 4096, 64)],
)
@pytest.mark.parametrize("middle", [0.0, 1000.0])
def test_nearest_is_that_of_brute_force(
    backend: str, num_points: int, num_centroids: int, width: int, middle: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    points = middle + torch.randn(num_points, width, generator=generator)
    centroids = middle + torch.randn(num_centroids, width, generator=generator)
    index, distance = nearest_with_distance(points, centroids)
    squares = (points.double()[:, None] - centroids.double()).square().sum(dim=2)
    least = squares.min(dim=1).values
    assert index.dtype == torch.int64 and distance.dtype == torch.float32
    torch.testing.assert_close(squares.gather(1, index[:, None])[:, 0], least, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(distance.double(), least, rtol=1e-4, atol=1e-4)


def test_of_equal_centroids_the_first_is_nearest_and_a_copy_is_at_no_distance(backend: str) -> None:
    some = torch.randn(150, 5, generator=torch.Generator().manual_seed(0))
    index, distance = nearest_with_distance(some, torch.cat([some, some]))
    assert torch.equal(index, torch.arange(150))
    assert not distance.any()


def test_columns_of_a_wider_table_and_blocks_of_points_give_the_same(backend: str) -> None:
    wide = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    centroids = torch.randn(70, 8, generator=torch.Generator().manual_seed(1))
    whole = nearest_with_distance(wide[:, 8:16].contiguous(), centroids)
    view = nearest_with_distance(wide[:, 8:16], centroids)
    assert torch.equal(view[0], whole[0]) and torch.equal(view[1], whole[1])
    parts = torch.cat([nearest_with_distance(block, centroids)[0] for block in wide[:, 8:16].split(64)])
    assert torch.equal(parts, whole[0])
    turned = wide[:, 8:16].T.contiguous().T
    assert torch.equal(nearest_with_distance(turned, centroids)[0], whole[0])


def test_sums_are_those_of_float64(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(70000, 6, generator=generator)[:, 1:4], torch.rand(70000, generator=generator)
    index = torch.randint(9, (70000,), generator=generator)
    sums, mass = centroid_sums(index, values, weights, 11)
    expected = torch.zeros(11, 3, dtype=torch.float64)
    expected.index_add_(0, index, values.double() * weights.double()[:, None])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(mass, torch.bincount(index, weights.double(), minlength=11), rtol=1e-12, atol=1e-9)
    assert not sums[9:].any() and not mass[9:].any()


def test_an_index_out_of_range_is_refused() -> None:
    if not cpp_serves("auto"):
        pytest.skip("no C++ compiler")
    with pytest.raises(ValueError, match=r"centroid_sums: index must be in \[0, 2\), got 2"):
        torch.ops.torchrec_compress.centroid_sums(torch.tensor([0, 2]), torch.ones(2, 1), torch.ones(2), 2)
