"""Sharded tables with managers: against unsharded ones, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.sharding.models import RATE, Model, local_state, loss_of, optimizer_of, whole_state
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    after_step,
    native_parameters,
)
from torchrec_compress.methods import CafeConfig, DenseConfig, MethodConfig, PQConfig
from torchrec_compress.modules.after_step import managed_owners
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import get_default_sharders

STEPS, BAGS = 5, 4
CAFE = CafeConfig(num_hot_rows=8, num_cold_rows=20, num_blocks=4, threshold=1.5, decay=0.9)
TWO = CafeConfig(
    num_hot_rows=8, num_cold_rows=20, num_medium_rows=8, num_blocks=4, importance="frequency", medium_threshold=1.5
)
NARROW = CafeConfig(
    num_hot_rows=8, num_cold_rows=20, num_blocks=4, importance="frequency", threshold=1.5, width=4, rate=0.5
)
MIXED = {"item": CAFE, "user": TWO, "shop": NARROW, "word": PQConfig(num_codes=2, codebook_size=8), "*": DenseConfig()}


def model_of(pooled: bool, weighted: bool) -> Model:
    torch.manual_seed(0)
    sizes = {"item": 120, "user": 90, "shop": 100, "word": 80, "day": 7}
    kind: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    features = {name: [name, "also_item"] if name == "item" else [name] for name in sizes}
    tables = [
        kind(name=name, num_embeddings=size, embedding_dim=8, feature_names=features[name])
        for name, size in sizes.items()
    ]
    if pooled:
        return Model(CompressedEmbeddingBagCollection(tables, is_weighted=weighted, compression=MIXED))
    return Model(CompressedEmbeddingCollection(tables, compression=MIXED))


KEYS = {"item": 120, "also_item": 120, "user": 90, "shop": 100, "word": 80, "day": 7}


def draw(kind: str, step: int, rank: int, weighted: bool) -> KeyedJaggedTensor:
    """Return one rank's batch, steep."""
    seeded = torch.Generator().manual_seed(1000 * step + rank)
    num_bags = BAGS + rank if kind == "uneven" else BAGS
    longest = {"empty": 1, "rank 1 empty": 1 if rank == 1 else 4}.get(kind, 4)
    lengths = torch.randint(0, longest, (len(KEYS), num_bags), generator=seeded)
    values = [
        (torch.rand(number, generator=seeded) ** 3 * size).long()
        for size, number in zip(KEYS.values(), lengths.sum(1).tolist(), strict=True)
    ]
    ids = torch.cat(values).to(torch.int32 if kind == "int32" else torch.int64)
    weights = torch.rand(len(ids), generator=seeded) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(list(KEYS), ids, lengths.view(-1).to(ids.dtype), weights)


def train_sharded(how: str, kind: str, pooled: bool, weighted: bool) -> tuple[list[torch.Tensor], dict]:
    model = model_of(pooled, weighted)
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(model), {"lr": RATE})
    values = {name: value.clone() for name, value in model.state_dict().items()}
    wishes = {name: ParameterConstraints(sharding_types=[how]) for name in ("item", "user", "shop", "word")}
    wishes["day"] = ParameterConstraints(sharding_types=["table_wise"])
    planner = EmbeddingShardingPlanner(
        Topology(world_size=dist.get_world_size(), compute_device="cpu"), 8, wishes, stats=[]
    )
    sharders, group = get_default_sharders(), dist.GroupMember.WORLD
    plan = planner.collective_plan(model, sharders, group)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    sharded.load_state_dict(values)  # of whole tables
    optimizer, outputs = optimizer_of(sharded), []
    for step in range(STEPS):
        features = draw(kind, step, dist.get_rank(), weighted)
        with torch.no_grad():
            outputs.append(sharded(features))
        optimizer.zero_grad()
        loss_of(sharded, features).backward()
        optimizer.step()
        after_step(sharded, step)
    return outputs, local_state(sharded)


