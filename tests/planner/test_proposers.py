"""Proposals between the quickest and the smallest."""

import pytest
import torch
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from tests.planner.plans import model, topology
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, PQConfig
from torchrec_compress.planner import planners
from torchrec_compress.planner.proposers import TradeOffProposer, UnlessMany, UnlessNoQuicker


def option(table: str, how: str, shards: list[tuple[float, int]]) -> ShardingOption:
    """Return an option with so many milliseconds and bytes for every shard."""
    return ShardingOption(
        name=table,
        tensor=torch.empty(8, 4, device="meta"),
        module=("tables", torch.nn.Module()),
        input_lengths=[1.0],
        batch_size=8,
        sharding_type=how,
        partition_by="uniform",
        compute_kernel="fused",
        shards=[
            Shard([4, 4], [0, 0], storage=Storage(size, 0), perf=Perf(time, 0.0, 0.0, 0.0)) for time, size in shards
        ],
        is_pooled=True,
    )


OPTIONS = [
    # replicating the small table is worth it, replicating the large one is not
    option("small", "data_parallel", [(0.1, 100), (0.1, 100)]),
    option("small", "row_wise", [(9.0, 50), (9.0, 50)]),
    option("large", "data_parallel", [(4.0, 9000), (4.0, 9000)]),
    option("large", "row_wise", [(6.0, 4500), (6.0, 4500)]),
    option("large", "table_wise", [(7.0, 8990)]),
]


def proposals(options: list[ShardingOption]) -> list[dict[str, str]]:
    proposer, found = TradeOffProposer(), []
    proposer.load(options)
    while (proposal := proposer.propose()) is not None:
        found.append({each.name: each.sharding_type for each in proposal})
        proposer.feedback(partitionable=False)
    return found


def test_the_ends_and_the_middle_are_proposed_once_each():
    found = proposals(OPTIONS)
    assert found[0] == {"small": "data_parallel", "large": "data_parallel"}  # the quickest
    assert {"small": "data_parallel", "large": "table_wise"} in found  # the least time of all shards together
    assert {"small": "row_wise", "large": "table_wise"} in found  # the least storage
    assert {"small": "row_wise", "large": "row_wise"} in found  # the smallest largest shard
    assert {"small": "data_parallel", "large": "row_wise"} in found  # between them
    assert len(found) == len({tuple(sorted(each.items())) for each in found}) <= 11


def test_the_order_of_the_options_does_not_matter():
    assert proposals(OPTIONS) == [
        {name: each[name] for name in ("small", "large")} for each in proposals(OPTIONS[:2] + OPTIONS[:1:-1])
    ]


def test_other_proposers_rest_where_tables_are_many():
    for limit, expected in ((2, True), (1, False)):
        proposer = UnlessMany(GreedyProposer(), limit)
        proposer.load(OPTIONS)
        assert bool(proposer.propose()) == expected


def test_a_grid_leaves_out_what_cannot_be_quicker_than_a_plan():
    proposer = UnlessNoQuicker(GridSearchProposer())
    proposer.load(OPTIONS)
    every = GridSearchProposer()
    every.load(OPTIONS)
    first = proposer.propose()
    assert first == every.propose()
    proposer.feedback(True, first, 4.2)  # as quick as both tables replicated can be
    left = []
    while (proposal := proposer.propose()) is not None:
        left.append({each.name: each.sharding_type for each in proposal})
        proposer.feedback(False)
    assert left == []
    # 0.1 ms of the small one where the large one is, whichever rank that is: 7.1 ms
    for best, table_wise in ((7.1, False), (7.11, True)):
        proposer.load(OPTIONS)
        proposer.feedback(True, first, best)
        kinds = set()
        while (proposal := proposer.propose()) is not None:
            kinds.add(tuple(each.sharding_type for each in proposal))
            proposer.feedback(False)
        assert (("data_parallel", "table_wise") in kinds) is table_wise
        assert ("data_parallel", "row_wise") in kinds and ("row_wise", "row_wise") not in kinds


SMALL = {"a": PQConfig(num_codes=4), "b": HashConfig(num_buckets=1000), "c": DenseConfig()}
LARGE = {"a": Int8Config(), "b": DenseConfig(), "c": DenseConfig()}


class Every(UnlessNoQuicker):
    """Leaves nothing out."""

    def _least_time(self, proposal: list[ShardingOption]) -> float:
        return -1.0


@pytest.mark.parametrize(("methods", "rows", "gigabytes"), [(SMALL, 10**5, 80), (LARGE, 10**7, 80), (LARGE, 10**7, 4)])
@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_plan_is_that_of_the_whole_grid(monkeypatch, methods, rows, gigabytes, ranks):
    found, tried = [], []
    for grid in (UnlessNoQuicker, Every):
        monkeypatch.setattr(planners, "UnlessNoQuicker", grid)
        planner = planners.EmbeddingShardingPlanner(topology(ranks=ranks, gigabytes=gigabytes), 64, stats=[])
        plan = planner.plan(model(methods, rows))
        found.append((str(plan), planner.report.to_dict()))
        tried.append(planner._num_proposals)
    assert found[0] == found[1]
    assert 4 * tried[0] < tried[1]
