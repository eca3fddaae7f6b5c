"""`CompressedEmbeddingCollection`: the unpooled twin."""

import copy

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface

from tests.cases import CONFIGS, IDS
from tests.cases import batch as one_feature
from tests.modules.batches import KEYS, batch
from torchrec_compress import CompressedEmbeddingCollection
from torchrec_compress.methods import DenseConfig, HashConfig, MEmComConfig, PQConfig, RandomCodesConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MIXED = {
    "user": PQConfig(num_codes=4, codebook_size=16),
    "item": HashConfig(num_buckets=30),
    "shop": MEmComConfig(num_buckets=30),
    "tag": RandomCodesConfig(num_codes=2, codebook_size=16),
    "*": DenseConfig(),
}


def tables():
    sizes = [
        ("user", 400, ["u", "u2"]),
        ("ctx", 9, ["c", "u"]),
        ("item", 300, ["i"]),
        ("shop", 301, ["i"]),
        ("tag", 350, ["u2"]),
    ]
    return [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, rows, features in sizes
    ]


@pytest.mark.parametrize("need_indices", [False, True])
def test_rows_and_bags_of_every_feature(need_indices):
    ours = CompressedEmbeddingCollection(tables(), compression=MIXED, need_indices=need_indices)
    stock = EmbeddingCollection(tables(), need_indices=need_indices)
    with torch.no_grad():
        for table in tables():
            rows = ours.table_rows(table.name, torch.arange(table.num_embeddings))
            stock.embeddings[table.name].weight.copy_(rows)
    for lengths in ([[2, 0, 3]] * 5, [[0]] * 5, [[1, 0], [4, 4], [0, 0], [0, 2], [1, 1]]):
        features = batch(lengths)
        got, wanted = ours(features), stock(features)
        assert sorted(got) == sorted(wanted)
        for key in wanted:
            torch.testing.assert_close(got[key].values(), wanted[key].values(), rtol=1e-5, atol=1e-6)
            assert torch.equal(got[key].lengths(), wanted[key].lengths())
            if need_indices:
                assert torch.equal(got[key].weights(), wanted[key].weights())
            else:
                assert got[key].weights_or_none() is None


def test_it_is_an_embedding_collection():
    ours = CompressedEmbeddingCollection(tables(), compression=MIXED, need_indices=True)
    stock = EmbeddingCollection(tables())
    assert isinstance(ours, EmbeddingCollectionInterface)
    assert ours.embedding_dim() == 8
    assert ours.need_indices()
    assert ours.embedding_names_by_table() == stock.embedding_names_by_table()
    assert [table.name for table in ours.embedding_configs()] == [table.name for table in tables()]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_method_serves_unpooled_rows(config):
    item = EmbeddingConfig(name="item", num_embeddings=403, embedding_dim=16, feature_names=["item"])
    ours = CompressedEmbeddingCollection([item], compression=config)
    features = one_feature([[1, 2], [], [402, 1]])
    if config.method in ("int8", "int4"):
        with pytest.raises(RuntimeError, match="must be filled"):
            ours(features)
        return
    got = ours(features)["item"]
    torch.testing.assert_close(got.values(), ours.table_rows("item", features.values()))
    assert got.lengths().tolist() == [2, 0, 2]
    assert ours.footprint().total_bytes == config.stored_bytes(item)
    assert torch.equal(torch.fx.symbolic_trace(ours)(features)["item"].values(), got.values())
    assert torch.equal(copy.deepcopy(ours)(features)["item"].values(), got.values())
    got.values().square().sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_tables_of_two_widths_raise():
    wide = tables()
    wide[1].embedding_dim = 4
    with pytest.raises(ValueError, match=r"all tables must have one embedding_dim, got \{'user': 8, 'ctx': 4"):
        CompressedEmbeddingCollection(wide, compression=MIXED)


def test_a_missing_feature_raises():
    ours = CompressedEmbeddingCollection(tables(), compression=MIXED)
    with pytest.raises(ValueError, match=r"must have the features \['u2'\]"):
        ours(batch([[1]] * 4, keys=[key for key in KEYS if key != "u2"]))
