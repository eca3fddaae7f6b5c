"""Weighted k-means: as good as the libraries', weighted, deterministic, no cluster lost."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

from torchrec_compress.fit.codes import weighted_error
from torchrec_compress.fit.kmeans import (
    _lloyd,
    kmeans,
    nearest,
    nearest_with_distance,
    sample_points,
    start_centroids,
    train_size,
)


def clouds(num_points: int, width: int, num_clouds: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(num_clouds, width, generator=generator)
    choice = torch.randint(num_clouds, (num_points,), generator=generator)
    return centres[choice] + torch.randn(num_points, width, generator=generator)


def skewed_weights(num_points: int) -> torch.Tensor:
    return 1000 / torch.arange(1, num_points + 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("width", "num_clusters"), [(8, 256), (16, 64)])
def test_error_within_one_percent_of_sklearn(weighted: bool, width: int, num_clusters: int) -> None:
    points = clouds(6000, width, 2 * num_clusters)
    weights = skewed_weights(6000) if weighted else None
    theirs = SklearnKMeans(num_clusters, n_init=1, random_state=0).fit(
        points.numpy(), sample_weight=None if weights is None else weights.numpy()
    )
    reconstruction = torch.from_numpy(theirs.cluster_centers_[theirs.labels_])
    ours = kmeans(points, num_clusters, weights=weights)
    assert ours.error <= 1.01 * weighted_error(points, reconstruction, weights)


def test_error_within_one_percent_of_faiss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faiss = pytest.importorskip("faiss", reason="only `make bench` installs faiss")
    points = clouds(20000, 8, 300)
    theirs = faiss.Kmeans(8, 256, niter=25, seed=1)
    theirs.train(points.numpy())
    choice = theirs.index.search(points.numpy(), 1)[1][:, 0]
    assert kmeans(points, 256).error <= 1.01 * weighted_error(points, torch.from_numpy(theirs.centroids[choice]))


def test_error_is_that_of_the_assignment_and_the_assignment_is_nearest() -> None:
    points, weights = clouds(1000, 3, 20), skewed_weights(1000)
    result = kmeans(points, 16, weights=weights, seed=3)
    distance = torch.cdist(points.double(), result.centroids.double()).square()
    assert torch.equal(result.assignment, distance.argmin(dim=1))
    by_hand = float((distance.min(dim=1).values * weights).sum() / weights.double().sum() / 3)
    assert result.error == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("num_centroids", [1, 3, 63, 1000])
def test_nearest_far_from_the_origin(num_centroids: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points = 1000 + torch.randn(1001, 5, generator=generator)
    centroids = 1000 + torch.randn(num_centroids, 5, generator=generator)
    index, distance = nearest_with_distance(points, centroids)
    exact = torch.cdist(points.double(), centroids.double()).square()
    assert torch.equal(nearest(points, centroids), index)
    torch.testing.assert_close(exact.gather(1, index[:, None])[:, 0], exact.min(dim=1).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(distance.double(), exact.min(dim=1).values, rtol=1e-3, atol=1e-3)


def test_heavy_rows_are_served_better() -> None:
    points = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(4000)
    weights[:200] = 100.0
    plain, weighted = kmeans(points, 64), kmeans(points, 64, weights=weights)
    heavy = slice(0, 200)
    plain_error = weighted_error(points[heavy], plain.centroids[plain.assignment[heavy]])
    assert weighted_error(points[heavy], weighted.centroids[weighted.assignment[heavy]]) < 0.6 * plain_error


def test_weights_count_as_repetition() -> None:
    points, times = clouds(300, 2, 4), torch.randint(1, 5, (300,), generator=torch.Generator().manual_seed(0))
    weighted = kmeans(points, 4, weights=times.float(), num_iterations=100)
    repeated = kmeans(points.repeat_interleave(times, dim=0), 4, num_iterations=100)
    assert weighted.error == pytest.approx(repeated.error, rel=1e-2)


def test_sampling_keeps_the_error() -> None:
    points = clouds(80000, 4, 30)
    assert len(points) > train_size(16, 1)
    sampled, whole = kmeans(points, 16, max_points_per_centroid=1), kmeans(points, 16, max_points_per_centroid=10**6)
    assert sampled.error <= 1.03 * whole.error
    assert len(sampled.assignment) == len(points)


def test_sample_is_unbiased_and_keeps_heavy_points() -> None:
    weights = skewed_weights(5000)
    values = torch.arange(5000) % 7
    sums = []
    for seed in range(200):
        index, new = sample_points(weights, 500, torch.Generator().manual_seed(seed))
        assert len(index.unique()) == 500
        assert set(range(20)) <= set(index.tolist())
        assert torch.equal(new[:20], weights[:20])
        sums.append(float((new * values[index]).sum()))
    assert np.mean(sums) == pytest.approx(float((weights * values).sum()), rel=5e-3)


def test_a_light_point_of_a_sample_weighs_the_largest_priority_left_out() -> None:
    weights = torch.tensor([1.0, 1.0, 1.0, 100.0])
    index, new = sample_points(weights, 2, torch.Generator().manual_seed(0))
    uniform = 1 - torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left_out = (weights / uniform).sort(descending=True).values[2]
    assert index.tolist()[1] == 3 and new.tolist() == [pytest.approx(float(left_out)), 100.0]


def test_centroids_are_trained_on_256_points_each_but_on_65536_at_least() -> None:
    assert [train_size(size, 256) for size in (1, 256, 257, 1000)] == [65536, 65536, 65792, 256000]


def test_sample_takes_points_of_weight_zero_last() -> None:
    weights = torch.zeros(100)
    weights[[3, 50]] = 2.0
    index, new = sample_points(weights, 10, torch.Generator().manual_seed(0))
    assert {3, 50} <= set(index.tolist())
    assert float(new.sum()) == 4.0


def test_same_seed_same_result_and_global_generator_untouched() -> None:
    points = clouds(70000, 4, 10)
    before = torch.get_rng_state()
    first, again, other = kmeans(points, 8, seed=5), kmeans(points, 8, seed=5), kmeans(points, 8, seed=6)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignment, again.assignment)
    assert not torch.equal(first.centroids, other.centroids)
    assert torch.equal(before, torch.get_rng_state())


def test_training_on_one_thread_leaves_the_callers_threads_as_they_were() -> None:
    torch.set_num_threads(2)
    try:
        kmeans(clouds(100, 2, 4), 4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_as_many_clusters_as_points() -> None:
    points = clouds(50, 3, 5)
    result = kmeans(points, 50)
    assert result.error < 1e-10
    assert len(result.assignment.unique()) == 50


def test_fewer_distinct_points_than_clusters() -> None:
    points = torch.tensor([[0.0], [1.0]]).repeat(20, 1)
    result = kmeans(points, 5)
    assert result.error == 0.0
    assert torch.isfinite(result.centroids).all()


def test_points_of_weight_zero_get_the_centroids_left_over() -> None:
    points = torch.arange(10.0)[:, None]
    weights = torch.zeros(10)
    weights[0] = 1.0
    result = kmeans(points, 10, weights=weights)
    assert result.error == 0.0
    assert len(result.assignment.unique()) == 10


def test_no_cluster_stays_empty() -> None:
    points = clouds(3000, 4, 3)
    assert len(kmeans(points, 200).assignment.unique()) == 200


@pytest.mark.parametrize(("weights", "served_worst"), [([1.0, 1.0, 1.0], 5.0), ([1.0, 30.0, 1.0], 1.0)])
def test_a_centroid_that_serves_nothing_moves_to_the_point_that_is_served_worst(weights, served_worst) -> None:
    points, start = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [100.0]])
    assert float(_lloyd(points, torch.tensor(weights), start, 1)[1]) == served_worst


def test_start_centroids_are_distinct_points_and_better_than_random_ones() -> None:
    points, weights = clouds(3000, 4, 100), torch.ones(3000)
    start = start_centroids(points, weights, 100, torch.Generator().manual_seed(0))
    assert len(start.unique(dim=0)) == 100
    chance = points[torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:100]]
    assert nearest_with_distance(points, start)[1].mean() < 0.8 * nearest_with_distance(points, chance)[1].mean()


def test_wide_k_in_rounds() -> None:
    points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    result = kmeans(points, 4096, num_iterations=2)
    assert result.centroids.shape == (4096, 2)
    assert len(result.centroids.unique(dim=0)) == 4096


@pytest.mark.parametrize(
    ("points", "num_clusters", "options", "message"),
    [
        (torch.zeros(3, 2), 4, {}, r"kmeans: num_clusters must be in \[1, number of points\], got K = 4 and 3 points"),
        (torch.zeros(3, 2), 0, {}, "got K = 0"),
        (torch.zeros(3, 2), 1, {"num_iterations": -1}, "num_iterations must be >= 0 .* got -1"),
        (torch.zeros(3, 2), 1, {"max_points_per_centroid": 0}, "max_points_per_centroid >= 1, got 25 and 0"),
        (torch.zeros(3, 2), 1, {"weights": torch.tensor([1.0, -1.0, 1.0])}, "got -1.0 for row 1"),
        (torch.tensor([[0.0], [float("nan")]]), 1, {}, "got NaN or infinity in row 1"),
    ],
)
def test_bad_input(points: torch.Tensor, num_clusters: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(points, num_clusters, **options)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-3, 1.0, 5.0]), min_size=2, max_size=30).filter(any),
    st.data(),
)
def test_a_sample_is_the_largest_priorities_and_of_equal_ones_the_first(weights, data):
    weights = torch.tensor(weights)
    size = data.draw(st.integers(1, len(weights) - 1))
    uniform = 1 - torch.rand(len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.sort(weights.double() / uniform, descending=True, stable=True)
    index, new = sample_points(weights, size, torch.Generator().manual_seed(3))
    assert torch.equal(index, order.indices[:size].sort().values)
    assert torch.equal(new, weights[index].clamp(min=float(order.values[size])))
