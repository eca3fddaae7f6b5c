"""Weighted k-means: the one clustering routine under product, residual and MEC codes.

Start: greedy weighted k-means++ (Arthur & Vassilvitskii, SODA 2007) in rounds. Then weighted Lloyd iterations; a
cluster that loses its last point restarts on the point that is served worst. Then one final assignment of all points.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_compress.fit.checks import check_rows, check_seed, check_weights
from torchrec_compress.fit.codes import CHUNK_ROWS, weighted_error
from torchrec_compress.ops import BLOCK_FLOATS, centroid_sums, nearest_with_distance

# Multiplications of one pass over all points and centroids below which one thread chooses the first centroids.
ONE_THREAD_WORK = 2**28
SEED_POINTS_PER_CENTROID = 16
MIN_SEED_WORK = 2**20  # points times centroids: few centroids are started on many points
MIN_TRAIN_POINTS = 65536
TOLERANCE = 1e-5


@dataclass(frozen=True)
class KMeans:
    """Result of `kmeans`.

    Attributes:
        centroids: [K, d] float32.
        assignment: [N] int64, the nearest centroid of every point.
        error: weighted mean squared error over all points (`codes.weighted_error`).
    """

    centroids: Tensor
    assignment: Tensor
    error: float


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each point (squared Euclidean), the first one among equals.

    Args:
        points: [N, d] float32.
        centroids: [K, d] float32.

    Returns:
        [N] int64.

    Example:
        >>> nearest(torch.tensor([[0.9], [0.1]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    return nearest_with_distance(points, centroids)[0]


def sample_points(weights: Tensor, num_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a weighted sample without replacement that stands for the whole (priority sampling).

    Duffield, Lund, Thorup (J. ACM 2007): with u_i uniform, keep the `num_points` largest priorities w_i / u_i; a kept
    point weighs max(w_i, t), t the largest priority left out. Every weighted sum is estimated without bias; points
    heavier than t are all kept, with their own weight. So a hot row is never lost and a cold one stands for its kind.
    Weights are walked over once, in blocks: nothing of the size of all of them is made.

    Args:
        weights: [N] float32 >= 0.
        num_points: points to keep, < N.
        generator: on the CPU, so that one seed gives one sample on every device.

    Returns:
        index [num_points] int64, ascending, and the sample's weights [num_points] float32.

    Example:
        >>> index, new = sample_points(torch.tensor([1.0, 1.0, 100.0]), 2, torch.Generator().manual_seed(0))
        >>> 2 in index, float(new[index == 2])
        (True, 100.0)
    """
    priorities, places, least = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)], -1.0
    for first in range(0, len(weights), CHUNK_ROWS):
        mine = weights[first : first + CHUNK_ROWS].to("cpu", torch.float64)
        priority = mine / (1 - torch.rand(len(mine), dtype=torch.float64, generator=generator))  # by (0, 1]
        found = (priority > least).nonzero().flatten()
        priorities.append(priority[found])
        places.append(found + first)
        # what is sampled, and the largest one left out, are among as many of what was seen so far
        if sum(map(len, places)) > max(2 * num_points, CHUNK_ROWS) and first + CHUNK_ROWS < len(weights):
            priority, place = torch.cat(priorities), torch.cat(places)
            kept, _ = _largest(priority, num_points + 1)
            priorities, places = [priority[kept]], [place[kept]]
            least = float(priorities[0].min())
    kept, threshold = _largest(torch.cat(priorities), num_points)
    index = torch.cat(places)[kept].to(weights.device)
    return index, weights[index].clamp(min=threshold)


def _largest(values: Tensor, num_values: int) -> tuple[Tensor, float]:
    """Return whether each is among so many largest ones, of equal ones the first, and the largest one left out."""
    left_out = values.kthvalue(len(values) - num_values).values
    kept = values > left_out
    equal = (values == left_out).nonzero().flatten()  # as those of weight 0
    kept[equal[: num_values - int(kept.sum())]] = True
    return kept, float(left_out)


