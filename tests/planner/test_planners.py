"""The one-line planner, the explicit way, and plans too large for the stock one."""

import json

import pytest
import torch
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from tests.planner.plans import BATCH, META, model, topology
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MECConfig, MEmComConfig, PQConfig
from torchrec_compress.planner import (
    CompressedEnumerator,
    DecodeReservation,
    EmbeddingShardingPlanner,
    PlanReport,
    PlanStats,
    TradeOffProposer,
    translate_constraints,
)
from torchrec_compress.sharding import get_default_sharders

METHODS = {
    "mec": MECConfig(num_codes=8, num_hot_rows=100),
    "memcom": MEmComConfig(num_buckets=1000),
    "hash": HashConfig(num_buckets=1000),
    "int8": Int8Config(),
    "dense": DenseConfig(),
}
WISH = {"mec": ParameterConstraints(sharding_types=["column_wise"], pooling_factors=[20.0])}


def test_one_line_and_the_explicit_way_plan_alike():
    of, machines = model(METHODS), topology()
    ours = EmbeddingShardingPlanner(
        machines, BATCH, WISH, proposer=TradeOffProposer(), storage_reservation=FixedPercentageStorageReservation(0.1)
    )
    one_line = ours.plan(of)

    constraints = translate_constraints(of, WISH, "cuda")
    stats, called = PlanStats(of), []
    explicit = StockPlanner(
        topology=machines,
        batch_size=BATCH,
        constraints=constraints,
        enumerator=CompressedEnumerator(machines, BATCH, constraints),
        storage_reservation=DecodeReservation(FixedPercentageStorageReservation(0.1)),
        proposer=TradeOffProposer(),
        stats=[stats],
        callbacks=[lambda best: called.append(PlanReport.of(of, best, machines, BATCH)) or best],
    ).plan(of, get_default_sharders())
    assert str(one_line) == str(explicit)
    assert ours.report == stats.report
    (from_callback,) = called
    assert from_callback.stored_bytes == stats.report.stored_bytes


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_rank_pays_for_what_it_decodes_without_codebooks(device):
    int8 = EmbeddingShardingPlanner(topology(device), BATCH, stats=[])
    int8.plan(model({"t": Int8Config()}))
    decoded = 4 * 64 * BATCH  # a sum per bag
    assert int8.report.tables["t"].decoded_bytes == 8 * decoded
    memcom = EmbeddingShardingPlanner(topology(device), BATCH, stats=[])
    memcom.plan(model({"t": MEmComConfig(num_buckets=1000)}))
    assert memcom.report.tables["t"].decoded_bytes == 8 * (decoded + 4 * 64 * BATCH)  # a row per id as well
    capacity = {rank.capacity_bytes for rank in int8.report.ranks}
    none = EmbeddingShardingPlanner(topology(device), BATCH, stats=[])
    none.plan(model({"t": PQConfig(num_codes=2)}))
    assert none.report.tables["t"].decoded_bytes == 0
    assert {rank.capacity_bytes for rank in none.report.ranks} == {c + decoded for c in capacity}


def test_the_dense_optimizer_is_charged_by_the_planner_and_in_the_report():
    of, found = model({"t": PQConfig(num_codes=4)}), {}
    for optimizer in ("adam", "sgd"):
        planner = EmbeddingShardingPlanner(topology(), BATCH, dense_optimizer=optimizer, stats=[])
        planner.plan(of)
        found[optimizer] = planner.report
    state = 8 * 256 * 64 + 4
    adam, sgd = found["adam"], found["sgd"]
    assert (adam.tables["t"].optimizer_bytes, sgd.tables["t"].optimizer_bytes) == (8 * state, 0)
    for one, other in zip(adam.ranks, sgd.ranks, strict=True):
        assert one.device_bytes - other.device_bytes == one.optimizer_bytes - other.optimizer_bytes == state


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_the_ranks_hold_is_what_the_planner_charges(device):
    planner = EmbeddingShardingPlanner(topology(device), BATCH, WISH, stats=[])
    planner.plan(model(METHODS))
    report = planner.report
    decoded = sum(table.decoded_bytes for table in report.tables.values()) // len(report.ranks)
    for rank in report.ranks:
        parts = rank.weight_bytes + rank.optimizer_bytes + rank.gradient_bytes + rank.activation_bytes
        assert parts == rank.device_bytes + rank.host_bytes + decoded
        assert rank.device_bytes <= rank.capacity_bytes
    for name in ("optimizer_bytes", "gradient_bytes", "activation_bytes"):
        over_tables = sum(getattr(table, name) for table in report.tables.values())
        assert over_tables == sum(getattr(rank, name) for rank in report.ranks) > 0
    assert list(report.tables) == list(METHODS)
    assert report.tables["mec"].parts[0].sharding_type == "row_wise"


