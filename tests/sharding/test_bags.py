"""Tables that are pooled natively and decoded afterwards, over ranks: against one process, in scripts, when loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology

from tests.methods.throwaway import LowRankConfig
from tests.modules import batches
from tests.sharding import swaps
from tests.sharding.models import Model, local_state, whole_state
from tests.sharding.test_checkpoints import build, step
from tests.sharding.test_parity import KINDS, check, compare_with_unsharded
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    get_default_sharders,
)
from torchrec_compress.methods import DenseConfig, HashConfig, PQConfig, QRConfig
from torchrec_compress.planner import EmbeddingShardingPlanner, translate_constraints

COMPRESSION = {
    "user": LowRankConfig(width=4),
    "item": QRConfig(num_buckets=17),
    "shop": QRConfig(num_buckets=20),
    "tag": LowRankConfig(width=8),
    "word": PQConfig(num_codes=2, codebook_size=16),
    "*": DenseConfig(),
}


def mixed(pooling: PoolingType, weighted: bool) -> Model:
    torch.manual_seed(0)
    return Model(batches.collection(COMPRESSION, pooling, weighted))


def unpooled() -> Model:
    torch.manual_seed(0)
    tables = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, rows, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]))
    ]
    return Model(
        CompressedEmbeddingCollection(tables, compression={name: COMPRESSION[name] for name in ("user", "item")})
    )


@pytest.mark.parametrize("how", [*KINDS, "column_wise"])
@pytest.mark.parametrize("kind", ["plain", "rank 1 empty"])
def test_pooled_tables_train_as_unsharded(two_ranks, kind, how):
    arguments = (PoolingType.SUM, True)
    check(two_ranks.run(compare_with_unsharded, mixed, arguments, how, kind, batches.KEYS, batches.ROWS, True), 1e-5)


def plan_of(kinds: dict[str, str], pooling: PoolingType) -> str:
    """Return what sharding a collection of three hashed tables under a plan of these kinds says, "" if nothing."""
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=400, embedding_dim=8, feature_names=[name], pooling=pooling)
        for name in kinds
    ]
    model = Model(CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=40)))
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name, kind in kinds.items()}
    sharders = get_default_sharders(fused_params={"learning_rate": 0.1})
    planner = EmbeddingShardingPlanner(
        Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        batch_size=8,
        constraints=translate_constraints(model, constraints, "cpu", sharders),
    )
    try:
        plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
        DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("other", ["table_wise", "data_parallel"])
def test_row_wise_means_beside_other_kinds_are_refused_since_torchrec_divides_all(two_ranks, other):
    mixed_kinds, one_kind = {"a": "row_wise", "b": other, "c": other}, dict.fromkeys("abc", "row_wise")
    for told in two_ranks.run(plan_of, mixed_kinds, PoolingType.MEAN):
        assert "must not be row-wise beside tables that are not, got ['a'] row-wise and ['b', 'c'] otherwise" in told
    assert two_ranks.run(plan_of, mixed_kinds, PoolingType.SUM) == ["", ""]
    assert two_ranks.run(plan_of, one_kind, PoolingType.MEAN) == ["", ""]


@pytest.mark.parametrize("how", KINDS)
def test_means_on_four_ranks(four_ranks, how):
    arguments = (PoolingType.MEAN, False)
    check(
        four_ranks.run(compare_with_unsharded, mixed, arguments, how, "plain", batches.KEYS, batches.ROWS, False), 1e-5
    )


@pytest.mark.parametrize("how", KINDS)
def test_unpooled_tables_train_as_unsharded(two_ranks, how):
    keys = ["i", "u", "u2"]
    check(two_ranks.run(compare_with_unsharded, unpooled, (), how, "uneven", keys, batches.ROWS, False), 1e-5)


def in_scripts(pooled: bool) -> dict[tuple[str, ...], str]:
    more = {"low": LowRankConfig(width=4), "two": QRConfig(num_buckets=9)}
    swaps.STORED.update(more)
    try:
        return swaps.all_swaps([*more, "hash", "pq"], pooled, ("TorchRec's planner",))
    finally:
        for name in more:
            del swaps.STORED[name]


@pytest.mark.parametrize("pooled", [True, False])
def test_every_kind_of_script(two_ranks, pooled):
    """Whosesoever sharders, from CPU or meta, piped or not."""
    for found in two_ranks.run(in_scripts, pooled):
        assert {key: wrong for key, wrong in found.items() if wrong} == {}


def save(how: str, folder: str) -> tuple[Any, Any]:
    model, optimizer = build(how, 0, COMPRESSION)
    for number in range(2):
        step(model, optimizer, number)
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    before = local_state(model)
    step(model, optimizer, 2)
    return before, local_state(model)


def load(how: str, folder: str) -> tuple[Any, Any]:
    model, optimizer = build(how, 1, COMPRESSION)
    step(model, optimizer, 7)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loaded = local_state(model)
    step(model, optimizer, 2)
    return loaded, local_state(model)


@pytest.mark.parametrize(("saved", "loaded"), [("row_wise", "table_wise"), ("table_wise", "row_wise")])
def test_any_plan_loads_any_other(two_ranks, four_ranks, tmp_path, saved, loaded):
    like = mixed(PoolingType.SUM, False).state_dict()
    first, second = four_ranks.run(save, saved, str(tmp_path)), two_ranks.run(load, loaded, str(tmp_path))
    for part, tolerance in ((0, 0.0), (1, 1e-5)):
        theirs, ours = (whole_state([result[part] for result in results], like) for results in (first, second))
        assert theirs.keys() == ours.keys() == like.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
