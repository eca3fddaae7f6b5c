"""The planner that chooses methods: of all combinations that fit, the one of least loss; and it fits."""

import itertools
import json

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_compress import compress, native_parameters
from torchrec_compress.compression import Frontier
from torchrec_compress.compression.knapsack import Candidate
from torchrec_compress.dry_run.config import PlanConfig, TableSpec
from torchrec_compress.dry_run.plan import run
from torchrec_compress.methods import DenseConfig, HashConfig, Int4Config, Int8Config, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.planner.choosing import Ways
from torchrec_compress.sharding import get_default_sharders

DIM = 32
SIZES = {"user": 5000, "item": 2000, "day": 7}
WAYS = [HashConfig(num_buckets=3), PQConfig(num_codes=2, codebook_size=16), Int4Config(), Int8Config(), DenseConfig()]
LOSSES = {"user": [3.0, 0.4, 0.05, 0.01, 0.0], "item": [9.0, 2.0, 0.3, 0.02, 0.0]}


def tables(names=SIZES):
    return [
        EmbeddingBagConfig(name=name, num_embeddings=SIZES[name], embedding_dim=DIM, feature_names=[name])
        for name in names
    ]


def make_model(device="meta"):
    return nn.ModuleDict({"sparse": EmbeddingBagCollection(tables(), device=torch.device(device))})


def make_frontier(losses=LOSSES):
    by_name = {table.name: table for table in tables()}
    some = {
        name: [Candidate(way.stored_bytes(by_name[name]), loss, way) for way, loss in zip(WAYS, mine, strict=True)]
        for name, mine in losses.items()
    }
    return Frontier({name: (SIZES[name], DIM) for name in losses}, some, "loss")


def make_planner(hbm=2**30, **options):
    topology = Topology(world_size=2, compute_device="cuda", hbm_cap=hbm)
    return EmbeddingShardingPlanner(topology, batch_size=16, stats=[], **options)


def ways_of(planner, model):
    return Ways(model, make_frontier(), planner._settings, get_default_sharders()).ways


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.6, 0.9, 1.0])
def test_the_choice_is_the_best_of_all_that_fit(share):
    planner, model = make_planner(), make_model()
    ways = ways_of(planner, model)
    least, most = (sum(pick(way.planned_bytes for way in some) for some in ways.values()) for pick in (min, max))
    budget = int(least + share * (most - least))
    best = min(
        (sum(way.loss for way in some), sum(way.planned_bytes for way in some))
        for some in itertools.product(*ways.values())
        if sum(way.planned_bytes for way in some) <= budget
    )
    choice = planner.choose(model, make_frontier(), budget)
    assert choice.loss == pytest.approx(best[0]) and choice.planned_bytes <= choice.budget_bytes == budget
    assert set(choice) == set(SIZES) and choice["day"] == DenseConfig()
    # the plan of it holds what was counted, but for sharding types that the planner finds quicker
    held = sum(table.held_bytes for table in planner.report.tables.values())
    assert held <= choice.planned_bytes
    assert {name: table.method for name, table in planner.report.tables.items()} == {
        name: method.method for name, method in choice.items()
    }


def test_what_is_said_of_it(tmp_path):
    planner, model = make_planner(), make_model()
    ways = ways_of(planner, model)
    int8 = {name: next(way for way in ways[name] if way.method == Int8Config()) for name in LOSSES}
    budget = sum(way.planned_bytes for way in int8.values()) + ways["day"][0].planned_bytes
    choice = planner.choose(model, make_frontier(), budget)
    assert [choice[name] for name in LOSSES] == [Int8Config(), Int8Config()]
    text = str(choice)
    assert "int4 saves" in text and "for +0.04" in text and "dense takes" in text and "more for -0.01" in text
    assert "it is the only way" in text and "one more GiB: -0.03 loss" in text
    assert choice.one_more == pytest.approx(0.03)
    chosen = choice.tables["user"]
    assert chosen.smaller.method == Int4Config() and chosen.larger.method == DenseConfig()
    losses = [loss for _, loss in choice.frontier]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0.0
    told = json.loads(json.dumps(choice.to_dict()))
    assert json.loads(choice.save(str(tmp_path / "choice"))[0].read_text()) == told
    assert told["methods"]["user"] == Int8Config().to_dict() and told["tables"]["day"]["larger"] is None


