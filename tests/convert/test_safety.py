"""What a module would lose if another stood in its place is refused by name; what it has is kept."""

import logging

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig

from tests.cases import counts
from tests.convert.test_models import PQ, D, Model, N, pooled, unpooled
from torchrec_compress import (
    CompressedEmbedding,
    CompressedEmbeddingCollection,
    compress,
    decompress,
    measure_curvature,
)
from torchrec_compress.methods import HashConfig, Int8Config, PQConfig, RandomCodesConfig


def with_hook(register):
    model = Model()
    register(model.shop)
    return model


def with_more(change):
    model = nn.Sequential(nn.Embedding(N, D))
    change(model[0])
    return model


class FSDPModule(nn.Sequential):
    """Of the name that PyTorch's second one mixes in."""


def same_values():
    model = nn.ModuleDict({"a": nn.Embedding(N, D), "out": nn.Linear(D, N, bias=False)})
    model["out"].weight = nn.Parameter(model["a"].weight)
    return model


HOOKS = [
    lambda table: table.register_forward_hook(lambda *_: None),
    lambda table: table.register_forward_pre_hook(lambda *_: None),
    lambda table: table.register_full_backward_hook(lambda *_: None),
    lambda table: table.register_full_backward_pre_hook(lambda *_: None),
    lambda table: table.register_state_dict_post_hook(lambda *_: None),
    lambda table: table.register_load_state_dict_post_hook(lambda *_: None),
    lambda table: table.weight.register_hook(lambda gradient: gradient),
    lambda table: table.weight.register_post_accumulate_grad_hook(lambda _: None),
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_are_not_lost(register):
    with pytest.raises(ValueError, match="'shop': a module that is replaced must have no hooks, on its weight neither"):
        compress(with_hook(register), PQ)
    assert compress(with_hook(register), {"user": PQ, "item": PQ}).shop.padding_idx == 2  # what stays may have them


def test_hooks_inside_a_collection_are_not_lost():
    model = nn.Sequential(pooled("user"))
    model[0].embedding_bags["user"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'0': a module that is replaced must have no hooks"):
        compress(model, PQ)
    small = compress(nn.Sequential(pooled("user")), PQ)
    small[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'0': a module that is replaced must have no hooks"):
        decompress(small)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: with_more(lambda t: t.register_parameter("scale", nn.Parameter(torch.ones(1)))),
            r"got \['scale'\] bes",
        ),
        (lambda: with_more(lambda t: t.register_buffer("seen", torch.ones(1))), r"its tables alone, got \['seen'\]"),
        (
            lambda: with_more(lambda t: setattr(t, "more", nn.Linear(1, 1))),
            r"alone, got \['more', 'more.bias', 'more.we",
        ),
        (lambda: with_more(lambda t: setattr(t, "forward", lambda ids: ids)), "must have the forward of its class"),
        (lambda: FSDPModule(nn.Embedding(N, D)), "must not be wrapped by FSDPModule, got 'the model'"),
        (same_values, r"got \['a.weight', 'out.weight'\] tied"),
    ],
)
def test_more_than_a_table_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        compress(model(), {"a": PQ} if model is same_values else PQ)


class Listed(nn.Module):
    """Holds its table in a list, and its forward as a method, beside the attribute."""

    def __init__(self, how):
        super().__init__()
        self.table = nn.Embedding(N, D)
        if how == "list":
            self.all = [self.table]
        elif how == "dict":
            self.all = {"of": {"kind": self.table}}
        else:
            self.look = self.table.forward


@pytest.mark.parametrize("how", ["list", "dict", "method"])
def test_what_cannot_be_reached_in_place_is_refused(how):
    with pytest.raises(ValueError, match=r"'table' must be held as a submodule alone, got .*compress a copy"):
        compress(Listed(how), PQ, inplace=True)
    copy = compress(Listed(how), PQ)
    held = {"list": lambda: copy.all[0], "dict": lambda: copy.all["of"]["kind"], "method": lambda: copy.look.__self__}
    assert held[how]() is copy.table and isinstance(copy.table, CompressedEmbedding)