def train_unsharded(world: int, kind: str, pooled: bool, weighted: bool) -> tuple[list[list[torch.Tensor]], Model]:
    model = model_of(pooled, weighted)
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(STEPS):
        drawn = [draw(kind, step, rank, weighted) for rank in range(world)]
        with torch.no_grad():
            outputs.append([model(features) for features in drawn])
        optimizer.zero_grad()
        (sum(loss_of(model, features) for features in drawn) / world).backward()
        optimizer.step()
        after_step(model, step, optimizer)
    return outputs, model


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
@pytest.mark.parametrize("kind", ["plain", "uneven", "empty", "rank 1 empty", "int32"])
@pytest.mark.parametrize("form", ["bags", "weighted bags", "rows"])
def test_values_and_gradients_are_those_of_the_unsharded_tables(two_ranks, how, kind, form):
    arguments = (kind, form != "rows", form == "weighted bags")
    results = two_ranks.run(train_sharded, how, *arguments)
    outputs, model = train_unsharded(2, *arguments)
    for rank, (got, _) in enumerate(results):
        for step in range(STEPS):
            torch.testing.assert_close(got[step], outputs[step][rank], rtol=1e-5, atol=1e-5)
    expected = model.state_dict()
    got = whole_state([state for _, state in results], expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    hot = [expected[f"embeddings.managed.managers.{name}.hot_ids"].any() for name in ("item", "shop")]
    assert kind == "empty" or all(hot)


def refusal(case: str, config: MethodConfig) -> str:
    tables = [EmbeddingBagConfig(name="item", num_embeddings=120, embedding_dim=8, feature_names=["item"])]
    model = Model(CompressedEmbeddingBagCollection(tables, compression=config))
    features = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3]), torch.tensor([1]))
    sharders, world = get_default_sharders(fused_params={}), dist.get_world_size()
    try:
        if case == "no sharder":
            copied = DistributedModelParallel(model, plan=ShardingPlan({}), device=torch.device("cpu"))
            with torch.no_grad():
                copied(features)  # serves
            copied(features)
        elif case == "TorchRec's sharders":
            DistributedModelParallel(model, device=torch.device("cpu"))(features)
        elif case == "bad id":
            planner = EmbeddingShardingPlanner(Topology(world_size=world, compute_device="cpu"), stats=[])
            plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
            sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=torch.device("cpu"))
            wrong = torch.tensor([3 if dist.get_rank() else 120])
            sharded(KeyedJaggedTensor.from_lengths_sync(["item"], wrong, torch.tensor([1])))
        else:
            wishes = {"item": ParameterConstraints(sharding_types=["row_wise"])}
            # TorchRec's own, which knows nothing of blocks
            planner = StockPlanner(topology=Topology(world_size=world, compute_device="cpu"), constraints=wishes)
            plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
            how = plan.plan["embeddings.managed"]["item"]
            how.sharding_type = case
            DistributedModelParallel(model, plan=plan, sharders=sharders, device=torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


ODD = CafeConfig(num_hot_rows=6, num_cold_rows=21, num_blocks=3, threshold=1.5)


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        ("no sharder", CAFE, "table 'item': several ranks must share a table with a manager, got a copy on each"),
        ("TorchRec's sharders", CAFE, "table 'item': a table with a manager must be sharded by the sharders of comp"),
        ("row_wise", ODD, "table 'item': num_blocks must be a multiple of the 2 ranks that share it, got 3; choose"),
        (
            "column_wise",
            CAFE,
            "table 'item': its rows must be sharded row_wise or table_wise, got column",
        ),
        (
            "data_parallel",
            CAFE,
            "table 'item': its rows must be sharded row_wise or table_wise, got data",
        ),
        ("bad id", CAFE, "table 'item', feature 'item': every id must be in [0, 120), got 120"),
    ],
)
def test_what_cannot_be_is_said_on_every_rank(two_ranks, case, config, message):
    for found in two_ranks.run(refusal, case, config):
        assert message in found


def numbered(first: int) -> Model:
    """Return a model whose managers' buffers say which of their entries is which."""
    model = model_of(pooled=True, weighted=False)
    for buffer in model.embeddings.managed.managers.buffers():
        buffer.copy_(torch.arange(first, first + buffer.numel()).view(buffer.shape))
    return model


def taken(how: str) -> tuple[dict, dict]:
    """Return the states that a sharded model takes from the one that it is made of, and from a state dict."""
    model = numbered(0)
    wishes = {name: ParameterConstraints(sharding_types=[how]) for name in ("item", "user", "shop", "word")}
    machines = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(machines, 8, wishes, stats=[])
    sharders = get_default_sharders(fused_params={})
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    made = local_state(sharded)
    sharded.load_state_dict(numbered(1000).state_dict())
    return made, local_state(sharded)


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_every_rank_takes_what_is_of_its_blocks(two_ranks, how):
    results = two_ranks.run(taken, how)
    for number, first in enumerate((0, 1000)):
        expected = numbered(first).state_dict()
        got = whole_state([states[number] for states in results], expected)
        names = [name for name in expected if ".managed." in name]
        assert len(names) > 8
        assert all(torch.equal(got[name], expected[name]) for name in names)


