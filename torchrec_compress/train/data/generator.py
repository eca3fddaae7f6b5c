"""The embedded click generator: planted structure whose best possible AUC and logloss are known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from torchrec_compress.train.config import GeneratorConfig
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.data.mlperf import MULTI_HOT_SIZES, TABLE_ROWS

_RANK = 4
_NUM_DENSE = 13
CONTEXTS = {"hour": 24, "device": 4, "region": 40}


def generate(config: GeneratorConfig) -> ClickData:
    """Draw clicks of users on items.

    Users and items have Zipf popularity. Each belongs to a latent cluster and has a small deviation of its own, so rows
    of the tables are clustered but not equal; users and items far down the popularity are cold (seen a few times or
    never in train). The log-odds of a click are the product of user and item vectors, item and user biases, an
    interaction of item cluster and hour, and one of region and user cluster. Ids carry no order of popularity.

    Args:
        config: sizes and seed.

    Returns:
        8:1:1 random splits with `probabilities`, the true ones, of every row.

    Raises:
        ValueError: a size that is too small.

    Example:
        >>> data = generate(GeneratorConfig(num_rows=1000, num_users=50, num_items=20))
        >>> data.features, data.vocab
        (['user', 'item', 'hour', 'device', 'region'], [50, 20, 24, 4, 40])
    """
    if config.criteo_rows:
        return _generate_criteo(config)
    if config.multi_hot:
        raise ValueError("data.generator.multi_hot: must be false without data.generator.criteo_rows, got true")
    if min(config.num_rows // 10, config.num_users, config.num_items, config.num_clusters) < 2:
        raise ValueError(f"data.generator: must have at least 20 rows and 2 users, items and clusters, got {config}")
    rng = np.random.default_rng(config.seed)
    users = _popular_ids(rng, config.num_users, config.num_rows, config.zipf)
    items = _popular_ids(rng, config.num_items, config.num_rows, config.zipf)
    contexts = {name: rng.integers(0, size, config.num_rows) for name, size in CONTEXTS.items()}
    user_rows, user_clusters = _clustered(rng, config.num_users, config.num_clusters)
    item_rows, item_clusters = _clustered(rng, config.num_items, config.num_clusters)

    logits = 1.6 * np.einsum("nd,nd->n", user_rows[users], item_rows[items], dtype=np.float32)
    logits += rng.normal(0, 0.25, config.num_users).astype(np.float32)[users]
    logits += rng.normal(0, 0.5, config.num_items).astype(np.float32)[items]
    logits += _pair_effect(rng, config.num_clusters, 24, 0.5)[item_clusters[items], contexts["hour"]]
    logits += _pair_effect(rng, config.num_clusters, 40, 0.4)[user_clusters[users], contexts["region"]]
    logits += rng.normal(0, 0.3, 4).astype(np.float32)[contexts["device"]] - 1.0
    probabilities = 1 / (1 + np.exp(-logits))
    labels = rng.random(config.num_rows) < probabilities

    ids = np.stack([users, items, *contexts.values()], axis=1).astype(np.int32)
    vocab = [config.num_users, config.num_items, *CONTEXTS.values()]
    return ClickData(["user", "item", *CONTEXTS], vocab, 0, *_splits(ids, labels, probabilities))


def _splits(
    ids: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, dense: np.ndarray | None = None
) -> tuple[Split, Split, Split]:
    """Cut rows into 8:1:1 splits."""
    num_rows = len(labels)
    bounds = (0, num_rows * 8 // 10, num_rows * 9 // 10, num_rows)
    train, valid, test = (
        Split(
            torch.from_numpy(ids[first:last].copy()),
            torch.from_numpy(labels[first:last].astype(np.float32)),
            None if dense is None else torch.from_numpy(dense[first:last].copy()),
            probabilities=torch.from_numpy(probabilities[first:last].astype(np.float32)),
        )
        for first, last in pairwise(bounds)
    )
    return train, valid, test


def _generate_criteo(config: GeneratorConfig) -> ClickData:
    """Draw clicks of Criteo's shape.

    Every id has a bias and a vector near the centre of its cluster; the log-odds of a click are the biases, the dot
    products of all pairs of vectors and a linear function of the dense columns. With `multi_hot`, an id brings others
    along that are drawn once and uniformly for it, as MLPerf makes its set of several ids per row.
    """
    if min(config.num_rows // 10, config.criteo_rows, config.num_clusters) < 2:
        raise ValueError(f"data.generator: must have at least 20 rows, 2 criteo_rows and 2 clusters, got {config}")
    rng = np.random.default_rng(config.seed)
    sizes = {name: min(size, config.criteo_rows) for name, size in TABLE_ROWS.items()}
    widths = tuple(MULTI_HOT_SIZES.values()) if config.multi_hot else (1,) * len(sizes)
    total = np.zeros((config.num_rows, _RANK), dtype=np.float32)
    pairs, logits = (np.zeros(config.num_rows, dtype=np.float32) for _ in range(2))
    blocks = []
    for size, width in zip(sizes.values(), widths, strict=True):
        ids = _popular_ids(rng, size, config.num_rows, config.zipf)
        rows, _ = _clustered(rng, size, min(config.num_clusters, size))
        vectors = rows[ids] / len(sizes) ** 0.5
        total += vectors
        pairs -= np.einsum("nd,nd->n", vectors, vectors)
        logits += rng.normal(0, 0.15, size).astype(np.float32)[ids]
        others = rng.integers(0, size, (size, width - 1))
        blocks.append(np.concatenate([ids[:, None], others[ids]], axis=1).astype(np.int32))
    pairs += np.einsum("nd,nd->n", total, total)
    dense = rng.normal(0, 1, (config.num_rows, _NUM_DENSE)).astype(np.float32)
    logits += pairs / 2 + dense @ rng.normal(0, 0.12, _NUM_DENSE).astype(np.float32) - 1.2
    probabilities = 1 / (1 + np.exp(-logits))
    labels = rng.random(config.num_rows) < probabilities
    splits = _splits(np.concatenate(blocks, axis=1), labels, probabilities, dense)
    return ClickData(list(sizes), list(sizes.values()), _NUM_DENSE, *splits, widths=widths)


def _popular_ids(rng: np.random.Generator, num_ids: int, num_rows: int, exponent: float) -> np.ndarray:
    """Draw ids whose popularity falls as rank ** -exponent, ranks shuffled over ids: (num_rows,) int64."""
    cumulative = np.cumsum((np.arange(num_ids) + 3.0) ** -exponent)
    ranks = np.searchsorted(cumulative, rng.random(num_rows) * cumulative[-1])
    return rng.permutation(num_ids)[ranks]


def _clustered(rng: np.random.Generator, num_rows: int, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows around cluster centres: (num_rows, rank) float32 and their clusters (num_rows,)."""
    centres = rng.normal(0, 0.7, (num_clusters, _RANK))
    clusters = rng.integers(0, num_clusters, num_rows)
    return (centres[clusters] + rng.normal(0, 0.12, (num_rows, _RANK))).astype(np.float32), clusters


def _pair_effect(rng: np.random.Generator, num_first: int, num_second: int, scale: float) -> np.ndarray:
    return rng.normal(0, scale, (num_first, num_second)).astype(np.float32)