def test_a_path_comes_before_another_modules_other_name():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Embedding(N, D)}), "a_b": nn.Embedding(N, D)})
    small = compress(model, {"a_b": PQ})
    assert type(small["a"]["b"]) is nn.Embedding and isinstance(small["a_b"], CompressedEmbedding)
    small = compress(model, PQ, counts={"a_b": counts(), "a.b": counts()})
    assert isinstance(small["a"]["b"], CompressedEmbedding)
    both = nn.ModuleDict({"sparse": pooled("user"), "user": nn.Embedding(N, D)})
    small = compress(both, {"user": PQ, "sparse.user": Int8Config()})
    assert small["user"].method == PQ and small["sparse"].methods() == {"user": Int8Config()}


def test_exact_names_come_before_patterns():
    small = compress(Model(), {"*": Int8Config(), "user": PQ, "bags.item": HashConfig(num_buckets=9)})
    assert small.bags.methods() == {"user": PQ, "item": HashConfig(num_buckets=9)}
    assert small.shop.method == Int8Config()


class Own(EmbeddingBagCollection):
    def forward(self, features):
        return super().forward(features)


def test_subclasses_with_a_forward_of_their_own_stay(caplog):
    model = nn.Sequential(Own(pooled("user").embedding_bag_configs()), nn.Embedding(N, D))
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.models"):
        small = compress(model, PQ)
    assert type(small[0]) is Own and "'0': left as it is" in caplog.text


def test_settings_that_are_gone_are_told(caplog):
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert"):
        compress(nn.Sequential(nn.Embedding(N, D, sparse=True)), PQ)
        compress(pooled("user").half(), PQ)
    assert "sparse=True is gone" in caplog.text and "tables ['user']: are in another dtype" in caplog.text


def test_seed_mode_and_frozen_rows_reach_every_kind():
    config = RandomCodesConfig(num_codes=2, codebook_size=16)
    ids = torch.arange(N)
    for kind in (nn.Embedding, nn.EmbeddingBag):
        plain = kind(N, D).eval()
        plain.weight.requires_grad_(False)
        one, two = (compress(plain, config, seed=seed) for seed in (0, 1))
        assert not torch.equal(one.collection.table_rows("embedding", ids), two.collection.table_rows("embedding", ids))
        assert not one.training and not any(each.requires_grad for each in one.parameters())
        back = decompress(one)
        assert not back.training and not back.weight.requires_grad
    last = compress(nn.EmbeddingBag(N, D, mode="sum", include_last_offset=True), PQ)
    assert last.include_last_offset and decompress(last).include_last_offset
    kept = EmbeddingCollection([EmbeddingConfig(name="a", num_embeddings=N, embedding_dim=D, feature_names=["a"])])
    small = compress(nn.Sequential(kept.eval()), PQ)
    assert isinstance(small[0], CompressedEmbeddingCollection) and not small[0].training
    assert not decompress(small)[0].training and unpooled("a").training


def test_nothing_is_drawn():
    model = nn.Sequential(nn.Embedding(N, D), nn.EmbeddingBag(N, D), pooled("user"), unpooled("item"))
    before = torch.get_rng_state()
    decompress(compress(model, PQ))
    assert torch.equal(before, torch.get_rng_state())


def test_padding_is_no_look_up_of_a_compressed_table():
    config = PQConfig(num_codes=2, codebook_size=16)
    ids = torch.tensor([[3, 1, 1], [5, 1, 9], [7, 8, 1]])
    for make in (lambda: nn.EmbeddingBag(N, D, mode="mean", padding_idx=1), lambda: nn.Embedding(N, D, padding_idx=1)):
        model = nn.Sequential(make())

        def forward(model, batch):
            return model(batch).reshape(3, -1).sum(dim=1)

        small = compress(model, config)
        found, again = (measure_curvature(each, [ids], forward, "mse")["0"] for each in (model, small))
        assert found.lookups == again.lookups == 5
        torch.testing.assert_close(found.matrix, again.matrix)


def test_maxima_have_no_curvature():
    model = nn.ModuleList([nn.EmbeddingBag(N, D, mode="max"), nn.Embedding(N, D)])
    found = measure_curvature(model, [torch.arange(6)], lambda m, ids: m[1](ids).sum(dim=1), "mse")
    assert set(found) == {"1"}