def train_size(num_clusters: int, max_points_per_centroid: int) -> int:
    """Return the most points that centroids are trained on: max_points_per_centroid * K, but at least 65,536.

    The excess error of centroids trained on n points is about K / n of the error: .4 % at 256 points a centroid.
    """
    return max(MIN_TRAIN_POINTS, max_points_per_centroid * num_clusters)


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> KMeans:
    """Cluster weighted points.

    Where N is larger than `train_size`, the centroids are trained on a `sample_points` sample of that size; the
    assignment and the error are always those of all points. Iterations stop early once the error falls by less than
    a relative 1e-5.

    Args:
        points: [N, d] float32, finite.
        num_clusters: K, at most N.
        weights: [N] >= 0, not all zero; None for equal weights. A point of weight 0 is assigned but pulls nothing.
        num_iterations: the most Lloyd iterations, >= 0.
        max_points_per_centroid: the sample's size per centroid (a sample below 65,536 points would save nothing).
        seed: the result is a pure function of the arguments and this number (per machine and thread count:
            sums in another order may round otherwise).

    Returns:
        `KMeans`.

    Raises:
        ValueError: points NaN or infinite, weights negative, NaN or all zero, or K outside [1, N].

    Example:
        >>> result = kmeans(torch.tensor([[0.0], [2.0], [10.0]]), 2)
        >>> sorted(result.centroids.flatten().tolist()), round(result.error, 4)
        ([1.0, 10.0], 0.6667)
    """
    centroids = learn_centroids(
        points,
        num_clusters,
        weights=weights,
        num_iterations=num_iterations,
        max_points_per_centroid=max_points_per_centroid,
        seed=seed,
    )
    weights = check_weights("kmeans", weights, len(points), points.device)
    assignment = nearest(points, centroids)
    return KMeans(centroids, assignment, weighted_error(points, centroids[assignment], weights))


