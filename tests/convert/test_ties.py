"""A table that something else of the model holds, or whose values it holds, is refused by name, wherever that is."""

from collections import deque
from functools import partial

import pytest
import torch
from torch import nn

from tests.convert.test_models import D, N, pooled
from torchrec_compress import CompressedEmbedding, compress, compress_dense, decompress
from torchrec_compress.methods import PQConfig

PQ = PQConfig(num_codes=2, codebook_size=16)


class Holder(nn.Module):
    """Holds a table, and something of it as `held`."""

    def __init__(self, hold):
        super().__init__()
        self.table, self.net = nn.Embedding(N, D), nn.Linear(D, 64)
        hold(self)

    def forward(self, ids):
        return self.net(self.table(ids))


def holding(what):
    return lambda: Holder(lambda model: setattr(model, "held", what(model)))


VALUES = {
    "buffer": lambda: Holder(lambda model: model.register_buffer("held", model.table.weight.detach())),
    "child's buffer": lambda: Holder(lambda model: model.net.register_buffer("held", model.table.weight.detach())),
    "tensor": holding(lambda model: model.table.weight.data),
    "part": holding(lambda model: model.table.weight.detach()[:7]),
    "list": holding(lambda model: [model.table.weight]),
    "dict": holding(lambda model: {"a": ({"b": [model.table.weight]},)}),
    "partial": holding(lambda model: partial(nn.functional.embedding, weight=model.table.weight)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_values_that_something_else_holds(make, inplace):
    model = make()
    with pytest.raises(ValueError, match=r"compress: a table must not share its weight .*got \[.*held.*\] tied"):
        compress(model, PQ, inplace=inplace)
    assert type(model.table) is nn.Embedding


def test_values_that_something_else_holds_of_a_compressed_table():
    small = compress(nn.Sequential(pooled("user")), PQ)
    small.held = [small[0].decoder.banks["user"].codebooks]
    with pytest.raises(ValueError, match=r"decompress: a table must not share .*'held'.* tied"):
        decompress(small)


def reader(table):
    return lambda ids: table(ids)


MODULES = {
    "deep": lambda model: {"a": {"b": {"c": [model.table]}}},
    "set": lambda model: frozenset([model.table]),
    "deque": lambda model: deque([model.table]),
    "partial": lambda model: partial(model.table),
    "argument": lambda model: partial(map, model.table),
    "keyword": lambda model: partial(sorted, key=model.table),
    "method in partial": lambda model: partial(model.table.forward),
    "methods": lambda model: [model.table.forward],
    "inner function": lambda model: reader(model.table),
    "inner functions": lambda model: {"read": reader(model.table)},
}


@pytest.mark.parametrize("what", MODULES.values(), ids=MODULES)
def test_a_module_that_something_else_holds(what):
    model = holding(what)()
    with pytest.raises(ValueError, match="compress: 'table' must be held as a submodule alone, got 'held' that holds"):
        compress(model, PQ, inplace=True)
    assert type(model.table) is nn.Embedding
    assert type(compress(model, PQ).table) is CompressedEmbedding


@pytest.mark.parametrize("what", [lambda model: model.forward, lambda model: reader(model), lambda model: [1, "a"]])
def test_what_holds_the_model_may_stay(what):
    model = holding(what)()
    assert compress(model, PQ, inplace=True) is model and type(model.table) is CompressedEmbedding


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda model: model.net.weight.data, r"layers must not share weights, got \['held', 'net.weight'\] tied"),
        (lambda model: [model.net.weight], r"layers must not share weights, got \['held', 'net.weight'\] tied"),
        (lambda model: partial(model.net), "'net' must be held as a submodule alone, got 'held' that holds"),
    ],
)
def test_of_dense_layers(what, message):
    model = holding(what)()
    with pytest.raises(ValueError, match=message):
        compress_dense(model, [torch.arange(N)], 2.0, inplace=True)
