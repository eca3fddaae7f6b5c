"""`compress` of sharded models: each rank encodes its rows, and the outcome is that of the unsharded model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.cases import CONFIGS, IDS, contexts, counts
from torchrec_compress import compress, get_default_sharders, native_parameters
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.seams import local_shards, sharded_configs
from torchrec_compress.sharding.loading import load_plain

N, D = 403, 16
NAMES = ("item", "user")
GIVEN: dict[str, Any] = {
    "counts": {name: counts() for name in NAMES},
    "contexts": {name: contexts() for name in NAMES},
}


class Model(nn.Module):
    """A collection, pooled or not, under a linear layer."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_embeddings": N, "embedding_dim": D}
        if pooled:
            bags = [EmbeddingBagConfig(name=name, feature_names=[name], **options) for name in NAMES]
            self.sparse: nn.Module = EmbeddingBagCollection(bags)
        else:
            rows = [EmbeddingConfig(name=name, feature_names=[name], **options) for name in NAMES]
            self.sparse = EmbeddingCollection(rows)
        with torch.no_grad():
            for weight in self.sparse.parameters():
                weight.normal_()
        self.over, self.pooled = nn.Linear(D, 1), pooled

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.sparse(features)
        first, second = (found[name] if self.pooled else found[name].values() for name in NAMES)
        return self.over(first * torch.tanh(second))


def batch() -> KeyedJaggedTensor:
    ids = torch.cat([torch.arange(N), torch.arange(N - 1, -1, -1)])
    return KeyedJaggedTensor.from_lengths_sync(list(NAMES), ids, torch.ones(2 * N, dtype=torch.int64))


def shard(pooled: bool, how: str) -> DistributedModelParallel:
    """Return the model over all ranks, its tables cut so."""
    model = Model(pooled)
    apply_optimizer_in_backward(torch.optim.SGD, model.sparse.parameters(), {"lr": 0.1})
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    world, cuts = dist.get_world_size(), {"row_wise": row_wise(), "column_wise": column_wise(ranks=[1, 0])}
    cuts |= {"table_wise": table_wise(rank=world - 1), "data_parallel": data_parallel()}
    sharders: list[Any] = get_default_sharders()
    sharder = EmbeddingBagCollectionSharder() if pooled else EmbeddingCollectionSharder()
    wanted = {
        "item": cuts["table_wise" if how == "mixed" else how],
        "user": cuts["row_wise" if how == "mixed" else how],
    }
    cut = construct_module_sharding_plan(model.sparse, wanted, sharder, world, world, "cpu")
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"sparse": cut}), sharders=sharders
    )
    load_plain(sharded, values)
    return sharded


def with_optimizer(model: nn.Module) -> None:
    """Give trained rows, which refuse a training without, an optimizer."""
    native = native_parameters(model)
    if native:
        apply_optimizer_in_backward(torch.optim.SGD, native, {"lr": 0.0})


def wrap(model: nn.Module) -> DistributedModelParallel:
    with_optimizer(model)
    return DistributedModelParallel(model, device=torch.device("cpu"), sharders=get_default_sharders())


def compressed(pooled: bool, how: str, config: MethodConfig) -> tuple[Tensor, Tensor, bool]:
    """Return what a sharded model serves before and after, and whether its tables were ours after."""
    sharded = shard(pooled, how)
    sharded.eval()
    before = sharded(batch()).detach()
    small = compress(sharded, config, inplace=True, seed=3, **GIVEN)
    assert isinstance(small, DistributedModelParallel)
    small.eval()
    after = small(batch()).detach()
    return before, after, sharded_configs(small.module.sparse) is None  # type: ignore[union-attr]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_method_is_as_unsharded(two_ranks, config):
    model = Model(True).eval()
    wanted = compress(model, config, seed=3, **GIVEN)(batch()).detach()
    for before, after, is_ours in two_ranks.run(compressed, True, "row_wise", config):
        assert is_ours
        torch.testing.assert_close(before, model(batch()).detach())
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "pooled"),
    [
        ("table_wise", True),
        ("column_wise", True),
        ("data_parallel", True),  # unpooled, TorchRec 1.8 pools such rows on a CPU
        ("mixed", True),
        ("row_wise", False),
        ("table_wise", False),
        ("column_wise", False),
    ],
)
def test_rows_come_from_any_cut(two_ranks, how, pooled):
    """Codes, hot rows and the index of coded ids are the same, whoever held the rows."""
    config = PQConfig(num_codes=2, codebook_size=32, num_hot_rows=20, num_coded=150, popularity="count")
    model = Model(pooled).eval()
    wanted = compress(model, config, seed=3, **GIVEN)(batch()).detach()
    for before, after, _ in two_ranks.run(compressed, pooled, how, config):
        torch.testing.assert_close(before, model(batch()).detach())
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


