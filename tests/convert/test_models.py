"""`compress` and `decompress` of whole models: every table is found, and nothing else changes."""

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import CONFIGS, IDS, batch, contexts, counts, dense_collection, rows
from torchrec_compress import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    decompress,
    measure_curvature,
)
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, NarrowConfig, PQConfig

PQ = PQConfig(num_codes=4, codebook_size=16)
EXACT = HashConfig(num_buckets=403)  # saves nothing, so tables stay dense
N, D = 403, 16


def pooled(*names):
    tables = [EmbeddingBagConfig(name=name, num_embeddings=N, embedding_dim=D, feature_names=[name]) for name in names]
    return EmbeddingBagCollection(tables)


def unpooled(*names):
    tables = [EmbeddingConfig(name=name, num_embeddings=N, embedding_dim=D, feature_names=[name]) for name in names]
    return EmbeddingCollection(tables)


class Model(nn.Module):
    """A tower of each kind of table, and a net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bags = pooled("user", "item")
        words = nn.Sequential(nn.EmbeddingBag(N, D, mode="sum"))
        self.towers = nn.ModuleDict({"history": unpooled("item"), "words": words})
        self.shop = nn.Embedding(N, D, padding_idx=2)
        with torch.no_grad():
            self.shop.weight.normal_()  # the padding row too, as many a model's own initialisation does
        self.net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 1))

    def forward(self, ids):
        features = KeyedJaggedTensor.from_lengths_sync(
            ["user", "item"], torch.cat([ids, ids]), torch.ones(2 * len(ids), dtype=torch.int64)
        )
        found = self.bags(features)
        shop, words = self.shop(ids), self.towers["words"](ids.unsqueeze(1))
        seen = self.towers["history"](features)["item"].values()
        return self.net(found["user"] * found["item"] + shop * words + seen)


IDS_OF_BATCH = torch.tensor([0, 2, 7, N - 1])


def test_every_table_is_found_and_the_source_is_left():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    small = compress(model, PQ)
    assert type(small) is Model and small is not model
    assert isinstance(small.bags, CompressedEmbeddingBagCollection)
    assert isinstance(small.towers["history"], CompressedEmbeddingCollection)
    assert isinstance(small.towers["words"][0], CompressedEmbeddingBag)
    assert isinstance(small.shop, CompressedEmbedding)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    net = small.net.state_dict()
    assert all(torch.equal(value, net[name]) for name, value in model.net.state_dict().items())
    assert small.net[0].weight is not model.net[0].weight
    assert small.bags.methods() == {"user": PQ, "item": PQ} and small.shop.method == PQ
    assert small(IDS_OF_BATCH).shape == (4, 1)
    assert torch.equal(small.shop(torch.tensor([2]))[0], model.shop.weight[2])


@pytest.mark.parametrize("inplace", [False, True])
def test_what_loses_nothing_serves_the_same(inplace):
    model = Model().eval()
    wanted = model(IDS_OF_BATCH)
    small = compress(model, EXACT, inplace=inplace)
    assert (small is model) == inplace
    assert isinstance(small.bags, CompressedEmbeddingBagCollection) and type(small.shop) is nn.Embedding
    torch.testing.assert_close(small(IDS_OF_BATCH), wanted)
    assert not small.training and not any(module.training for module in small.modules())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_all_methods_of_plain_modules_are_those_of_collections(config):
    """A plain module is fitted as a collection of one table of its name is."""
    stock = dense_collection()
    plain = nn.EmbeddingBag.from_pretrained(stock.embedding_bags["item"].weight.detach().clone(), mode="sum")
    given = {"counts": {"item": counts()}, "contexts": {"item": contexts()}}
    wanted = compress(stock, config, **given)
    got = compress(nn.ModuleDict({"item": plain}), config, **given)["item"]
    if not config.is_compressed:
        assert got is not plain and type(got) is nn.EmbeddingBag
        return
    assert got.method == wanted.methods()["item"]
    ids = torch.arange(N)
    assert torch.equal(got.collection.table_rows("item", ids), wanted.table_rows("item", ids))


def test_keys_choose_what_is_compressed():
    model = Model()
    small = compress(model, {"shop": PQ, "bags.*": HashConfig(num_buckets=40), "bags.user": Int8Config()})
    assert small.shop.method == PQ
    assert small.bags.methods() == {"user": Int8Config(), "item": HashConfig(num_buckets=40)}
    assert type(small.towers["history"]) is EmbeddingCollection and type(small.towers["words"][0]) is nn.EmbeddingBag
    # a name alone is of all collections that have it
    small = compress(model, {"item": PQ, "user": Int8Config()})
    assert small.bags.methods() == {"user": Int8Config(), "item": PQ}
    assert small.towers["history"].methods() == {"item": PQ} and type(small.shop) is nn.Embedding


@pytest.mark.parametrize(
    ("compression", "given", "message"),
    [
        ({"shops": PQ}, {}, r"compression: every key must fit a table, got \['shops'\]; did you mean 'shop'\?"),
        ({"shop": PQ, "x.*": PQ}, {}, r"every key must fit a table, got \['x.\*'\]"),
        ({"user": PQ}, {}, r"bags: compression: table 'item' must fit a key"),
        (PQ, {"counts": {"shops": counts()}}, r"counts must name tables, got 'shops'; did you mean 'shop'\?"),
        (PQ, {"counts": {"item": counts()}}, r"must name one table each, got 'item'; write one of \['bags.item', 'tow"),
        (PQ, {"counts": {"shop": counts()[1:]}}, r"shop: table 'shop': counts"),
        (PQ, {"counts": {"towers.words.0": counts() - 1000}}, r"towers.words.0: table 'towers_words_0': counts"),
        (
            PQ,
            {"counts": {"user": counts(), "bags.user": counts()}},
            r"must name a table once, got \['bags.user', 'user'",
        ),
        (PQ, {"curvature": [1]}, "curvature must be a mapping by table name, got list"),
        (PQConfig(num_codes=3, codebook_size=16), {}, "bags: .*num_codes"),
    ],
)
def test_errors_name_the_module_and_change_nothing(compression, given, message):
    model = Model()
    kinds = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        compress(model, compression, inplace=True, **given)
    assert kinds == {path: type(module) for path, module in model.named_modules()}


def test_counts_reach_the_table_that_they_are_of():
    config = PQConfig(num_codes=2, codebook_size=16, num_hot_rows=5, popularity="count")
    seen = torch.zeros(N, dtype=torch.int64)
    hot = torch.tensor([400, 7, 9, 200, 3])
    seen[hot] = torch.tensor([50, 40, 30, 20, 10])
    ones = torch.ones(N, dtype=torch.int64)
    model = Model()
    given = {"shop": seen, "towers.words.0": ones, "bags.item": ones, "user": ones, "towers.history.item": ones}
    small = compress(model, config, counts=given)
    torch.testing.assert_close(small.shop(hot), model.shop(hot), atol=0.05, rtol=0)  # rows of their own, in int8
    assert not torch.allclose(small.towers["words"][0](hot[:, None]), model.towers["words"][0](hot[:, None]), atol=0.05)


def test_a_module_in_two_places_stays_one():
    model = nn.ModuleDict({"a": nn.Embedding(N, D), "net": nn.Linear(D, 1)})
    model["b"] = model["a"]
    for inplace in (False, True):
        small = compress(model, PQ, inplace=inplace)
        assert small["a"] is small["b"] and isinstance(small["a"], CompressedEmbedding)
    back = decompress(small, inplace=True)
    assert back is small and back["a"] is back["b"] and type(back["a"]) is nn.Embedding


def tied():
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(N, D), "out": nn.Linear(D, N, bias=False), "user": nn.Embedding(N, D)}
    )
    model["out"].weight = model["tokens"].weight
    return model


def test_tied_weights_are_named():
    with pytest.raises(ValueError, match=r"got \['tokens.weight', 'out.weight'\] tied; use one module"):
        compress(tied(), PQ)
    small = compress(tied(), {"user": PQ})
    assert small["tokens"].weight is small["out"].weight and isinstance(small["user"], CompressedEmbedding)
    twins = nn.ModuleDict({"a": nn.Embedding(N, D), "b": nn.Embedding(N, D)})
    twins["b"].weight = twins["a"].weight
    with pytest.raises(ValueError, match=r"got \['a.weight', 'b.weight'\] tied"):
        compress(twins, PQ)


def hooked(model):
    model.shop.register_forward_hook(lambda *_: None)
    return model


class Sub(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: hooked(Model()), "'shop': a module that is replaced must have no hooks, on its weight neither, got"),
        (lambda: nn.Sequential(nn.Embedding(N, D, max_norm=1.0)), "0: compress: max_norm of Embedding must be unset"),
        (
            lambda: nn.Sequential(nn.EmbeddingBag(N, D, scale_grad_by_freq=True)),
            "0: compress: scale_grad_by_freq of Emb",
        ),
        (lambda: nn.Sequential(nn.EmbeddingBag(N, D, mode="max")), "0: .*mode"),
        (lambda: nn.Sequential(nn.Embedding(N, D).double()), "0: compress: weight of Embedding must hold float32, fl"),
        (
            lambda: nn.Sequential(nn.Embedding(N, D, device="meta")),
            "0: compress: weight of Embedding must hold .*, got no values",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "source must be .*got Sequential"),
        (lambda: nn.Sequential(Sub(N, D)), "source must be .*got Sequential"),
        (lambda: nn.Sequential(compress(nn.Embedding(N, D), PQ)), "a table must be left to compress, got only compr"),
    ],
)
def test_what_cannot_be_kept_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        compress(model(), PQ)


def test_a_subclass_is_left_and_named(caplog):
    model = nn.ModuleDict({"own": Sub(N, D), "plain": nn.Embedding(N, D)})
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.models"):
        small = compress(model, PQ)
    assert type(small["own"]) is Sub and "'own': left as it is" in caplog.text


def test_scripted_tables_are_told(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        scripted = torch.jit.script(nn.Sequential(nn.Embedding(N, D)))
    model = nn.ModuleDict({"old": scripted, "plain": nn.Embedding(N, D)})
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.models"):
        small = compress(model, PQ, inplace=True)
    assert small["old"] is scripted and "'old.0': left as it is: its graph is scripted" in caplog.text


def test_no_method_is_no_compression():
    with pytest.raises(ValueError, match="compression: must name a table, got an empty mapping"):
        compress(nn.Sequential(nn.Embedding(N, D)), {})


@pytest.mark.parametrize("inplace", ["yes", 1, None])
def test_a_word_is_no_yes(inplace):
    model: Any = nn.Sequential(nn.Embedding(N, D))
    for change in (lambda: compress(model, PQ, inplace=inplace), lambda: decompress(model, inplace=inplace)):
        with pytest.raises(ValueError, match=f"inplace must be True or False, got {inplace!r}"):
            change()


def wrap():
    model = nn.Sequential(nn.Embedding(N, D), nn.Linear(D, 1))
    with pytest.raises(ValueError, match="must not be wrapped by DistributedDataParallel, got 'the model'"):
        compress(DistributedDataParallel(model), PQ)


def test_wrapped_models_are_refused(two_ranks):
    two_ranks.run(wrap)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_frozen_tables_stay_frozen(config):
    stock = pooled("user", "item")
    stock.embedding_bags["user"].weight.requires_grad_(False)
    plain = nn.Embedding.from_pretrained(rows())  # frozen
    given = {name: counts() for name in ("user", "item", "0")}
    seen = {name: contexts() for name in ("user", "item", "0")}
    model = nn.Sequential(plain, stock)
    small = compress(model, config, counts=given, contexts=seen)
    assert all(not each.requires_grad for each in small[0].parameters())
    mine = {name: each.requires_grad for name, each in small[1].named_parameters()}
    assert all(free == ("user" not in name) for name, free in mine.items()), mine


def test_optimizers_that_are_gone_are_named(caplog):
    model = nn.Sequential(pooled("user"))
    apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1.0})
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.collections"):
        compress(model, PQ)
    assert "tables ['user']: the optimizer that trains them in the backward stays with the source" in caplog.text


def test_compressed_tables_are_stored_anew_where_they_are_named():
    small = compress(Model(), {"bags.*": NarrowConfig(width=8)})
    again = compress(small, {"*": PQ})
    assert again.bags.methods()["user"] == NarrowConfig(width=8) and again.shop.method == PQ
    again = compress(small, {"bags.user": PQ, "bags.item": DenseConfig()})
    assert again.bags.methods() == {"user": PQ, "item": DenseConfig()}
    with pytest.raises(ValueError, match=r"shop: .*must not be compressed twice"):
        compress(compress(Model(), {"shop": PQ}), {"shop": Int8Config()})


def test_decompress_gives_what_was_served():
    model = Model().eval()
    small = compress(model, PQ)
    wanted = small(IDS_OF_BATCH)
    back = decompress(small)
    assert {path: type(module) for path, module in back.named_modules()} == {
        path: type(module) for path, module in model.named_modules()
    }
    torch.testing.assert_close(back(IDS_OF_BATCH), wanted)
    assert back.shop.padding_idx == 2 and torch.equal(back.shop.weight[2], model.shop.weight[2])
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert isinstance(small.shop, CompressedEmbedding)  # the source is left
    with pytest.raises(ValueError, match="collection must be a compressed one, or a model that holds some, got Model"):
        decompress(back)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_plain_modules_by_themselves(kind):
    plain = kind(N, D)
    small = compress(plain, PQ, counts={"embedding": counts()})
    back = decompress(small)
    assert type(back) is kind and torch.equal(back.weight, small.weight)
    with pytest.raises(ValueError, match="compressed in place must be a model"):
        compress(plain, PQ, inplace=True)
    with pytest.raises(ValueError, match="expanded in place must be a model"):
        decompress(small, inplace=True)


def test_a_curvature_of_a_model_fits_its_tables():
    """The route of a user: measure on the model, compress it in one call."""
    model = nn.Sequential(pooled("item"))

    def forward(model, features):
        return model(features)["item"].sum(dim=1)

    found = measure_curvature(model, [batch([[i, i + 1] for i in range(0, 400, 2)])], forward, "mse")
    config = PQConfig(num_codes=2, codebook_size=16, structure="residual")
    small, blind = compress(model, config, curvature=found), compress(model, config)
    features = batch([[i] for i in range(403)])
    wanted, got, other = (forward(each, features).detach() for each in (model, small, blind))
    assert float((got - wanted).square().sum()) < 0.5 * float((other - wanted).square().sum())


class Plain(nn.Module):
    """Plain tables of every kind, under a loss that is a square of a sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(N, D, padding_idx=1)
        self.inner = nn.ModuleDict({"bags": nn.EmbeddingBag(N, D, mode="mean", padding_idx=2)})
        self.weighted = nn.EmbeddingBag(N, D, mode="sum", include_last_offset=True)
        self.over = nn.Parameter(torch.linspace(0.5, 2, D))
        with torch.no_grad():
            for table in (self.rows, self.inner["bags"], self.weighted):
                table.weight.normal_()

    def forward(self, batch):
        ids, offsets, weights = batch
        found = self.rows(ids.view(-1, 4)).sum(dim=1)
        found = found + self.inner["bags"](ids, offsets[:-1])
        found = found + self.weighted(input=ids, offsets=offsets, per_sample_weights=weights)
        return (found * self.over).sum(dim=1)