def test_the_report_is_text_data_and_a_plot(tmp_path):
    planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    planner.plan(model(METHODS))
    paths = planner.report.save(tmp_path / "plan")
    found = json.loads(paths[0].read_text())
    assert found == planner.report.to_dict() and found["tables"]["int8"]["codes_bytes"] == 68_000_004
    text = paths[1].read_text()
    assert all(f"\n{name} " in text for name in METHODS) and "codes row_wise on 0-7" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_two_tables_of_one_name_are_told_apart():
    both = torch.nn.ModuleDict({"a": model({"t": Int8Config()}), "b": model({"t": DenseConfig()})})
    planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    planner.plan(both)
    assert {name: table.method for name, table in planner.report.tables.items()} == {
        "a.sparse.t": "int8",
        "b.sparse.t": "dense",
    }


def test_stock_options_are_refused_by_the_report():
    of, machines = model({"t": PQConfig(num_codes=2)}), topology()
    stock = StockPlanner(topology=machines, batch_size=BATCH, stats=[PlanStats(of)])
    with pytest.raises(ValueError, match=r"plan with estimator=torchrec_compress.planner.estimators"):
        stock.plan(of, get_default_sharders())


def test_stats_without_a_model_are_refused():
    of, machines = model({"t": PQConfig(num_codes=2)}), topology()
    stock = StockPlanner(topology=machines, batch_size=BATCH, stats=[PlanStats()])
    with pytest.raises(ValueError, match="make it with PlanStats"):
        stock.plan(of, get_default_sharders())


def test_without_a_process_group_machines_must_be_given():
    with pytest.raises(ValueError, match="topology must be given without a process group"):
        EmbeddingShardingPlanner()


@pytest.mark.slow
def test_a_host_has_no_more_devices_than_numbers():
    planner = EmbeddingShardingPlanner(Topology(world_size=256, local_world_size=128, compute_device="cuda"), stats=[])
    planner.plan(model({"user": PQConfig(num_codes=4)}))
    EmbeddingShardingPlanner(Topology(world_size=129, compute_device="cpu"), stats=[])
    with pytest.raises(ValueError, match=r"local_world_size of the topology must be at most 128, .* got 129; give"):
        EmbeddingShardingPlanner(Topology(world_size=129, compute_device="cuda"), stats=[])


def test_hundreds_of_tables_of_a_hundred_billion_rows():
    """One container, so that nothing may be allocated by the row: 10**11 of the smallest rows would be 100 GB."""
    kinds = list(METHODS.values())
    rows = [4 * 10**8 + 7 * n for n in range(250)]
    tables = [
        EmbeddingBagConfig(name=f"t{n}", num_embeddings=size, embedding_dim=32, feature_names=[f"t{n}"])
        for n, size in enumerate(rows)
    ]
    methods = {table.name: kinds[n % len(kinds)] for n, table in enumerate(tables)}
    of = torch.nn.ModuleDict({"sparse": CompressedEmbeddingBagCollection(tables, META, compression=methods)})
    planner = EmbeddingShardingPlanner(
        topology(ranks=64), BATCH, storage_reservation=FixedPercentageStorageReservation(0.15), stats=[]
    )
    plan = planner.plan(of)
    assert sum(rows) >= 10**11 and len(planner.report.tables) == 250
    assert planner.report.dense_bytes == sum(rows) * 32 * 4
    assert sum(len(parts) for parts in plan.plan.values()) == sum(
        len(table.parts) for table in planner.report.tables.values()
    )
    assert max(rank.device_bytes for rank in planner.report.ranks) <= 0.85 * 80 * 2**30


def test_tables_before_the_memory_of_the_host_are_counted_there():
    machines = Topology(world_size=2, compute_device="cuda", hbm_cap=2**30, ddr_cap=2**30)
    wish = {"hash": ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused_uvm"])}
    planner = EmbeddingShardingPlanner(machines, BATCH, wish, stats=[])
    planner.plan(model({"hash": HashConfig(num_buckets=1000), "int8": Int8Config()}))
    assert sorted(rank.host_bytes for rank in planner.report.ranks) == [0, 1000 * 64 * 4]
    part = planner.report.tables["hash"].parts[0]
    assert part.weight_bytes == 1000 * 64 * 4 and part.activation_bytes == 2 * BATCH * (8 + 4 * 64)
