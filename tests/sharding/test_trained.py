"""Sharded trained rows: against unsharded ones, on other numbers of ranks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.sharding.models import RATE, Model, local_state, loss_of, optimizer_of, whole_state
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.methods import DenseConfig, NarrowConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import copy_to_host
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.sharding.trained import ShardedTrainedCollection

STEPS, BAGS = 4, 4
ADAGRAD = {"lr": 0.1, "eps": 1e-8}
ADAM = {"lr": 0.05, "betas": (0.8, 0.99)}
MIXED = {
    "item": NarrowConfig(width=4, bits=8, optimizer="rowwise_adagrad", state_bits=8),
    "user": NarrowConfig(width=8, bits=8, state_bits=8),
    "word": NarrowConfig(width=4, bits=4),
    "code": PQConfig(num_codes=2, codebook_size=8),
    "*": DenseConfig(),
}
ADAMS = {**MIXED, "item": NarrowConfig(width=4, bits=8, optimizer="partial_rowwise_adam", state_bits=8)}
SIZES = {"item": 120, "user": 90, "word": 80, "code": 70, "day": 7}
KEYS = {"item": 120, "also_item": 120, "user": 90, "word": 80, "code": 70, "day": 7}


def model_of(pooled: bool, weighted: bool = False, mean: bool = False, mixed: dict = MIXED) -> Model:
    torch.manual_seed(0)
    kind: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    features = {name: [name, "also_item"] if name == "item" else [name] for name in SIZES}
    options = {"pooling": PoolingType.MEAN} if mean else {}
    tables = [
        kind(name=name, num_embeddings=size, embedding_dim=8, feature_names=features[name], **options)
        for name, size in SIZES.items()
    ]
    if pooled:
        return Model(CompressedEmbeddingBagCollection(tables, is_weighted=weighted, compression=mixed))
    return Model(CompressedEmbeddingCollection(tables, compression=mixed))


def marked_model(form: str) -> Model:
    """Return a model whose tables are marked; FBGEMM has no Adam on a CPU, so that its tables take Adagrad."""
    is_adam = form == "adam bags"
    model = model_of(form != "rows", form == "weighted bags", form == "means", ADAMS if is_adam else MIXED)
    native = native_parameters(model)
    if is_adam:
        trained = native_parameters(model.embeddings.trained)
        apply_optimizer_in_backward(torch.optim.Adam, trained, dict(ADAM))
        native = [parameter for parameter in native if parameter.numel()]
    apply_optimizer_in_backward(torch.optim.Adagrad, native, dict(ADAGRAD))
    return model


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


def sharded_model(how: str, form: str) -> DistributedModelParallel:
    model = marked_model(form)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    sharded = sharded_of(model, how)
    sharded.load_state_dict(values)  # of whole tables
    return sharded


def sharded_of(model: Model, how: str) -> DistributedModelParallel:
    wishes = {name: ParameterConstraints(sharding_types=[how]) for name in ("item", "user", "word", "code")}
    wishes["day"] = ParameterConstraints(sharding_types=["table_wise"])
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, 8, wishes, stats=[])
    sharders = get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def train_sharded(how: str, kind: str, form: str) -> tuple[list[torch.Tensor], dict]:
    sharded = sharded_model(how, form)
    optimizer, outputs = optimizer_of(sharded), []
    for step in range(STEPS):
        features = draw(kind, step, dist.get_rank(), form == "weighted bags")
        with torch.no_grad():
            outputs.append(sharded(features))
        optimizer.zero_grad()
        loss_of(sharded, features).backward()
        optimizer.step()
    return outputs, local_state(sharded)


def together(batches: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """Return the batches of all ranks as one."""
    jagged = [batch.to_dict() for batch in batches]
    parts = [[each[key] for each in jagged] for key in KEYS]
    weights = None
    if batches[0].weights_or_none() is not None:
        weights = torch.cat([part.weights() for of_key in parts for part in of_key])
    return KeyedJaggedTensor.from_lengths_sync(
        list(KEYS),
        torch.cat([part.values() for of_key in parts for part in of_key]),
        torch.cat([part.lengths() for of_key in parts for part in of_key]),
        weights,
    )


def train_unsharded(world: int, kind: str, form: str) -> tuple[list[list[torch.Tensor]], Model]:
    weighted = form == "weighted bags"
    model = marked_model(form)
    mine = {id(parameter) for parameter in native_parameters(model)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in mine], lr=RATE)
    outputs = []
    for step in range(STEPS):
        drawn = [draw(kind, step, rank, weighted) for rank in range(world)]
        with torch.no_grad():
            outputs.append([model(features) for features in drawn])
        optimizer.zero_grad()
        (loss_of(model, together(drawn)) / world).backward()
        optimizer.step()
    return outputs, model


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("plain", "bags"),
        ("uneven", "weighted bags"),
        ("rank 1 empty", "means"),
        ("int32", "rows"),
        ("empty", "bags"),
        ("uneven", "means"),
        ("plain", "adam bags"),
    ],
)
def test_values_and_updates_are_those_of_the_unsharded_tables(two_ranks, how, kind, form):
    """Gradients are summed in another order, so that a number in hundreds may be rounded the other way."""
    results = two_ranks.run(train_sharded, how, kind, form)
    outputs, model = train_unsharded(2, kind, form)
    for rank, (got, _) in enumerate(results):
        for step in range(STEPS):
            torch.testing.assert_close(got[step], outputs[step][rank], rtol=1e-3, atol=5e-3)
    expected = model.state_dict()
    got = whole_state([state for _, state in results], expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.uint8 and "trained" in name:
            assert float((got[name] != value).float().mean()) < 0.01, name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
    start = model_of(form != "rows").state_dict()
    for name in ("item", "user", "word"):
        key = f"embeddings.trained.banks.{name}.rows"
        assert kind == "empty" or float((expected[key] != start[key]).float().mean()) > 0.05, name


def rows_sent_back(how: str, form: str) -> tuple[int, list[torch.Tensor]]:
    """Return how many rows this rank sends back of a batch, and the ids of the bags of this rank's tables."""
    sharded = sharded_model(how, form)
    (trained,) = (module for module in sharded.modules() if isinstance(module, ShardedTrainedCollection))
    features = draw("plain", 0, dist.get_rank(), form == "weighted bags")
    context = trained.create_context()
    sent = trained.compute(context, trained.input_dist(context, features).wait().wait())
    jagged = features.to_dict()
    bags = [bag for table in trained._configs.values() for key in table.features for bag in jagged[key].to_dense()]
    return sum(len(rows) for rows in sent), bags