def test_the_choice_is_what_compress_takes():
    model = make_model("cpu")
    choice = make_planner().choose(model, make_frontier(), 300_000)
    small = compress(model, choice)
    footprint = small.sparse.footprint()
    assert {name: part.method for name, part in footprint.tables.items()} == {n: m.method for n, m in choice.items()}
    assert footprint.total_bytes == sum(each.way.stored_bytes for each in choice.tables.values())
    # a compressed model is chosen for again, without its rows
    again = make_planner().choose(small, make_frontier(), 10**7)
    assert all(method == DenseConfig() for method in again.values())


@pytest.mark.parametrize("budget", [None, 10**12])
def test_there_is_no_more_than_the_ranks_have_left(budget):
    half = FixedPercentageStorageReservation(0.5)
    choice = make_planner(hbm=800_000, storage_reservation=half).choose(make_model(), make_frontier(), budget)
    assert choice.planned_bytes <= choice.budget_bytes == 2 * 400_000 and choice.loss > 0


@pytest.mark.parametrize("batch", [16, 32])
def test_every_rank_pays_for_what_it_decodes(batch):
    """Low-bit rows have no codebooks that it could be charged to."""
    wish = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in SIZES}
    topology = Topology(world_size=4, compute_device="cuda", hbm_cap=2**30)
    planner = EmbeddingShardingPlanner(topology, batch, wish, stats=[])
    int8 = Candidate(Int8Config().stored_bytes(tables()[0]), 0.0, Int8Config())
    frontier = Frontier({"user": (SIZES["user"], DIM)}, {"user": [int8]}, "loss")
    choice = planner.choose(make_model(), frontier, 10**7)
    way, told = choice.tables["user"].way, planner.report.tables["user"]
    assert way.method == Int8Config() and told.decoded_bytes == 4 * 4 * DIM * batch
    assert way.planned_bytes == told.held_bytes + told.activation_bytes


def test_optimizer_state_counts():
    with_state = make_model()
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(with_state), {"lr": 0.1})
    planner = make_planner()
    plain, more = (ways_of(planner, model)["user"] for model in (make_model(), with_state))
    assert more[-1].planned_bytes - plain[-1].planned_bytes == 4 * SIZES["user"]
    assert more[-2].planned_bytes == plain[-2].planned_bytes  # int8 rows are not trained


def test_memory_of_the_host_does_not_hide():
    wish = {"user": ParameterConstraints(compute_kernels=["fused_uvm"])}
    choice = make_planner(constraints=wish).choose(make_model(), make_frontier(), 10**7)
    assert choice["user"] == DenseConfig()
    assert "fused_uvm" in choice.tables["user"].way.how and "fused_uvm" not in choice.tables["item"].way.how
    assert choice.tables["user"].way.planned_bytes > 4 * DIM * SIZES["user"]  # what is on the host counts


def test_the_dense_kernel_is_one_of_replicated_tables():
    wish = {"user": ParameterConstraints(compute_kernels=["dense"])}
    choice = make_planner(constraints=wish).choose(make_model(), make_frontier(), 10**7)
    assert choice["user"] == DenseConfig() and "data_parallel" in choice.tables["user"].way.how
    # rows, gradient and Adam's two moments on both ranks
    assert choice.tables["user"].way.planned_bytes >= 2 * 4 * 4 * DIM * SIZES["user"]


def test_what_fits_in_all_but_on_no_rank_is_chosen_smaller():
    """Both large tables whole on one rank each: the larger one must give way, though together they would fit."""
    wish = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in SIZES}
    ways = ways_of(make_planner(constraints=wish), make_model())
    dense = ways["user"][-1].planned_bytes
    none = FixedPercentageStorageReservation(0.0)
    planner = make_planner(hbm=int(dense * 0.9), constraints=wish, storage_reservation=none)
    choice = planner.choose(make_model(), make_frontier())
    assert choice["user"] != DenseConfig() and choice.loss > 0
    assert choice.planned_bytes <= choice.budget_bytes < 2 * int(dense * 0.9)  # what was taken, not what was there
    tight = make_planner(hbm=int(dense * 0.6), constraints=wish, storage_reservation=none)
    with pytest.raises(PlannerError):  # in all there is room, but a table that stays as it is has none on any rank
        tight.choose(make_model(), make_frontier({"item": LOSSES["item"]}))


