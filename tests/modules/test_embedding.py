"""`CompressedEmbeddingCollection`: the unpooled twin."""

import copy

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface

from tests.cases import CONFIGS, IDS, at_rest, has_manager, steps_itself
from tests.cases import batch as one_feature
from tests.modules.batches import KEYS, batch
from torchrec_compress import CompressedEmbeddingCollection
from torchrec_compress.methods import DenseConfig, HashConfig, MEmComConfig, PQConfig, RandomCodesConfig
from torchrec_compress.modules import codes

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


@pytest.mark.parametrize("lengths", [[[2, 0, 3]] * 5, [[0]] * 5, [[1, 0], [4, 4], [0, 0], [0, 9], [1, 1]]])
def test_large_look_ups_have_a_call_of_their_own_and_give_the_same_bits(lengths, monkeypatch):
    ours = CompressedEmbeddingCollection(tables(), compression=MIXED)
    features, found = batch(lengths), []
    for values in (2**21, 40, 1):  # all in a call, some, one
        monkeypatch.setattr(codes, "_CALL_VALUES", values)
        rows = {key: jagged.values() for key, jagged in ours(features).items()}
        loss = sum((found.square().sum() for found in rows.values()), torch.zeros(()))
        found.append((rows, torch.autograd.grad(loss, [*ours.decoder.parameters()])))
    for rows, gradients in found[1:]:
        assert all(torch.equal(rows[key], found[0][0][key]) for key in rows)
        for got, expected in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("config", [RandomCodesConfig(num_codes=2, codebook_size=16), HashConfig(num_buckets=30)])
# torch 2.13 copies pytrees of its own deprecated class
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_it_is_exported_for_any_batch_size(config):
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.collection = CompressedEmbeddingCollection(tables(), compression={**MIXED, "user": config})

        def forward(self, values, lengths):
            rows = self.collection(KeyedJaggedTensor(keys=KEYS[:4], values=values, lengths=lengths))
            return [rows[key].values().square() for key in sorted(rows)]

    model = Rows().eval()
    small, large = (batch(lengths, keys=KEYS[:4]) for lengths in ([[2, 1]] * 4, [[1, 0, 5], [4, 4, 0]] * 2))
    ids, examples = torch.export.Dim("ids", min=2), torch.export.Dim("examples", min=2)
    with torch.no_grad():
        program = torch.export.export(
            model, (small.values(), small.lengths()), dynamic_shapes={"values": {0: ids}, "lengths": {0: 4 * examples}}
        )
        wanted = model(large.values(), large.lengths())
        for got, expected in zip(program.module()(large.values(), large.lengths()), wanted, strict=True):
            assert torch.equal(got, expected)


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
    ours = at_rest(CompressedEmbeddingCollection([item], compression=config))
    features = one_feature([[1, 2], [], [402, 1]])
    got = ours(features)["item"]
    torch.testing.assert_close(got.values(), ours.table_rows("item", features.values()))
    assert got.lengths().tolist() == [2, 0, 2]
    assert ours.footprint().total_bytes == config.stored_bytes(item)
    traceable = copy.deepcopy(ours).train(not (steps_itself(config) or has_manager(config)))
    assert torch.equal(torch.fx.symbolic_trace(traceable)(features)["item"].values(), got.values())
    assert torch.equal(copy.deepcopy(ours)(features)["item"].values(), got.values())
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    if trained:
        got.values().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_tables_of_two_widths_raise():
    wide = tables()
    wide[1].embedding_dim = 4
    with pytest.raises(ValueError, match=r"all tables must have one embedding_dim, got \{'user': 8, 'ctx': 4"):
        CompressedEmbeddingCollection(wide, compression=MIXED)


def test_a_missing_feature_raises():
    ours = CompressedEmbeddingCollection(tables(), compression=MIXED)
    with pytest.raises(ValueError, match=r"must have the features \['u2'\]"):
        ours(batch([[1]] * 4, keys=[key for key in KEYS if key != "u2"]))
