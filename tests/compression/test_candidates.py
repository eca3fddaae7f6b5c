"""The steps down from every method, each smaller than what the table takes now."""

import pytest
from torchrec import EmbeddingBagConfig

from torchrec_compress.compression.candidates import step
from torchrec_compress.methods import DenseConfig, HashConfig, Int4Config, Int8Config, MECConfig, MEmComConfig, PQConfig
from torchrec_compress.methods.base import NUM_LEVELS


def table(rows: int = 100_000, dim: int = 64) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=dim, feature_names=["t"])


CODES = [PQConfig(num_codes=number) for number in (16, 8, 4, 2, 1)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DenseConfig(), [Int8Config(), Int4Config(), *CODES]),
        (MEmComConfig(num_buckets=50_000), [Int8Config(), Int4Config(), *CODES]),
        (Int8Config(), [None, Int4Config(), *CODES]),
        (Int4Config(), [None, None, *CODES]),
        (PQConfig(num_codes=4), [None, None, None, None, None, *CODES[3:]]),
        (MECConfig(num_codes=2, codebook_size=300), [*[None] * 6, MECConfig(num_codes=1, codebook_size=300)]),
        (HashConfig(num_buckets=1000), [HashConfig(num_buckets=n) for n in (500, 250, 125, 62, 31, 15, 7)]),
        (HashConfig(num_buckets=1), [None] * NUM_LEVELS),
    ],
)
def test_every_step_down(method, expected):
    assert [step(table(), method, level) for level in range(NUM_LEVELS)] == expected


def test_what_cannot_store_the_table_or_saves_less_than_a_twentieth_is_no_step():
    assert [step(table(dim=6), DenseConfig(), level) for level in (0, 1, 3, 5)] == [
        Int8Config(),
        None,
        None,
        PQConfig(num_codes=2),
    ]
    # 256 codewords of 64 floats beside a byte a row
    assert step(table(rows=1100), PQConfig(num_codes=2), 6) is None  # 67,736 bytes for 66,636
    assert step(table(rows=10_000), PQConfig(num_codes=2), 6) == PQConfig(num_codes=1)
