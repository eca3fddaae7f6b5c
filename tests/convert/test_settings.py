"""What tables of a collection are told by hand, beside their configs, is refused by name; so is what is not a table."""

import copy
import logging
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from torchrec import EmbeddingBagCollection

from tests.convert.test_models import D, N, pooled, unpooled
from tests.convert.test_safety import HOOKS
from torchrec_compress import CompressedEmbedding, CompressedEmbeddingBagCollection, compress, decompress
from torchrec_compress.methods import HashConfig, PQConfig

PQ = PQConfig(num_codes=2, codebook_size=16)


class Twice(nn.Module):
    def forward(self, rows):
        return 2 * rows


class Own(EmbeddingBagCollection):
    def forward(self, features):
        return super().forward(features)


class OwnSmall(CompressedEmbeddingBagCollection):
    def forward(self, features):
        return super().forward(features)


def set_to(table, **settings):
    for name, value in settings.items():
        setattr(table, name, value)


SETTINGS = {
    "padding_idx": (partial(set_to, padding_idx=0), "padding_idx must be None, as its config has it, got 0"),
    "max_norm": (partial(set_to, max_norm=1.0), "max_norm must be None, as its config has it, got 1.0"),
    "scale": (
        partial(set_to, scale_grad_by_freq=True),
        "scale_grad_by_freq must be False, as its config has it, got T",
    ),
    "forward": (partial(set_to, forward=lambda ids: ids), "must have the forward of its class, got one of its own"),
    "child": (partial(set_to, more=nn.ReLU()), r"must hold its tables alone, got \['embedd.*user.more'\] beside them"),
    "parameter": (lambda table: table.register_parameter("scale", nn.Parameter(torch.ones(1))), "user.scale'. beside"),
    "buffer": (lambda table: table.register_buffer("seen", torch.ones(1)), "user.seen'. beside"),
    "parametrized": (
        lambda table: parametrize.register_parametrization(table, "weight", Twice()),
        "user.parametrizations.weight.original'. beside",
    ),
}


@pytest.mark.parametrize("make", [pooled, unpooled])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("change", "message"), SETTINGS.values(), ids=SETTINGS)
def test_of_a_table_in_a_collection(change, message, alone, make):
    source = make("user", "item")
    change((source.embedding_bags if make is pooled else source.embeddings)["user"])
    with pytest.raises(ValueError, match=message):
        compress(source if alone else nn.Sequential(source), PQ)


def test_pooling_that_is_not_the_configs():
    for settings, message in (
        ({"mode": "mean"}, "'0': table 'user': mode must be 'sum', as its config has it, got 'mean'"),
        ({"include_last_offset": False}, "include_last_offset must be True"),
    ):
        model = nn.Sequential(pooled("user"))
        set_to(model[0].embedding_bags["user"], **settings)
        with pytest.raises(ValueError, match=message):
            compress(model, PQ)


def test_another_module_in_the_place_of_a_table():
    class Sub(nn.EmbeddingBag):
        pass

    source = pooled("user")
    source.embedding_bags["user"] = Sub(N, D, mode="sum", include_last_offset=True)
    with pytest.raises(ValueError, match="table 'user': must be the EmbeddingBag that TorchRec makes, got Sub"):
        compress(source, PQ)


def change_kind(source):
    """Compress what is not compressed, expand what is."""
    inner = source[0] if isinstance(source, nn.Sequential) else source
    is_small = isinstance(inner, CompressedEmbeddingBagCollection | CompressedEmbedding)
    return decompress(source) if is_small else compress(source, PQ)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pooled("a"),
        lambda: nn.Embedding(N, D),
        lambda: compress(pooled("a"), PQ),
        lambda: compress(nn.Embedding(N, D), PQ),
    ],
    ids=["collection", "plain", "compressed collection", "compressed plain"],
)
def test_of_a_module_itself(make, alone):
    for change, message in (
        (partial(set_to, more=nn.ReLU()), r"must hold its tables alone, got \['more'\] beside them; leave it out"),
        (lambda source: source.register_parameter("scale", nn.Parameter(torch.ones(1))), r"got \['scale'\] beside"),
        (lambda source: source.register_buffer("seen", torch.ones(1)), r"got \['seen'\] beside"),
        (partial(set_to, forward=lambda ids: ids), "must have the forward of its class, got one of its own"),
        (lambda source: source.compile(backend="eager"), "a module that is replaced must not be compiled, as another"),
    ):
        source = make()
        change_kind(source if alone else nn.Sequential(source))
        change(source)
        with pytest.raises(ValueError, match=message):
            change_kind(source if alone else nn.Sequential(source))