def promoted() -> int:
    """Train, and check whatever moves: an id that gets a hot row is served what it was, from the same state."""
    torch.manual_seed(0)
    model, number = numbered(0), 0
    for buffer in model.embeddings.managed.managers.buffers():
        buffer.zero_()
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(model), {"lr": 0.5})
    machines, sharders = Topology(world_size=dist.get_world_size(), compute_device="cpu"), get_default_sharders()
    wishes = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("item", "user", "shop", "word")}
    planner = EmbeddingShardingPlanner(machines, 8, wishes, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    (owner,) = managed_owners(sharded)

    def now(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the first rows of all ids here, what they are served, and the state of the first rows."""
        table = owner.owned(name, None)
        rows = owner.managers[name].remap(torch.arange(table.num_places), train=False)
        weight, (state,) = table.weights["rows"], table.optimizer_state["rows"].values()
        read = weight[rows.clamp(min=0)] * (rows >= 0).unsqueeze(2)
        return rows[:, 0], read.sum(1).clone(), state[rows[:, 0]].clone()

    for step in range(8):
        loss_of(sharded, draw("plain", step, dist.get_rank(), False)).backward()
        before = {name: now(name) for name in owner.managers}
        after_step(sharded, step)
        for name in owner.managers:
            (was, served, state), (rows, serves, has) = before[name], now(name)
            per_block = 36 if name == "user" else 28
            gained = (rows != was) & (rows % per_block < 2)
            assert torch.equal(served[gained], serves[gained])
            assert torch.equal(state[gained], has[gained])
            assert state[gained].gt(0).all()
            number += int(gained.sum())
    return number


def test_moved_rows_keep_their_values_and_their_optimizer_state(two_ranks):
    assert min(two_ranks.run(promoted)) > 3


def travelled() -> tuple[bool, bool]:
    """Return whether rows travel as float16 and, among them, whether some are not as they are stored."""
    codecs = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)
    sharders = get_default_sharders({"learning_rate": 0.1}, get_qcomm_codecs_registry(codecs))
    model = model_of(pooled=True, weighted=False)
    features = draw("plain", 0, dist.get_rank(), False)
    stored = model.embeddings.table_rows("item", features["item"].values()).detach()
    planner = EmbeddingShardingPlanner(Topology(world_size=2, compute_device="cpu"), 8, {}, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    (owner,) = managed_owners(sharded)
    with torch.no_grad():
        found = owner(features).wait()["item:item"]
    return torch.equal(found, stored.half().float()), not torch.equal(found, stored)


def test_the_users_codecs_reach_managed_rows(two_ranks):
    assert two_ranks.run(travelled) == [(True, True), (True, True)]


def wrong_shape() -> str:
    tables = [EmbeddingBagConfig(name="item", num_embeddings=120, embedding_dim=8, feature_names=["item"])]
    model = Model(CompressedEmbeddingBagCollection(tables, compression=CAFE))
    sharders = get_default_sharders(fused_params={})
    planner = EmbeddingShardingPlanner(Topology(world_size=2, compute_device="cpu"), stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    state = model.state_dict()
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=torch.device("cpu"))
    state["embeddings.managed.managers.item.hot_ids"] = torch.zeros(3, 1, dtype=torch.int32)
    try:
        sharded.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def averaged() -> tuple[str, str]:
    """Return what is said where one rank alone has integers that no step leaves, written in place or loaded."""
    tables = [EmbeddingBagConfig(name="item", num_embeddings=120, embedding_dim=8, feature_names=["item"])]
    model = Model(CompressedEmbeddingBagCollection(tables, compression=CAFE))
    sharders = get_default_sharders(fused_params={})
    wishes = {"item": ParameterConstraints(sharding_types=["row_wise"])}
    planner = EmbeddingShardingPlanner(Topology(world_size=2, compute_device="cpu"), constraints=wishes, stats=[])
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    state = model.state_dict()
    state["embeddings.managed.managers.item.sketch.rows"][-1] = 1  # of the last rank's blocks
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=torch.device("cpu"))
    features = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3]), torch.tensor([1]))
    (owner,), said = managed_owners(sharded), []
    for case in ("written", "loaded"):
        owner.managers["item"].reset_parameters()
        sharded(features)
        if case == "loaded":
            sharded.load_state_dict(state)
        elif dist.get_rank():
            owner.managers["item"].hot_ids.fill_(-1)
        try:
            sharded(features)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said[0], said[1]


def test_integers_that_no_step_leaves_are_an_error_of_all_ranks(two_ranks):
    for written, loaded in two_ranks.run(averaged):
        assert "table 'item': the integers of its manager must be" in written
        assert "got hot_ids out of" in written
        assert "got sketch.rows that are not those of hot_ids" in loaded


def test_a_state_of_another_shape_is_refused(two_ranks):
    for message in two_ranks.run(wrong_shape):
        assert "managers.item.hot_ids: must be (8, 1) of torch.int32, got (3, 1) of torch.int32" in message