@pytest.mark.parametrize(("how", "num_parts"), [("row_wise", 2), ("table_wise", 1)])
def test_owners_send_one_row_back_of_a_bag_and_one_of_each_id_where_weights_want_gradients(two_ranks, how, num_parts):
    found = two_ranks.run(rows_sent_back, how, "bags")
    bags = [bag for _, mine in found for bag in mine if len(bag)]
    sent = sum(rows for rows, _ in found)
    assert len(bags) <= sent <= sum(min(num_parts, len(bag)) for bag in bags) < sum(map(len, bags))
    found = two_ranks.run(rows_sent_back, how, "weighted bags")
    assert sum(rows for rows, _ in found) == sum(len(bag) for _, mine in found for bag in mine)


def optimizer_state(sharded: DistributedModelParallel) -> dict[str, Any]:
    """Return the optimizer's state of trained rows: this rank's bytes with their first row, and counts of steps."""
    found: dict[str, Any] = {}
    for name, kept in sharded.fused_optimizer.state_dict()["state"].items():
        if "trained" in name:
            for key, value in kept.items():
                if isinstance(value, ShardedTensor):
                    shards = value.local_shards()
                    found[f"{name}.{key}"] = [(s.metadata.shard_offsets[0], s.tensor.clone()) for s in shards]
                else:
                    found[f"{name}.{key}"] = value.clone()
    return found