def test_classes_with_a_forward_of_their_own():
    stock = Own(pooled("user").embedding_bag_configs())
    with pytest.raises(ValueError, match="'Own': must have the forward of its class, got one of its own"):
        compress(stock, PQ)
    small = OwnSmall(pooled("user").embedding_bag_configs(), compression=HashConfig(num_buckets=40))
    for source in (small, nn.Sequential(small)):
        with pytest.raises(ValueError, match="must have the forward of its class, got one of its own"):
            decompress(source)


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_one_module_are_not_lost(register):
    for source in (nn.Embedding(N, D), nn.EmbeddingBag(N, D), pooled("user")):
        kind = type(source).__name__
        register(source.embedding_bags["user"] if isinstance(source, EmbeddingBagCollection) else source)
        with pytest.raises(ValueError, match=f"'{kind}': a module that is replaced must have no hooks"):
            compress(source, PQ)


def test_hooks_inside_a_compressed_module_are_not_lost():
    for register in (
        lambda bank: bank.register_forward_hook(lambda *_: None),
        lambda bank: bank.register_state_dict_post_hook(lambda *_: None),
        lambda bank: bank.codebooks.register_hook(lambda gradient: gradient),
    ):
        small = compress(pooled("user"), PQ)
        register(small.decoder.banks["user"])
        with pytest.raises(ValueError, match="'CompressedEmbeddingBagCollection': a module that is replaced must have"):
            decompress(small)


def test_weights_that_a_hook_makes_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn.utils.weight_norm is on its way out
        for source in (nn.Embedding(N, D), pooled("user")):
            weight_norm(source.embedding_bags["user"] if isinstance(source, EmbeddingBagCollection) else source)
            with pytest.raises(ValueError, match="a module that is replaced must have no hooks"):
                compress(source, PQ)


def test_a_table_that_is_compiled_is_refused():
    source = pooled("user", "item")
    source.embedding_bags["user"].compile(backend="eager")
    for each in (source, nn.Sequential(source)):
        with pytest.raises(ValueError, match="must not be compiled, as another takes its place, got one after compile"):
            compress(each, PQ)
    assert isinstance(compress(copy.deepcopy(source), PQ), CompressedEmbeddingBagCollection)  # as the error says


@pytest.mark.parametrize("inplace", [False, True])
def test_a_copy_is_not_compiled_which_is_told(inplace, caplog):
    model = nn.Sequential(nn.Embedding(N, D), nn.Linear(D, D), nn.Linear(D, D))
    model[1].compile(backend="eager")
    model.compile(backend="eager")
    small = compress(model, PQ, inplace=inplace)
    told = [record.message for record in caplog.records if "compiled no more" in record.message]
    assert (told == []) == inplace == (small[1]._compiled_call_impl is not None)
    assert inplace or told[0].startswith("compress: ['the model', '1'] are compiled no more in the copy")


def test_attributes_that_are_gone_are_told(caplog):
    sources = [nn.Embedding(N, D), nn.EmbeddingBag(N, D), pooled("user"), unpooled("user")]
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.safety"):
        for source in sources:
            decompress(compress(source, PQ))
    assert caplog.records == []
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.safety"):
        for source in sources:
            source.label, small = "shops", compress(copy.copy(source), PQ)
            small.owner = "us"
            compress(source, PQ)
            decompress(small)
    assert [record.message.split(": ")[2] for record in caplog.records] == [
        "attributes ['label'] that were set on the module are gone",
        "attributes ['owner'] that were set on the module are gone",
    ] * len(sources)


def test_sparse_gradients_are_told(caplog):
    plain, source = nn.Embedding(N, D, sparse=True), pooled("user")
    source.embedding_bags["user"].sparse = True
    with caplog.at_level(logging.WARNING, "torchrec_compress.convert.safety"):
        for each in (plain, source, nn.Sequential(source)):
            compress(each, PQ)
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "'Embedding'",
        "'EmbeddingBagCollection'",
        "'0'",
    ]
    assert all("sparse=True is gone" in record.message for record in caplog.records)