def test_the_curvature_of_plain_tables_is_that_of_the_loss():
    """Small errors of the rows raise the loss by what is predicted, exactly: the loss is a square."""
    model = Plain().double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, N, (400,), generator=generator)
    ids[::9], ids[4:8] = 1, 2
    offsets = torch.arange(0, 401, 4)
    offsets[7] = offsets[8]  # an empty bag
    batch = (ids, offsets, torch.rand(400, generator=generator, dtype=torch.float64))
    found = measure_curvature(model, [batch], loss="mse")
    assert set(found) == {"rows", "inner_bags", "weighted"}
    assert found["rows"].lookups == int((ids != 1).sum()) and found["weighted"].lookups == 400
    target = model(batch).detach()
    for path, name in [("rows", "rows"), ("inner.bags", "inner_bags"), ("weighted", "weighted")]:
        table, rises = model.get_submodule(path), []
        before = table.weight.detach().clone()
        for _ in range(200):
            with torch.no_grad():
                table.weight.copy_(before + torch.randn(N, D, generator=generator, dtype=torch.float64))
                if table.padding_idx is not None:
                    table.weight[table.padding_idx] = before[table.padding_idx]
                rises.append(float((model(batch) - target).square().mean()))
                table.weight.copy_(before)
        # the trace of F is what errors of one in every number cost, where ids of a bag are seldom alike
        wanted = 0.5 * found[name].lookups / 100 * float(found[name].matrix.trace())
        assert torch.tensor(rises).mean().item() == pytest.approx(wanted, rel=0.1), name
    small = compress(model.float(), PQConfig(num_codes=2, codebook_size=16, structure="residual"), curvature=found)
    assert isinstance(small.inner["bags"], CompressedEmbeddingBag)
    with pytest.raises(ValueError, match="curvature"):
        compress(Plain(), PQ, curvature={"rows": found["weighted"]})
