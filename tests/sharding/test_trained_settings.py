"""Whose settings sharded trained rows take, and which settings and plans are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed.remote_device import _remote_device
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.sharding.test_trained import ADAMS, SIZES, model_of
from torchrec_compress import native_parameters
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import compressed_sharders, get_default_sharders


class WithStock(torch.nn.Module):
    """A collection behind a stock one, which is sharded first."""

    def __init__(self) -> None:
        super().__init__()
        stock = EmbeddingBagConfig(name="stock", num_embeddings=20, embedding_dim=8, feature_names=["day"])
        self.stock = EmbeddingBagCollection([stock])
        self.embeddings = model_of(True).embeddings


def rates_beside_stock() -> dict[str, float]:
    model = WithStock()
    parameters = [*model.stock.parameters(), *native_parameters(model.embeddings)]
    apply_optimizer_in_backward(torch.optim.Adagrad, parameters, {"lr": 0.25, "eps": 1e-3})
    sharders = get_default_sharders()
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology, 8, stats=[]).collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    tables = sharded.module.embeddings.trained.banks
    return {name: (rows.optimizer.rate, rows.optimizer.eps, rows.optimizer.kind) for name, rows in tables.items()}


def test_the_rate_that_tables_share_reaches_all_of_them(two_ranks):
    """TorchRec's sharders take "lr" out of the settings that `apply_optimizer_in_backward` gave several tables."""
    for found in two_ranks.run(rates_beside_stock):
        kinds = {"item": "rowwise_adagrad", "user": "adagrad", "word": "adagrad"}
        assert found == {name: (0.25, 1e-3, kind) for name, kind in kinds.items()}


def settings_of(pooled: bool) -> list[tuple[str, float, float]]:
    """Return how tables train that nobody marked, beside sharders of bags and of rows that differ."""
    bags = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.25, "eps": 1e-3}
    rows = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.125, "eps": 1e-2}
    mine = [EmbeddingBagCollectionSharder(bags), EmbeddingCollectionSharder(rows)]
    sharders = [*mine, *compressed_sharders(mine)]
    model = model_of(pooled)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, 8, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    found = sharded.module.embeddings.trained.banks
    return [(each.optimizer.kind, each.optimizer.rate, each.optimizer.eps) for each in found.values()]


@pytest.mark.parametrize("pooled", [True, False])
def test_settings_are_those_of_the_users_sharder(two_ranks, pooled):
    found, again = two_ranks.run(settings_of, pooled)
    kind, rate, eps = ("adagrad", 0.25, 1e-3) if pooled else ("rowwise_adagrad", 0.125, 1e-2)
    assert found == again == [("rowwise_adagrad", rate, eps), (kind, rate, eps), (kind, rate, eps)]


def refused_settings(settings: dict, marks: dict | None = None) -> str:
    model = model_of(True)
    if marks is not None:
        apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(model), marks)
    sharders = get_default_sharders(fused_params=settings)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    try:
        plan = EmbeddingShardingPlanner(topology, 8, stats=[]).collective_plan(model, sharders, dist.GroupMember.WORLD)
        DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": EmbOptimType.LAMB}, "Adagrad, RowWiseAdagrad, Adam and PartialRowWiseAdam, got lamb"),
        ({"optimizer": EmbOptimType.EXACT_ADAGRAD, "beta1": 0.5}, "are trained without ['betas']"),
        ({"optimizer": EmbOptimType.ADAM}, "got rowwise_adagrad for adam; leave it out"),
        ({"optimizer": EmbOptimType.EXACT_ADAGRAD, "weight_decay": 0.1}, "are trained without ['weight_decay']"),
        ({"optimizer": EmbOptimType.EXACT_ADAGRAD, "max_gradient": 1.0}, "got ['max_gradient']; leave them out"),
    ],
)
def test_settings_that_rows_cannot_be_trained_by_are_refused(two_ranks, settings, message):
    assert all(message in told for told in two_ranks.run(refused_settings, settings))