def twins():
    return nn.ModuleList([EmbeddingBagCollection(tables(["user"]), device=torch.device("meta")) for _ in range(2)])


@pytest.mark.parametrize(
    ("model", "frontier", "budget", "message"),
    [
        (
            make_model,
            make_frontier(),
            100,
            r"budget_bytes must be at least the [\d,]+ bytes \(.*\) of the small",
        ),
        (make_model, make_frontier(), 0, "budget_bytes must be a number of bytes above 0, got 0"),
        (make_model, make_frontier(), 10**400, r"budget_bytes must be below 2\*\*63, got more"),
        (make_model, make_frontier(), float("inf"), r"budget_bytes must be below 2\*\*63, got more"),
        (make_model, make_frontier(), float("nan"), "budget_bytes must be a number of bytes above 0, got nan"),
        (make_model, make_frontier(), True, "budget_bytes must be a number of bytes above 0, got True"),
        (make_model, make_frontier(), "4GB", "budget_bytes must be a number of bytes above 0, got '4GB'"),
        (twins, make_frontier({"user": LOSSES["user"]}), 10**7, r"names of their own, got \['user'\] in several"),
        (
            lambda: nn.ModuleList([EmbeddingBagCollection(tables(["user"]))]),
            make_frontier(),
            10**7,
            r"the frontier must be of tables \['user'\], got \['item'\]",
        ),
        (
            make_model,
            Frontier({"user": (5000, 16)}, {"user": [Candidate(320_000, 0.0, DenseConfig())]}, "loss"),
            10**7,
            "table 'user': the frontier must be of 5000 x 32, got 5000 x 16; measure it on this model",
        ),
        (
            make_model,
            Frontier({"user": (9, DIM)}, {"user": [Candidate(1152, 0.0, DenseConfig())]}, "loss"),
            10**7,
            "table 'user': the frontier must be of 5000 x 32, got 9 x 32; measure it on this model",
        ),
    ],
)
def test_bad_input_is_named(model, frontier, budget, message):
    with pytest.raises(ValueError, match=message):
        make_planner().choose(model(), frontier, budget)


def spec(path, **options):
    given = {name: TableSpec(rows) for name, rows in SIZES.items()}
    base = {"tables": given, "embedding_dim": DIM, "world_size": 2, "hbm": "1GB", "batch_size": 16}
    return PlanConfig(**{**base, "frontier": str(path), **options})


def test_by_config(tmp_path):
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(make_frontier().to_dict()))
    text = run(spec(path, budget="1MB", output=str(tmp_path / "out")))
    assert "budget 1.0 MiB over all ranks" in text and "for +" in text and "this plan:" in text
    made = {each.name for each in (tmp_path / "out").iterdir()}
    assert {"choice.json", "choice.md", "choice.png", "plan.json"} <= made
    told = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert set(told["methods"]) == set(SIZES)
    for options, message in (
        ({"frontier": None, "budget": "1MB"}, "budget: must come with a frontier to choose from"),
        ({"compression": {"method": "int8"}}, "frontier: must come without compression"),
        ({"frontier": str(tmp_path / "none.json")}, r"none.json: must be a file that meas.*, got none \(No such file"),
        ({"frontier": str(tmp_path)}, r"frontier: .*: must be a file that measure.*, got none \(Is a directory\)"),
        ({"budget": "lots"}, "budget: must be a size such as"),
        ({"budget": "1KB"}, "^budget: must be at least .* over all ranks, got 1,024, of weights"),
        ({"hbm": "1KB"}, "^hbm: must be at least .*, all that 2 ranks have left"),
        ({"hbm": "1KB", "budget": "1MB"}, "^hbm: must be at least .*, all that 2 ranks have left"),
        ({"ddr": "1KB", "device": "cpu"}, "^ddr: must be at least .*, all that 2 ranks have left"),
    ):
        with pytest.raises(ValueError, match=message):
            run(spec(path, **options))
    for wrong, message in (
        (b"{", "got other content"),
        (b"", "got other content"),
        (b"\xff\xfe\x00", "got other content"),
        (b"[" * 100_000, "got other content"),
        (b"[]", "got frontier: must have tables"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"frontier: .*: must be a file that measure_frontier.*{message}"):
            run(spec(path))
