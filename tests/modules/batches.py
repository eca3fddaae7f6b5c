"""Tables of several methods, batches over them, and what a collection must serve, written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from torchrec_compress import CompressedEmbeddingBagCollection, compress
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    Int8Config,
    MEmComConfig,
    MethodConfig,
    PQConfig,
    RandomCodesConfig,
)

KEYS = ["c", "i", "u", "u2", "x"]
ROWS = {"c": 9, "i": 300, "u": 9, "u2": 350, "x": 50}  # ids that every table of the feature holds

MIXED: dict[str, MethodConfig] = {
    "user": PQConfig(num_codes=4, codebook_size=16, num_hot_rows=20),
    "item": HashConfig(num_buckets=30),
    "shop": MEmComConfig(num_buckets=30, bias=True),
    "tag": RandomCodesConfig(num_codes=2, codebook_size=16),
    "word": Int8Config(),
    "*": DenseConfig(),
}


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """Return tables with shared features and a feature ("u") that two tables use; "x" belongs to none."""
    sizes = [
        ("user", 400, 16, ["u", "u2"]),
        ("ctx", 9, 4, ["c", "u"]),
        ("item", 300, 8, ["i"]),
        ("shop", 301, 12, ["i"]),
        ("tag", 350, 8, ["u2"]),
        ("word", 320, 8, ["i"]),
    ]
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=features, pooling=pooling)
        for name, rows, dim, features in sizes
    ]


def collection(
    compression: MethodConfig | dict[str, MethodConfig] | None = None,
    pooling: PoolingType = PoolingType.SUM,
    is_weighted: bool = False,
) -> CompressedEmbeddingBagCollection:
    """Return the tables compressed (fitted to random rows)."""
    stock = EmbeddingBagCollection(tables(pooling), is_weighted=is_weighted)
    with torch.no_grad():
        for weight in stock.parameters():
            weight.normal_()
    counts = {table.name: torch.randint(0, 50, (table.num_embeddings,)) for table in tables()}
    return compress(stock, MIXED if compression is None else compression, counts=counts)


def batch(
    lengths: list[list[int]], *, weighted: bool = False, dtype: torch.dtype = torch.int64, keys: list[str] | None = None
) -> KeyedJaggedTensor:
    """Return a batch with the given bag lengths per key and random ids, some of them repeated."""
    keys = keys or KEYS
    ids = [torch.randint(0, ROWS[key], (sum(mine),)) for key, mine in zip(keys, lengths, strict=True)]
    values = torch.cat(ids).to(dtype) if ids else torch.empty(0, dtype=dtype)
    flat = torch.tensor([length for mine in lengths for length in mine], dtype=torch.int32)
    weights = torch.randn(values.numel()) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(keys, values, flat, weights)


def expected(
    dense: EmbeddingBagCollection, features: KeyedJaggedTensor, pooling: PoolingType = PoolingType.SUM
) -> dict[str, Tensor]:
    """Return the output by key: plain loops over tables, features, bags and ids."""
    users: dict[str, list[str]] = {}
    for table in tables():
        for feature in table.feature_names:
            users.setdefault(feature, []).append(table.name)
    out = {}
    for table in tables():
        weight = dense.embedding_bags[table.name].weight.detach()
        for feature in table.feature_names:
            jagged = features[feature]
            ids, bounds = jagged.values().tolist(), jagged.offsets().tolist()
            factors = jagged.weights().tolist() if features.weights_or_none() is not None else [1.0] * len(ids)
            bags = torch.zeros(len(bounds) - 1, table.embedding_dim)
            for bag in range(len(bounds) - 1):
                for i in range(bounds[bag], bounds[bag + 1]):
                    bags[bag] += factors[i] * weight[ids[i]]
                if pooling == PoolingType.MEAN and bounds[bag + 1] > bounds[bag]:
                    bags[bag] /= bounds[bag + 1] - bounds[bag]
            key = feature if len(users[feature]) == 1 else f"{feature}@{table.name}"
            out[key] = bags
    return out