@pytest.mark.parametrize(
    ("settings", "marks", "message"),
    [
        ({"weight_decay": 0.01}, {"lr": 0.1}, "are trained without ['weight_decay']"),
        ({}, {"lr": 0.1, "max_gradient": 1e-3}, "are trained without ['max_gradient'], got {'max_gradient': 0.001}"),
    ],
)
def test_no_setting_is_lost_beside_a_mark(two_ranks, settings, marks, message):
    assert all(message in told for told in two_ranks.run(refused_settings, settings, marks))


def adams(settings: dict) -> list[tuple] | str:
    """Return what trains each table, and the bytes of state that are planned for all ranks and held on this one."""
    model = model_of(True, mixed=ADAMS)
    # FBGEMM has no Adam on a CPU: its tables take another one
    stock = [parameter for parameter in native_parameters(model) if parameter.numel()]
    apply_optimizer_in_backward(torch.optim.SGD, stock, {"lr": 0.1})
    sharders = get_default_sharders(fused_params=settings)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, 8, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    try:
        sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    parts = [part for table in planner.report.tables.values() for part in table.parts] if planner.report else []
    planned = {part.path.split(".")[-1]: part.optimizer_bytes for part in parts if ".trained." in part.path}
    return [
        (rows.optimizer.kind, rows.optimizer.rate, rows.optimizer.betas, rows.state.numel(), planned.get(name))
        for name, rows in sharded.module.embeddings.trained.banks.items()
    ]


def test_adams_settings_by_fbgemms_names(two_ranks):
    settings = {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.25, "beta1": 0.5}
    found = two_ranks.run(adams, settings)
    kinds = ["partial_rowwise_adam", "adam", "adam"]
    assert [each[:3] for each in found[0]] == [(kind, 0.25, (0.5, 0.999)) for kind in kinds]
    sizes = [SIZES["item"] * (4 + 2 + 1), SIZES["user"] * 2 * (8 + 2), SIZES["word"] * 2 * 4 * 4]
    assert [one[3] + other[3] for one, other in zip(*found, strict=True)] == sizes
    assert [each[4] for each in next(mine for mine in found if mine[0][4] is not None)] == sizes
    for told in two_ranks.run(adams, {**settings, "beta2": 1.0}):
        assert "table 'item': betas must be in [0, 1), got (0.5, 1.0)" in told


def merged_settings() -> list[tuple]:
    model = model_of(True)
    apply_optimizer_in_backward(torch.optim.Adagrad, native_parameters(model), {"lr": 0.5})
    sharders = get_default_sharders(fused_params={"learning_rate": 0.7, "eps": 1e-3})
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology, 8, stats=[]).collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    return [(each.optimizer.rate, each.optimizer.eps) for each in sharded.module.embeddings.trained.banks.values()]


def test_a_mark_comes_before_the_sharders_settings(two_ranks):
    assert two_ranks.run(merged_settings) == [[(0.5, 1e-3)] * 3] * 2


def marked_twice() -> str:
    model = model_of(True)
    for kind in (RowWiseAdagrad, torch.optim.Adagrad):
        apply_optimizer_in_backward(kind, native_parameters(model.embeddings.trained), {"lr": 0.1})
    sharders = get_default_sharders(fused_params={"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1})
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology, 8, stats=[]).collective_plan(model, sharders, dist.GroupMember.WORLD)
    try:
        DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    return ""


def test_two_optimizers_of_one_table_are_refused(two_ranks):
    assert all("table 'item': rows must be trained by one optimizer, got 2" in t for t in two_ranks.run(marked_twice))


def crossed(part: str) -> str:
    """Return what a row-wise plan says whose first rows lie on the last rank."""
    sharders = get_default_sharders(fused_params={"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1})
    model = model_of(True)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    wishes = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("item", "user", "word", "code")}
    planner = EmbeddingShardingPlanner(topology, 8, wishes, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    (how, *_) = plan.plan[f"embeddings.{part}"].values()
    for shard in how.sharding_spec.shards:
        shard.placement = _remote_device(f"rank:{1 - shard.placement.rank()}/cpu")
    try:
        DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("part", ["trained", "code_tables"])
def test_rows_that_do_not_lie_in_the_order_of_the_ranks_are_refused(two_ranks, part):
    """TorchRec's exchange would send ids to the ranks that do not hold them."""
    for told in two_ranks.run(crossed, part):
        assert "per rank in the order of ranks, got rows [0, " in told and "on rank 1" in told
