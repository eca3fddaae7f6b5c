"""One small config list per method, and the table, batch and data that all of them are tested on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_compress import CompressedEmbeddingBagCollection, compress
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.methods import (
    BlocksConfig,
    CafeConfig,
    CceConfig,
    DenseConfig,
    DPQConfig,
    GivenCodesConfig,
    GraphCodesConfig,
    HashConfig,
    HashEmbeddingsConfig,
    Int4Config,
    Int8Config,
    LMAConfig,
    MECConfig,
    MEmComConfig,
    MemRecConfig,
    MethodConfig,
    NarrowConfig,
    PQConfig,
    QRConfig,
    QuantileCodesConfig,
    RandomCodesConfig,
    RobeConfig,
)

CODES = str(Path(__file__).parent / "stored" / "codes_{}x4.npy")  # drawn at random, below 16
NUM_ROWS, DIM = 403, 16  # not a multiple of 4, so that packed scalars are padded

CASES: dict[str, list[MethodConfig]] = {
    "blocks": [
        BlocksConfig(order="ids"),
        BlocksConfig(shares=(0.2,), ratio=4),
    ],
    "cafe": [
        CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4),
        CafeConfig(num_hot_rows=8, num_cold_rows=40, num_medium_rows=16, num_blocks=4, importance="frequency"),
        CafeConfig(num_hot_rows=60, num_cold_rows=80, num_blocks=4, width=8, rate=0.5),
    ],
    "cce": [
        CceConfig(num_codes=4, codebook_size=16, cluster_every=2),
        CceConfig(num_codes=2, codebook_size=64, optimizer_state="mean"),
    ],
    "dense": [DenseConfig()],
    "dpq": [
        DPQConfig(num_codes=4, codebook_size=16),
        DPQConfig(num_codes=2, codebook_size=64, bound=0.1),
    ],
    "given": [
        GivenCodesConfig(codes=CODES.format(NUM_ROWS), num_codes=4, codebook_size=16),
        GivenCodesConfig(codes=CODES.format(NUM_ROWS), num_codes=4, codebook_size=40, structure="residual"),
    ],
    "graph": [
        GraphCodesConfig(num_codes=4, codebook_size=16),
        GraphCodesConfig(num_codes=3, codebook_size=32, structure="residual", num_clusterings=2, num_hot_rows=20),
    ],
    "hash": [HashConfig(num_buckets=40)],
    "hash_embeddings": [
        HashEmbeddingsConfig(num_buckets=40),
        HashEmbeddingsConfig(num_buckets=40, num_hashes=3, num_weights=90),
    ],
    "int4": [Int4Config()],
    "int8": [Int8Config()],
    "lma": [
        LMAConfig(num_codes=4, codebook_size=16),
        LMAConfig(num_codes=2, codebook_size=32, structure="residual", hashes_per_code=2, num_hot_rows=20),
    ],
    "mec": [
        MECConfig(num_codes=4, codebook_size=16, fit_options=MECFit(num_steps=5, batch_size=64)),
        MECConfig(num_codes=2, codebook_size=32, num_hot_rows=20, popularity="log2", fit_options=MECFit(num_steps=2)),
        MECConfig(num_codes=2, codebook_size=16, num_coded=50, fit_options=MECFit(num_steps=2)),
    ],
    "memcom": [
        MEmComConfig(num_buckets=40),
        MEmComConfig(num_buckets=40, bias=True),
        MEmComConfig(num_buckets=40, scalars="grouped"),
        MEmComConfig(num_buckets=40, scalars="grouped", bias=True),
    ],
    "memrec": [
        MemRecConfig(num_tokens=70, memory=None),
        MemRecConfig(num_tokens=70, num_hashes=3, num_weights=90, num_weight_hashes=2, memory=None, bound=0.1),
    ],
    "narrow": [
        NarrowConfig(width=4),
        NarrowConfig(width=12),
        NarrowConfig(width=8, bits=8),
        NarrowConfig(width=16, bits=4),
    ],
    "pq": [
        PQConfig(num_codes=4, codebook_size=16),
        PQConfig(num_codes=2, codebook_size=300),
        PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, popularity="count"),
        PQConfig(num_codes=4, codebook_size=16, num_hot_rows=30, hot_dtype="fp32", popularity="log2"),
        PQConfig(num_codes=3, codebook_size=16, structure="residual", num_hot_rows=20, hot_dtype="int4"),
        PQConfig(num_codes=2, codebook_size=16, structure="residual", num_hot_rows=20, hot_dtype="fp32"),
        PQConfig(num_codes=2, codebook_size=17, structure="residual", width=8, num_hot_rows=20),
        PQConfig(num_codes=4, codebook_size=16, codebook_dtype="int8"),
        PQConfig(num_codes=2, codebook_size=32, structure="residual", width=8, num_hot_rows=20, codebook_dtype="int8"),
        PQConfig(num_codes=4, codebook_size=16, num_coded=150, popularity="count"),
        PQConfig(num_codes=2, codebook_size=32, structure="residual", width=8, num_hot_rows=20, num_coded=40),
    ],
    "qr": [
        QRConfig(num_buckets=25),
        QRConfig(num_buckets=21, op="concat", partition="remainders", width=4),
        QRConfig(num_buckets=6, num_tables=3, op="mult"),
    ],
    "quantile": [
        QuantileCodesConfig(num_codes=4, codebook_size=16),
        QuantileCodesConfig(num_codes=2, codebook_size=32, num_hot_rows=40),
        QuantileCodesConfig(num_codes=2, codebook_size=32, width=4),
    ],
    "random": [
        RandomCodesConfig(num_codes=4, codebook_size=16),
        RandomCodesConfig(num_codes=2, codebook_size=16, structure="residual"),
        RandomCodesConfig(num_codes=4, codebook_size=16, width=12),
    ],
    "robe": [
        RobeConfig(num_blocks=80, block_size=8, memory=None),
        RobeConfig(num_blocks=90, block_size=4, memory=None, signs=True, bound=0.1),
    ],
}

ALL = [(name, number) for name, configs in CASES.items() for number in range(len(configs))]
IDS = [f"{name}-{number}" for name, number in ALL]
CONFIGS = [CASES[name][number] for name, number in ALL]


def table(**changes: object) -> EmbeddingBagConfig:
    """Return the table that every case can store, with changes."""
    values = {"name": "item", "num_embeddings": NUM_ROWS, "embedding_dim": DIM, "feature_names": ["item"]}
    return EmbeddingBagConfig(**{**values, **changes})  # type: ignore[arg-type]


def rows() -> Tensor:
    """Return trained rows: clusters and noise, (NUM_ROWS, DIM) float32."""
    seeded = torch.Generator().manual_seed(1)
    centres = torch.randn(12, DIM, generator=seeded)
    return centres[torch.randint(0, 12, (NUM_ROWS,), generator=seeded)] + 0.3 * torch.randn(
        NUM_ROWS, DIM, generator=seeded
    )


def counts() -> Tensor:
    """Return look-ups per id, steep, some of them zero."""
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(2))
    return 5000 // (order + 1) - 12 * (order > 300)


def contexts() -> tuple[Tensor, Tensor]:
    """Return pairs (id, context id)."""
    seeded = torch.Generator().manual_seed(3)
    return torch.randint(0, NUM_ROWS, (3000,), generator=seeded), torch.randint(0, 50, (3000,), generator=seeded)


def dense_collection() -> EmbeddingBagCollection:
    """Return a stock collection that holds `rows`."""
    collection = EmbeddingBagCollection([table()])
    with torch.no_grad():
        collection.embedding_bags["item"].weight.copy_(rows())
    return collection


def fit(config: MethodConfig, seed: int = 0) -> CompressedEmbeddingBagCollection:
    """Return the test table compressed."""
    given = {"counts": {"item": counts()}, "contexts": {"item": contexts()}}
    return at_rest(compress(dense_collection(), config, seed=seed, **given))


@cache
def fitted(config: MethodConfig) -> CompressedEmbeddingBagCollection:
    """Return the test table compressed; made once and shared, so never to be written to."""
    return fit(config)


def fresh(config: MethodConfig, seed: int = 0, **changes: object) -> CompressedEmbeddingBagCollection:
    """Return an unfitted collection of the test table."""
    return at_rest(CompressedEmbeddingBagCollection([table(**changes)], compression=config, seed=seed))


def batch(bags: list[list[int]], weights: list[float] | None = None, key: str = "item") -> KeyedJaggedTensor:
    """Return a batch of one feature, one list of ids per bag."""
    ids = [number for bag in bags for number in bag]
    return KeyedJaggedTensor.from_lengths_sync(
        [key],
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([len(bag) for bag in bags], dtype=torch.int64),
        None if weights is None else torch.tensor(weights),
    )


def is_managed(config: MethodConfig) -> bool:
    """Return whether rows of the method change other than by gradient."""
    return config.parts(table(), 0).managed is not None


def has_manager(config: MethodConfig) -> bool:
    """Return whether rows or codes of the method change other than by gradient."""
    codes = config.parts(table(), 0).codes
    return is_managed(config) or (codes is not None and codes.manager is not None)


def steps_itself(config: MethodConfig) -> bool:
    """Return whether a training step changes rows of the method otherwise than by an optimizer that the loop calls."""
    return is_managed(config) or config.parts(table(), 0).trained is not None


def at_rest(collection: Any) -> Any:
    """Return a collection of which no rows are trained in the backward: that would take an optimizer."""
    for rows in () if collection.trained is None else collection.trained.banks.values():
        rows.requires_grad_(False)
    return collection


def code_size(config: MethodConfig) -> int:
    """Return how many values a code of the method may take."""
    return getattr(config, "codebook_size", 256)
