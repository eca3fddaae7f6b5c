"""Tables that are built anew with other methods: each is trained by the optimizer that it had."""

import pytest
import torch
from torch import nn
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.methods.throwaway import SharedHashConfig, registered
from tests.planner.plans import model, topology
from torchrec_compress import native_parameters
from torchrec_compress.compression import Frontier
from torchrec_compress.compression.knapsack import Candidate
from torchrec_compress.methods import CafeConfig, DenseConfig, HashConfig, Int8Config, NarrowConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.planner.what_if import WhatIf
from torchrec_compress.seams import backward_optimizer
from torchrec_compress.sharding import get_default_sharders

ROWS, DIM = 4000, 32
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def weights(of: nn.Module) -> dict[str, nn.Parameter]:
    """Return what may step in the backward, by the user's table."""
    found = dict(of.named_parameters())
    return {
        path.split(".")[-2].partition("__")[0]: found[path]
        for path in found
        if any(parameter is found[path] for parameter in native_parameters(of))
    }


def marked(optimizers, methods=None):
    """Return a model whose tables are trained by an optimizer each, or by none."""
    made = model({name: DenseConfig() for name in optimizers} if methods is None else methods, ROWS, dim=DIM)
    for name, optimizer in optimizers.items():
        if optimizer is not None:
            apply_optimizer_in_backward(optimizer, [weights(made)[name]], {"lr": 0.1})
    return made


def names(optimizers):
    return {name: None if optimizer is None else optimizer.__name__ for name, optimizer in optimizers.items()}


def rebuilt(made, changes):
    """Return the optimizers of a model's tables after a change, by the user's table."""
    again = WhatIf(made, get_default_sharders()).build(changes)
    return {name: backward_optimizer(weight) for name, weight in weights(again).items()}


@pytest.mark.parametrize("first, second", [(SGD, ADAM), (ADAM, SGD), (None, RowWiseAdagrad)])
def test_a_choice_counts_the_state_that_a_plan_of_the_same_model_counts(first, second):
    optimizers, made = {"first": first, "second": second}, model(None, ROWS, dim=DIM)
    for name, optimizer in optimizers.items():
        if optimizer is not None:
            apply_optimizer_in_backward(optimizer, [weights(made)[name]], {"lr": 0.1})
    ways = {name: [Candidate(4 * ROWS * DIM, 0.0, DenseConfig())] for name in optimizers}
    planned, chosen = (EmbeddingShardingPlanner(topology(ranks=2), 16, stats=[]) for _ in range(2))
    planned.plan(made)
    choice = chosen.choose(made, Frontier({name: (ROWS, DIM) for name in optimizers}, ways, "loss"))
    state = {None: 0, SGD: 0, ADAM: 8 * ROWS * DIM, RowWiseAdagrad: 4 * ROWS}
    for name, optimizer in optimizers.items():
        assert planned.report.tables[name].optimizer_bytes == state[optimizer]
        assert chosen.report.tables[name].optimizer_bytes == state[optimizer]
    steps = [each.way.planned_bytes - state[optimizers[name]] for name, each in choice.tables.items()]
    assert steps[0] == steps[1] > 4 * ROWS * DIM


@pytest.mark.parametrize(
    "change",
    [
        DenseConfig(),
        HashConfig(num_buckets=40),
        CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4),
        NarrowConfig(width=8),
        NarrowConfig(width=8, bits=8),
    ],
    ids=lambda change: f"{change.method}{getattr(change, 'bits', '')}",
)
def test_whatever_stores_a_table_keeps_its_optimizer(change):
    optimizers = {"user": SGD, "item": ADAM, "day": None}
    made = marked(optimizers)
    assert rebuilt(made, {"user": change}) == names(optimizers)
    assert rebuilt(made, {"item": change}) == names(optimizers)
    assert rebuilt(made, {"day": change}) == names(optimizers)
    # and back again, of a collection that stores one so
    stored = marked(optimizers, {"user": DenseConfig(), "item": change, "day": DenseConfig()})
    assert rebuilt(stored, {"item": DenseConfig()}) == names(optimizers)


def test_what_trains_nothing_gets_what_its_neighbours_have():
    made = marked(
        {"user": SGD, "item": ADAM, "day": RowWiseAdagrad},
        {**dict.fromkeys(("user", "item", "day"), DenseConfig()), "codes": PQConfig(num_codes=4)},
    )
    assert rebuilt(made, {"codes": DenseConfig()})["codes"] == "Adam"  # of most state
    assert rebuilt(made, {"user": Int8Config()}) == {"item": "Adam", "day": "RowWiseAdagrad"}
    plain = marked({"user": None}, {"user": DenseConfig(), "codes": PQConfig(num_codes=4)})
    assert rebuilt(plain, {"codes": DenseConfig()}) == {"user": None, "codes": None}


def test_a_table_that_several_share_gets_the_optimizer_of_most_state():
    made, shared = marked({"first": SGD, "user": ADAM, "item": RowWiseAdagrad}), SharedHashConfig(num_buckets=40)
    with registered(SharedHashConfig):
        found = rebuilt(made, {"user": shared, "item": shared})
    assert found.pop("first") == "SGD" and list(found.values()) == ["Adam"]