def learn_centroids(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> Tensor:
    """Return the centroids of `kmeans`, [K, d] float32, and assign no point; arguments and errors as there."""
    seed = check_seed("kmeans", seed)
    check_rows("kmeans", points)
    if not 1 <= num_clusters <= len(points):
        raise ValueError(
            f"kmeans: num_clusters must be in [1, number of points], got K = {num_clusters} and {len(points)} points; "
            "lower num_clusters"
        )
    if num_iterations < 0 or max_points_per_centroid < 1:
        raise ValueError(
            "kmeans: num_iterations must be >= 0 and max_points_per_centroid >= 1, "
            f"got {num_iterations} and {max_points_per_centroid}"
        )
    weights = check_weights("kmeans", weights, len(points), points.device)
    generator = torch.Generator().manual_seed(seed)
    train, train_weights = points, weights
    num_train = train_size(num_clusters, max_points_per_centroid)
    if len(points) > num_train:
        index, train_weights = sample_points(weights, num_train, generator)
        train = points[index]
    with threads_for(len(train), num_clusters, points.shape[1]):
        centroids = start_centroids(train, train_weights, num_clusters, generator)
    return _lloyd(train, train_weights, centroids, num_iterations)


@contextmanager
def threads_for(num_points: int, num_clusters: int, width: int) -> Iterator[None]:
    """Choose first centroids on one thread where that is short, on torch's threads otherwise.

    Threads meet several times in each of the many rounds. Where a round takes a millisecond that saves little on an
    idle machine, and on a busy one each meeting waits for a time slice (measured: 10 ms). Assigning points to centroids
    is one meeting, and keeps all threads.
    """
    num_threads = torch.get_num_threads()
    if num_points * num_clusters * width <= ONE_THREAD_WORK:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def start_centroids(points: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Choose K points as first centroids by greedy weighted k-means++, on a sample of max(16 K, 2^20 / K) points.

    Each round draws candidates with probability w_i * distance_i^2, 2 + log K for each centroid it adds, and keeps
    those that lower the error most. A round adds one centroid up to 1,024 chosen, then 1/512 of those chosen: so the
    number of rounds grows with log K and 65,536 centroids are affordable.

    Args:
        points: [N, d] float32.
        weights: [N] float32 >= 0.
        num_clusters: K <= N.
        generator: on the CPU.

    Returns:
        [K, d] float32, rows of `points`.
    """
    num_seed = max(SEED_POINTS_PER_CENTROID * num_clusters, MIN_SEED_WORK // num_clusters)
    if len(points) > num_seed:
        index, weights = sample_points(weights, num_seed, generator)
        points = points[index]
    chosen = _draw(weights, 1, generator)
    norms = points.square().sum(dim=1)
    distance = (points - points[chosen]).square().sum(dim=1)
    num_trials = 2 + int(math.log(num_clusters))
    while len(chosen) < num_clusters:
        size = min(max(1, len(chosen) // 512), num_clusters - len(chosen))
        potential = weights * distance
        if not (
            potential > 0
        ).any():  # every weighted point is a centroid already: serve the others, then repeat points
            potential = distance if (distance > 0).any() else torch.ones_like(distance)
        candidates = _draw(potential, size * num_trials, generator)
        new, distance = _best(points, norms, weights, distance, candidates, size)
        chosen = torch.cat([chosen, new])
    return points[chosen]


def _draw(probabilities: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draw indices with replacement in proportion to [N] probabilities >= 0; distinct ones, in the order of drawing."""
    cumulative = probabilities.to("cpu", torch.float64).cumsum(0)
    uniform = torch.rand(num_draws, dtype=torch.float64, generator=generator) * cumulative[-1]
    # right=True never lands on an index of probability 0; the clamp guards rounding at the top end.
    index = torch.searchsorted(cumulative, uniform, right=True)
    last = int(torch.searchsorted(cumulative, cumulative[-1]))
    return torch.tensor(list(dict.fromkeys(index.clamp(max=last).tolist())), device=probabilities.device)


def _best(
    points: Tensor, norms: Tensor, weights: Tensor, distance: Tensor, candidates: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Keep the `size` candidates [C] that lower the weighted error most, each taken alone; and the new distances."""
    block = max(1, BLOCK_FLOATS // len(points))
    if len(candidates) > block:
        left = torch.cat([weights @ _distances(points, norms, some, distance) for some in candidates.split(block)])
        new = candidates[torch.sort(left, stable=True).indices[:size]]
        return new, torch.minimum(distance, nearest_with_distance(points, points[new])[1])
    squares = _distances(points, norms, candidates, distance)
    best = torch.sort(weights @ squares, stable=True).indices[:size]
    return candidates[best], squares[:, best].amin(dim=1)


def _distances(points: Tensor, norms: Tensor, candidates: Tensor, distance: Tensor) -> Tensor:
    """Return the squared distances [N, C] to each candidate, or the present `distance` where that is smaller."""
    some = points[candidates]
    squares = torch.addmm(norms[:, None] + norms[candidates], points, some.T, alpha=-2).clamp_(min=0)
    squares[candidates, torch.arange(len(candidates), device=points.device)] = 0  # to itself: exactly
    return torch.minimum(squares, distance[:, None], out=squares)


def _lloyd(points: Tensor, weights: Tensor, centroids: Tensor, num_iterations: int) -> Tensor:
    """Run weighted Lloyd iterations; return the centroids."""
    previous = math.inf
    whole = float(torch.dot(weights.to(torch.float64), points.to(torch.float64).square().sum(dim=1)))
    for _ in range(num_iterations):
        assignment, distance = nearest_with_distance(points, centroids)
        sums, mass = centroid_sums(assignment, points, weights, len(centroids))
        # sum_i w_i ||x_i - c||^2 from the sums that the means need anyway, in float64
        exact = centroids.to(torch.float64)
        error = max(0.0, whole - float((2 * sums * exact).sum() - (mass[:, None] * exact.square()).sum()))
        if previous - error <= TOLERANCE * error:
            break
        previous = error
        means = (sums / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(centroids.dtype)
        empty = (mass == 0).nonzero().flatten()
        centroids = torch.where(mass[:, None] > 0, means, centroids)
        if len(empty):
            potential = weights * distance
            worst = torch.sort(potential, descending=True, stable=True).indices[: len(empty)]
            worst = worst[potential[worst] > 0]  # a point served exactly needs no second centroid
            centroids[empty[: len(worst)]] = points[worst]
    return centroids
