"""The curvature of sharded models: that of unsharded ones, from the batches of all ranks, and nothing moves for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.sharding.models import local_state, loss_of, optimizer_of
from tests.sharding.test_trained import draw, model_of, sharded_model
from torchrec_compress import Curvature, measure_curvature

STEPS = 3


class Stock(nn.Module):
    """A stock collection, pooled or not, under a linear layer."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_embeddings": 100, "embedding_dim": 8}
        if pooled:
            bags = [EmbeddingBagConfig(name=name, feature_names=[name], **options) for name in ("user", "word")]
            self.embeddings: nn.Module = EmbeddingBagCollection(bags)
        else:
            rows = [EmbeddingConfig(name=name, feature_names=[name], **options) for name in ("user", "word")]
            self.embeddings = EmbeddingCollection(rows)
        self.over, self.pooled = nn.Linear(8, 1), pooled

    def forward(self, features: Any) -> Tensor:
        found = self.embeddings(features)
        pair = [found[name] for name in ("user", "word")]
        if self.pooled:
            return self.over(pair[0] * torch.tanh(pair[1]))
        return self.over(torch.cat([rows.values() for rows in pair])).tanh()


def make(form: str) -> nn.Module:
    """Return the unsharded model."""
    if form.startswith("stock"):
        model = Stock(form == "stock bags")
        native = list(model.embeddings.parameters())
        apply_optimizer_in_backward(torch.optim.Adagrad, native, {"lr": 0.1})
        return model
    return model_of(form != "rows", form == "weighted bags", form == "means")


def batches_of(form: str, rank: int) -> list[Any]:
    whole = [draw("uneven", step, rank, form == "weighted bags") for step in range(STEPS)]
    if not form.startswith("stock"):
        return whole
    return [batch.permute([batch.keys().index(name) for name in ("user", "word")]) for batch in whole]


def measure(form: str, how: str) -> tuple[dict[str, Curvature], bool, Tensor]:
    """Return the curvature of a sharded model, whether its state is what it was, and its dense layer, trained after."""
    if form.startswith("stock"):
        sharded: Any = DistributedModelParallel(make(form), device=torch.device("cpu"))
        values = {name: value for name, value in make(form).state_dict().items() if not name.startswith("over")}
        sharded.load_state_dict(values, strict=False)
        sharded.module.over.load_state_dict(make(form).over.state_dict())  # type: ignore[union-attr, operator]
    else:
        sharded = sharded_model(how, form)
    optimizer, mine = optimizer_of(sharded), batches_of(form, dist.get_rank())
    before: dict[str, Any] = local_state(sharded)
    same = True
    found = measure_curvature(sharded, mine, loss="mse")
    after: dict[str, Any] = local_state(sharded)
    for name, value in before.items():
        pairs = zip(value, after[name], strict=True) if isinstance(value, list) else [((0, value), (0, after[name]))]
        same &= all(torch.equal(one[1], other[1]) for one, other in pairs)
    for _ in range(2):  # wrappers neither wait for a backward nor have learned a wrong one
        optimizer.zero_grad()
        loss_of(sharded, mine[0]).backward()
        optimizer.step()
        measure_curvature(sharded, mine, loss="mse")
    layer = next(value for name, value in sharded.named_parameters() if name.endswith("over.weight"))
    return found, same and sharded.training, layer.detach().clone()


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("bags", "row_wise"),
        ("means", "table_wise"),
        ("weighted bags", "row_wise"),
        ("rows", "row_wise"),
        ("stock bags", ""),
        ("stock rows", ""),
    ],
)
def test_sharded_is_as_unsharded(two_ranks, form, how):
    answers = two_ranks.run(measure, form, how)
    model, every = make(form), [batch for rank in range(2) for batch in batches_of(form, rank)]
    wanted = measure_curvature(model, every, loss="mse")
    for found, same, _ in answers:
        assert same
        for name, each in wanted.items():
            assert (found[name].lookups, found[name].examples) == (each.lookups, each.examples), name
            torch.testing.assert_close(found[name].matrix, each.matrix, rtol=1e-4, atol=1e-7)
    (first, _, weight), (second, _, other) = answers
    assert torch.equal(weight, other) and not torch.equal(weight, dict(model.named_parameters())["over.weight"])
    assert all(first[name].to_dict()["moved"] == second[name].to_dict()["moved"] for name in wanted)
    assert all(torch.equal(first[name].witnesses.bags, second[name].witnesses.bags) for name in wanted)


def fail_on_one() -> str:
    sharded, rank = sharded_model("row_wise", "bags"), dist.get_rank()
    factors = iter([1.0, math.inf if rank == 1 else 1.0, 1.0])
    with pytest.raises(ValueError, match="gradients must be finite") as error:
        measure_curvature(sharded, batches_of("bags", rank), lambda net, batch: net(batch) * next(factors), "mse")
    return str(error.value)


def test_what_is_not_finite_on_one_rank_is_an_error_on_all(two_ranks):
    first, second = two_ranks.run(fail_on_one)
    assert first == second
    assert "table 'item'" in first and "batch 2 of rank 1" in first