def states_of(sharded: DistributedModelParallel, optimizer: Any) -> dict[str, Any]:
    return {"model": sharded.state_dict(), "optimizer": optimizer.state_dict()}


def train(sharded: DistributedModelParallel, optimizer: Any, steps: range) -> None:
    for step in steps:
        features = together([draw("plain", step, rank, False) for rank in range(2)])
        optimizer.zero_grad()
        loss_of(sharded, features).backward()
        optimizer.step()


def train_and_save(how: str, form: str, folder: str) -> tuple:
    sharded = sharded_model(how, form)
    optimizer = optimizer_of(sharded)
    train(sharded, optimizer, range(3))
    dcp.save(states_of(sharded, optimizer), checkpoint_id=folder)
    return local_state(sharded), optimizer_state(sharded)


def load(how: str, form: str, folder: str) -> tuple:
    sharded = sharded_model(how, form)
    optimizer = optimizer_of(sharded)
    train(sharded, optimizer, range(5, 6))
    state = states_of(sharded, optimizer)
    dcp.load(state, checkpoint_id=folder)
    sharded.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    found = local_state(sharded), optimizer_state(sharded)
    train(sharded, optimizer, range(3, 4))
    return found


def whole(by_rank: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put the ranks' optimizer states together; counts of steps must be equal on all of them."""
    found = {}
    for name, first in by_rank[0].items():
        if isinstance(first, list):
            parts = sorted((part for mine in by_rank for part in mine[name]), key=lambda part: part[0])
            found[name] = torch.cat([tensor for _, tensor in parts])
        else:
            assert all(torch.equal(mine[name], first) for mine in by_rank), name
            found[name] = first
    return found


@pytest.mark.parametrize(
    ("saved", "loaded", "form"),
    [("row_wise", "table_wise", "bags"), ("table_wise", "row_wise", "bags"), ("row_wise", "table_wise", "adam bags")],
)
def test_rows_and_state_are_bit_equal_on_other_ranks(two_ranks, four_ranks, saved, loaded, form, tmp_path):
    first = two_ranks.run(train_and_save, saved, form, str(tmp_path / "saved"))
    then = four_ranks.run(load, loaded, form, str(tmp_path / "saved"))
    like = model_of(True).state_dict()
    before, after = (whole_state([state for state, _ in found], like) for found in (first, then))
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    state, again = (whole([kept for _, kept in found]) for found in (first, then))
    assert state.keys() == again.keys() and len(state) == 6
    assert all(torch.equal(value, state[name]) for name, value in again.items())
    assert [int(value) for name, value in state.items() if name.endswith(".step")] == [3, 3, 3]
    assert all(value.any() for value in state.values())


def load_wrong_state(wrong: str) -> str:
    sharded = sharded_model("row_wise", "bags")
    optimizer = optimizer_of(sharded)
    state = optimizer.state_dict()
    (name,) = [name for name in state["state"] if "trained" in name and "word" in name]
    kept = state["state"][name]["state"] = copy_to_host(state["state"][name]["state"])
    (shard,) = kept.local_shards()
    if wrong == "kind":
        shard.tensor = torch.zeros(len(shard.tensor), 4, dtype=torch.uint8)
    elif wrong == "step":
        state["state"][name]["step"] = torch.tensor([-1])
    else:
        shard.tensor = torch.full_like(shard.tensor, 255)  # NaN
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("kind", "must be of adagrad in 32 bits"),
        ("values", "of squares not negative (adagrad in 32 bits)"),
        ("step", "step must be in [0, 2**62), got -1"),
    ],
)
def test_a_state_that_the_optimizer_does_not_keep_is_refused_when_it_is_loaded(two_ranks, wrong, message):
    assert all(message in told and "table 'word'" in told for told in two_ranks.run(load_wrong_state, wrong))