def test_more_ranks_than_shards(four_ranks):
    config = {"item": NarrowConfig(width=8, bits=8), "user": DenseConfig()}
    wanted = compress(Model(True).eval(), config, seed=3, **GIVEN)(batch()).detach()
    for _, after, _ in four_ranks.run(compressed, True, "table_wise", config):
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


def go_on(config: MethodConfig) -> list[float]:
    """Return losses of a model that is compressed in the middle of its training."""
    sharded = shard(True, "row_wise")
    target = torch.sin(torch.arange(N).float()).unsqueeze(1)
    losses = []

    def train(model: DistributedModelParallel, steps: int) -> None:
        dense = [value for _, value in in_backward_optimizer_filter(model.named_parameters())]
        optimizer = torch.optim.Adam(dense, lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(batch()) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    train(sharded, 3)
    net = sharded.module.over.weight.detach().clone()  # type: ignore[union-attr, operator]
    small = compress(sharded, config, inplace=True, counts=GIVEN["counts"], wrap=wrap)
    assert torch.equal(small.module.over.weight, net)  # type: ignore[union-attr]
    train(small, 12)
    weights = small.module.over.weight.detach()  # type: ignore[union-attr]
    everyone = [torch.zeros_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, weights)
    assert all(torch.equal(weights, other) for other in everyone)  # the net is still trained together
    return losses


@pytest.mark.parametrize(
    "config",
    [PQConfig(num_codes=4, codebook_size=64), NarrowConfig(width=8, bits=8), HashConfig(num_buckets=200)],
    ids=lambda config: config.method,
)
def test_training_goes_on(two_ranks, config):
    first, second = two_ranks.run(go_on, config)
    assert first == second  # batches are alike, so that losses are
    before, at_once, at_last = first[2], first[3], first[-1]
    assert at_once < 2 * before and at_last < 0.9 * at_once


def refuse(kind: str) -> str:
    """Return what rank sees where compression fails; the model goes on serving."""
    sharded, rank = shard(True, "row_wise"), dist.get_rank()
    sharded.eval()
    config: Any = PQConfig(num_codes=4, codebook_size=16)
    given = dict(GIVEN)
    if kind == "nan" and rank == 1:
        sharded.module.sparse.state_dict()["embedding_bags.item.weight"].local_shards()[0].tensor[-1, 3] = torch.nan  # type: ignore[union-attr, operator]
    if kind == "counts" and rank == 1:
        given["counts"] = {"item": counts() + 1, "user": counts()}
    if kind == "config" and rank == 1:
        config = PQConfig(num_codes=2, codebook_size=16)
    if kind == "name":
        config = {"items": config}
    if kind == "low":
        config = Int8Config()
        if rank == 1:
            sharded.module.sparse.state_dict()["embedding_bags.user.weight"].local_shards()[0].tensor[-1, 3] = 1e30  # type: ignore[union-attr, operator]
    before = sharded(batch()).detach()
    with pytest.raises(ValueError) as error:
        compress(sharded, config, inplace=kind != "copy", **given)
    torch.testing.assert_close(sharded(batch()).detach(), before, equal_nan=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "sparse: .*table 'item': pre-trained rows must be finite, got NaN or infinity in the row of id 402"),
        ("counts", r"counts must be the same on all ranks, got others on ranks \[1\] than on rank 0; add them up"),
        ("config", r"methods must be the same on all ranks, got others on ranks \[1\]"),
        ("name", r"every key must fit a table, got \['items'\]; did you mean 'item'\?"),
        ("low", "sparse: .*table 'user': pre-trained rows must be at most"),
        ("copy", "must be compressed in place, as no copy of its shards is made; pass inplace=True"),
    ],
)
def test_errors_are_those_of_all_ranks(two_ranks, kind, message):
    for said in two_ranks.run(refuse, kind):
        assert re.search(message, said), said


