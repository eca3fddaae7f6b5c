"""Bytes of a sharded collection are those of the unsharded one, on every rank."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan
from torchrec.inference.modules import quantize_inference_model

from tests.sharding.swaps import METHODS, STORED, Model, filled
from torchrec_compress import get_default_sharders
from torchrec_compress.modules.collection import CompressedParts

KINDS = ["table_wise", "column_wise", "data_parallel", "row_wise"]


def footprint_of(model: torch.nn.Module) -> dict[str, Any]:
    (collection,) = [part for part in model.modules() if isinstance(part, CompressedParts)]
    with warnings.catch_warnings():  # in their suites, users may have made warnings errors
        warnings.simplefilter("error")
        return collection.footprint().to_dict()


def sharded_sizes(pooled: bool) -> dict[str, Any]:
    """Return the footprint by way of sharding, of all methods side by side."""
    methods, sharders = list(STORED), get_default_sharders()
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    group: Any = dist.GroupMember.WORLD
    found = {"unsharded": footprint_of(filled(methods, pooled)), "meta": footprint_of(Model(methods, pooled, "meta"))}
    for kind in KINDS:
        model = Model(methods, pooled, "meta")
        wishes = {}
        for name in methods:
            can_be_cut = not (kind == "row_wise" and name == "dense" and pooled)  # no row-wise bags on a CPU
            coded = name not in ("dense", "hash", "memcom")
            how = "row_wise" if coded and kind == "column_wise" else kind if can_be_cut else "table_wise"
            how = "row_wise" if name not in METHODS and kind == "data_parallel" else how
            wishes[name] = ParameterConstraints(sharding_types=[how], min_partition=4)
        planner = EmbeddingShardingPlanner(topology, batch_size=4, constraints=wishes)
        sharded = DistributedModelParallel(
            model, plan=planner.collective_plan(model, sharders, group), sharders=sharders
        )
        found[kind] = footprint_of(sharded)
    found["TorchRec's sharders"] = footprint_of(DistributedModelParallel(Model(methods, pooled, "meta")))
    replicated = DistributedModelParallel(filled(methods, pooled), plan=ShardingPlan({}))
    found["all under DistributedDataParallel"] = footprint_of(replicated)
    return found


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_every_rank_counts_every_table_whole(two_ranks, pooled):
    for result in two_ranks.run(sharded_sizes, pooled):
        expected = result["unsharded"]
        assert {how: size["total_bytes"] for how, size in result.items() if size != expected} == {}
        collection = filled(list(STORED), pooled).embeddings
        for table in collection.table_configs():  # what the config promises, without a tensor
            assert expected["tables"][table.name]["total_bytes"] == STORED[table.name].stored_bytes(table)


def test_tables_quantised_for_inference_are_counted_as_they_are_stored():
    model = filled(["dense", "hash", "pq"], True)
    before = footprint_of(model)["tables"]
    after = footprint_of(quantize_inference_model(model))["tables"]
    assert after["pq"] == before["pq"]
    for name in ("dense", "hash"):
        assert 0 < after[name]["total_bytes"] < before[name]["total_bytes"]


def test_a_part_that_is_stored_otherwise_is_an_error():
    model = filled(["hash", "pq"], True)
    model.embeddings.bags.native = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"footprint: every part .* got none for \[\('native', 'hash__buckets'\)\]"):
        model.embeddings.footprint()
