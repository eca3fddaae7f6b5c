"""The embedded click generator: planted structure, known best scores, no download."""

from __future__ import annotations

import numpy as np
import torch

from torchrec_compress.train.data.dataset import Dataset, Split
from torchrec_compress.train.metrics import auc, logloss

# (rows, Zipf exponent) of each feature's ids
_FEATURES = {
    "user": (120_000, 0.9),
    "item": (40_000, 1.1),
    "publisher": (3_000, 1.0),
    "city": (300, 1.0),
    "device": (12, 0.8),
    "hour": (24, 0.0),
}
_LATENT_DIM = 8
_NUM_CLUSTERS = 50
_PAIRS = (("user", "item", 1.0), ("user", "publisher", 0.5), ("item", "city", 0.4), ("device", "hour", 0.3))


def synthetic(num_examples: int, seed: int) -> Dataset:
    """Make clicks with planted structure.

    Ids follow Zipf laws (so some are cold: seen rarely or only in the test split). Every id has a latent vector, its
    cluster's centre plus its own noise, and a bias; a click's log-odds are inner products of pairs of features plus
    biases. The probabilities are known, and so are the best AUC and logloss that any model can reach.

    Args:
        num_examples: over all splits, 8:1:1.
        seed: of everything.

    Returns:
        Six features of 12 to 120,000 ids, no dense features.

    Example:
        >>> data = synthetic(2000, seed=0)
        >>> len(data.train), data.vocab["user"], 0.5 < data.bayes["auc"] < 1
        (1600, 120000, True)
    """
    if num_examples < 100:
        raise ValueError(f"synthetic: num_examples must be at least 100, got {num_examples}")
    rng = np.random.default_rng(seed)
    ids = {name: _zipf(rng, rows, exponent, num_examples) for name, (rows, exponent) in _FEATURES.items()}
    latent = {name: _latent(rng, rows) for name, (rows, _) in _FEATURES.items()}
    logits = np.full(num_examples, -1.2, dtype=np.float32)
    for name, (rows, _) in _FEATURES.items():
        logits += (0.35 * rng.standard_normal(rows).astype(np.float32))[ids[name]]
    for left, right, strength in _PAIRS:
        # chunked: the gathered vectors of all examples at once would be large
        for first in range(0, num_examples, 1 << 18):
            part = slice(first, first + (1 << 18))
            products = (latent[left][ids[left][part]] * latent[right][ids[right][part]]).sum(1)
            logits[part] += strength * products
    probability = 1 / (1 + np.exp(-logits))
    labels = (rng.random(num_examples) < probability).astype(np.float32)
    columns = torch.from_numpy(np.stack([ids[name] for name in _FEATURES]).astype(np.int32))
    bounds = (0, int(num_examples * 0.8), int(num_examples * 0.9), num_examples)
    train, valid, test = (
        Split(columns[:, first:last].contiguous(), None, torch.from_numpy(labels[first:last]), None)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    )
    best = torch.from_numpy(probability[bounds[2] :].astype(np.float64))
    bayes = {"auc": auc(best, test.labels), "logloss": logloss(best, test.labels)}
    vocab = {name: rows for name, (rows, _) in _FEATURES.items()}
    return Dataset(list(_FEATURES), vocab, train, valid, test, bayes)


def _zipf(rng: np.random.Generator, rows: int, exponent: float, size: int) -> np.ndarray:
    """Draw ids of Zipf popularity; which id is popular is random."""
    mass = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(mass, rng.random(size) * mass[-1])
    return rng.permutation(rows)[np.minimum(ranks, rows - 1)]


def _latent(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Draw one latent vector per id: (rows, 8) float32 of unit-size products."""
    centres = rng.standard_normal((_NUM_CLUSTERS, _LATENT_DIM))
    own = rng.standard_normal((rows, _LATENT_DIM))
    vectors = 0.85 * centres[rng.integers(_NUM_CLUSTERS, size=rows)] + 0.5 * own
    return (vectors / _LATENT_DIM**0.25).astype(np.float32)
