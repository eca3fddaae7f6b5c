"""Nothing of size [ids, D] is made in a training step, and codes are gathered once."""

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor

from tests.made import Made
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import (
    HashConfig,
    Int4Config,
    Int8Config,
    MEmComConfig,
    MethodConfig,
    PQConfig,
    RandomCodesConfig,
    TableData,
)
from torchrec_compress.methods.lowbit import LowBitConfig
from torchrec_compress.ops.dispatch import cpp_serves

ROWS, DIM, NUM_IDS = 500, 32, 16_000
NAMES = ["a", "b"]
METHODS: dict[str, MethodConfig] = {
    "codes": RandomCodesConfig(num_codes=4, codebook_size=16),
    "residual": RandomCodesConfig(num_codes=4, codebook_size=16, structure="residual"),
    "int16 codes": RandomCodesConfig(num_codes=2, codebook_size=300),
    "hot rows": PQConfig(num_codes=4, codebook_size=16, num_hot_rows=20, hot_dtype="fp32"),
    "int8 hot rows": PQConfig(num_codes=4, codebook_size=16, num_hot_rows=20),
    "int8": Int8Config(),
    "int4": Int4Config(),
    "hash": HashConfig(num_buckets=16),
    "memcom": MEmComConfig(num_buckets=16),
    "memcom, biases": MEmComConfig(num_buckets=16, bias=True),
}
LARGEST = 4 * NUM_IDS  # weights: of both features, or as plain PyTorch repeats them for four codes; an 8th of [ids, D]
CODEBOOKS = [name for name in METHODS if name.split(",")[0] not in ("int8", "int4", "hash", "memcom")]


def batch(weighted: bool = False) -> KeyedJaggedTensor:
    """Return three bags of each feature, one of them empty, together much longer than what is stored."""
    lengths = torch.tensor([0, NUM_IDS // 4, NUM_IDS - NUM_IDS // 4] * len(NAMES))
    ids = torch.randint(0, ROWS, (int(lengths.sum()),))
    weights = torch.randn(len(ids), requires_grad=True) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(NAMES, ids, lengths, weights)


def pooled(config: MethodConfig, weighted: bool) -> CompressedEmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name]) for name in NAMES
    ]
    collection = CompressedEmbeddingBagCollection(tables, is_weighted=weighted, compression=config)
    if isinstance(config, LowBitConfig):  # nothing but a fit fills those
        for table in tables:
            collection.load_table(table.name, config.fit(table, TableData(torch.randn(ROWS, DIM))))
    return collection


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_pooled(method, weighted):
    collection, features = pooled(METHODS[method], weighted), batch(weighted)
    with Made() as made:
        out = collection(features).values()
        if out.requires_grad:
            out.square().sum().backward()
    assert max(made.floats)[0] <= LARGEST, max(made.floats)


@pytest.mark.parametrize("method", CODEBOOKS)
def test_codes_are_gathered_once(method):
    if not cpp_serves():
        pytest.skip("the reference makes codeword numbers of them")
    collection, features = pooled(METHODS[method], False), batch()
    with Made() as made:
        collection(features).values().square().sum().backward()
    large = [(size, name) for size, name in made.integers if size >= 2 * NUM_IDS * len(NAMES)]
    assert [name for _, name in large] == ["torchrec_compress.codebook_bags_forward.default"], large


@pytest.mark.parametrize("method", CODEBOOKS)
def test_unpooled(method):
    tables = [
        EmbeddingConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name]) for name in NAMES
    ]
    collection, features = CompressedEmbeddingCollection(tables, compression=METHODS[method]), batch()
    with Made() as made:
        rows = collection(features)
    large = {name for size, name in made.floats if size >= NUM_IDS * DIM}
    own = {"torchrec_compress.codebook_bags_forward.default", "aten.split_with_sizes.default", "aten.view.default"}
    assert large <= own or not cpp_serves(), large
    assert [rows[name].values().shape for name in NAMES] == [(NUM_IDS, DIM)] * len(NAMES)


@pytest.mark.parametrize("hot_dtype", ["int8", "int4"])
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_low_bit_hot_rows_are_read_where_they_lie(codebook_size, hot_dtype):
    if not cpp_serves():
        pytest.skip("other tiers read floats")
    num_hot = ROWS - 1  # more floats than the codebooks and the bags
    config = PQConfig(num_codes=4, codebook_size=codebook_size, num_hot_rows=num_hot, hot_dtype=hot_dtype)
    collection, features = pooled(config, False), batch()
    with Made() as made:
        collection(features).values().square().sum().backward()
    assert max(made.floats)[0] < num_hot * DIM, max(made.floats)


def test_the_audit_can_fail():
    table = torch.randn(ROWS, DIM, requires_grad=True)
    with Made() as made:
        table[torch.zeros(NUM_IDS, dtype=torch.int64)].sum().backward()
    assert max(made.floats)[0] == NUM_IDS * DIM