def largest() -> tuple[int, int]:
    """Return the most bytes that one tensor of float32 took on this rank, and those of a whole table."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for each in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(each, Tensor) and each.dtype == torch.float32 and each.device.type == "cpu":
                    self.most = max(self.most, each.numel())
            return found

    rows = 300_000
    torch.manual_seed(0)
    table = EmbeddingBagConfig(name="item", num_embeddings=rows, embedding_dim=D, feature_names=["item"])
    model: Any = nn.Sequential(EmbeddingBagCollection([table], device=torch.device("meta")))
    sharders: list[Any] = get_default_sharders()
    cut = construct_module_sharding_plan(model[0], {"item": row_wise()}, sharders[0], 4, 4, "cpu")
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"0": cut}), sharders=sharders, init_data_parallel=False
    )
    with Watch() as watch:
        small: Any = compress(sharded, PQConfig(num_codes=2, codebook_size=16), inplace=True)
    shards = local_shards(small.state_dict()["0.code_tables.banks.item.codes"])
    assert all(local.shape[0] <= rows // 2 for local, _ in shards)
    return watch.most, rows * D


def test_no_rank_holds_a_whole_table(four_ranks):
    for most, whole in four_ranks.run(largest):
        assert 0 < most <= whole // 2, (most, whole)


class Two(nn.Module):
    """Two collections, of which one is compressed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [EmbeddingBagConfig(name=n, num_embeddings=N, embedding_dim=D, feature_names=[n]) for n in NAMES]
        self.first, self.second = EmbeddingBagCollection(tables[:1]), EmbeddingBagCollection(tables[1:])
        self.over = nn.Linear(2 * D, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.over(torch.cat([self.first(features)["item"], self.second(features)["user"]], dim=1))


def leave_one(default_wrap: bool) -> list[float]:
    """Return losses of a model of which one collection is compressed in the middle of its training."""
    model = Two()
    for part in (model.first, model.second):
        apply_optimizer_in_backward(torch.optim.Adagrad, part.parameters(), {"lr": 0.1})
    sharders: list[Any] = get_default_sharders()
    sharder, world = EmbeddingBagCollectionSharder(), dist.get_world_size()
    cuts = {
        path: construct_module_sharding_plan(getattr(model, path), {name: row_wise()}, sharder, world, world, "cpu")
        for path, name in zip(("first", "second"), NAMES, strict=True)
    }
    plan, cpu = ShardingPlan(dict(cuts)), torch.device("cpu")
    wrapped = DistributedModelParallel(model, device=cpu, plan=plan, sharders=sharders)
    wrapped(batch()).square().mean().backward()

    def second() -> tuple[Tensor, Tensor]:
        """Return this rank's rows of what stays, and their optimizer's state."""
        stays: Any = wrapped.module.second  # type: ignore[union-attr]
        ((rows, _),) = local_shards(stays.state_dict()["embedding_bags.user.weight"])
        states = [value for key, value in wrapped.fused_optimizer.state_dict()["state"].items() if "second" in key]
        found = [value for state in states for value in state.values()]
        (sums,) = [value for value in found if local_shards(value)[0][0].dim() > 0]
        return rows.clone(), local_shards(sums)[0][0].clone()

    def again(model: Any) -> DistributedModelParallel:
        assert native_parameters(model.first) == []
        return DistributedModelParallel(model, device=cpu, sharders=sharders)

    def fail(model: Any) -> Any:
        assert not isinstance(model.first, EmbeddingBagCollection)
        raise RuntimeError("no plan")

    config = PQConfig(num_codes=2, codebook_size=16)
    before, served = second(), wrapped(batch()).detach()
    kinds = {path: type(each) for path, each in wrapped.module.named_modules()}
    for bad, message in (
        (fail, "no plan"),
        (lambda model: model, "wrap must return a DistributedModelParallel, got Two"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            compress(wrapped, {"first.*": config}, inplace=True, wrap=bad)
        assert kinds == {path: type(each) for path, each in wrapped.module.named_modules()}
        assert torch.equal(wrapped(batch()).detach(), served)
    options: dict[str, Any] = {} if default_wrap else {"wrap": again}
    wrapped = compress(wrapped, {"first.*": config}, inplace=True, **options)
    after = second()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    wrapped(batch()).square().mean().backward()
    moved, sums = second()
    assert not torch.equal(moved, after[0]) and bool((sums >= after[1]).all()) and not torch.equal(sums, after[1])
    return [float(sums.sum())]


@pytest.mark.parametrize("default_wrap", [True, False])
def test_collections_without_a_key_stay_sharded_with_their_optimizers(two_ranks, default_wrap):
    first, second = two_ranks.run(leave_one, default_wrap)
    assert first != second
