"""Plans of tables that are pooled natively and decoded afterwards."""

import pytest
import torch
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.methods.throwaway import LowRankConfig
from tests.planner.plans import BATCH, DIM, META, RANKS, model, options, topology
from torchrec_compress import CompressedEmbeddingBagCollection, native_parameters
from torchrec_compress.methods import HashConfig, NarrowConfig, PQConfig, QRConfig
from torchrec_compress.planner import EmbeddingShardingPlanner, translate_constraints
from torchrec_compress.planner.lookups import decode_bytes

ROWS, POOLING, WIDTH = 1_000_000, 20, 8
LOW_RANK, SUM_OF_TWO = LowRankConfig(width=WIDTH), QRConfig(num_buckets=1000)
METHODS = {"low": LOW_RANK, "two": SUM_OF_TWO, "hashed": HashConfig(num_buckets=1000)}
WISH = {name: ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[float(POOLING)]) for name in METHODS}


def bytes_of(option) -> int:
    storage = option.shards[0].storage
    return storage.hbm + storage.ddr


def test_every_native_table_may_be_sharded_as_torchrec_shards_bags():
    found = options(model(METHODS))
    ways = {name: {key[1] for key in found if key[0] == name} for name, _, _ in found}
    assert ways["bags.hashed"] >= {"row_wise", "table_wise", "column_wise", "data_parallel"}
    assert ways["bags.low"] == ways["bags.two.quotient"] == ways["bags.two.remainder_0"] == ways["bags.hashed"]
    assert ways["decoder.low.projection"] == {"data_parallel"}
    assert "bags.two" not in ways


def test_bags_travel_pooled_and_narrow_and_a_matrix_is_charged_as_codebooks_are():
    of = model({"t": LOW_RANK})
    found = options(of, {"t": ParameterConstraints(pooling_factors=[float(POOLING)])})
    assert bytes_of(found["bags.t", "table_wise", "fused"]) == 4 * ROWS * WIDTH + RANKS * BATCH * (
        8 * POOLING + 4 * WIDTH
    )
    matrix = found["decoder.t.projection", "data_parallel", "dense"]
    assert bytes_of(matrix) == 4 * WIDTH * DIM * (1 + 1 + 2) + 4  # gradient and Adam
    assert matrix.shards[0].perf.bwd_comms > 0
    # (B, D) on the rank that asked, whatever the pooling
    wish = {"t": ParameterConstraints(pooling_factors=[float(POOLING)])}
    assert decode_bytes(of, wish, BATCH) == {"t": 4 * BATCH * DIM}
    rows = model({"t": LOW_RANK}, pooled=False)
    assert decode_bytes(rows, wish, BATCH) == {"t": 4 * BATCH * POOLING * DIM}
    assert decode_bytes(model({"t": METHODS["hashed"]}), wish, BATCH) == {}


@pytest.mark.parametrize(
    ("how", "pooling", "rows_back"),
    # of what a rank asked, or is asked, for: a row a bag; row-wise at most one of each rank, and of each id
    [("table_wise", POOLING, RANKS), ("row_wise", POOLING, RANKS), ("row_wise", 3, 3)],
)
def test_trained_rows_travel_pooled_but_for_short_bags(how, pooling, rows_back):
    wish = {"t": ParameterConstraints(pooling_factors=[float(pooling)])}
    narrow = {"t": NarrowConfig(width=16, bits=8)}
    found = options(model(narrow), wish)["trained.t", how, "fused"]
    ranks = RANKS if how == "table_wise" else 1  # whose ids a shard is asked for
    rows, ids = 17 * ROWS * ranks // RANKS, 8 * BATCH * pooling * ranks
    assert bytes_of(found) == rows + ids + 4 * 16 * BATCH * rows_back
    unpooled = options(model(narrow, pooled=False), wish)["trained.t", how, "fused"]
    assert bytes_of(unpooled) == rows + ids + 4 * 16 * BATCH * pooling * ranks


def test_trained_rows_of_weighted_bags_travel_one_a_look_up():
    """Gradients of weights want the rows."""
    table = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["t"])
    narrow, wish = {"t": NarrowConfig(width=16, bits=8)}, {"t": ParameterConstraints(pooling_factors=[float(POOLING)])}
    sent = [
        options(of, wish)["trained.t", "table_wise", "fused"].shards[0].perf.fwd_comms
        for of in (
            torch.nn.ModuleDict(
                {
                    "sparse": CompressedEmbeddingBagCollection(
                        [table], is_weighted=is_weighted, device=META, compression=narrow
                    )
                }
            )
            for is_weighted in (False, True)
        )
    ]
    assert sent[1] == pytest.approx(POOLING * sent[0])


@pytest.mark.parametrize("pooled", [True, False])
def test_codes_of_a_width_are_charged_pooled_and_projected(pooled):
    wish = {"t": ParameterConstraints(pooling_factors=[float(POOLING)])}
    bags = BATCH * (1 if pooled else POOLING)
    charged = []
    for width in (None, WIDTH):
        of = model({"t": PQConfig(num_codes=4, width=width)}, pooled=pooled)
        books = options(of, wish)["decoder.t.codebooks", "data_parallel", "dense"]
        row = DIM if width is None else width
        charged.append(bytes_of(books) - 256 * row * 16)
        assert decode_bytes(of, wish, BATCH) == ({} if width is None else {"t": 4 * bags * DIM})
    assert charged[0] - charged[1] == 4 * bags * (DIM - WIDTH)  # what is pooled; ids and counts stay
    matrix = options(of, wish)["decoder.t.projection", "data_parallel", "dense"]
    assert bytes_of(matrix) == 4 * WIDTH * DIM * (1 + 1 + 2) + 4  # gradient and Adam


def test_constraints_of_a_table_reach_all_its_bags_and_those_of_a_part_only_that(caplog):
    of = model(METHODS)
    found = translate_constraints(of, WISH, "cuda")
    assert {name: found[name] for name in WISH} == WISH
    assert found["two.quotient"] == found["two.remainder_0"] == WISH["two"]
    assert not caplog.records
    mine = {**WISH, "two.remainder_0": ParameterConstraints(sharding_types=["data_parallel"], pooling_factors=[20.0])}
    found = translate_constraints(of, mine, "cuda")
    assert (found["two.quotient"], found["two.remainder_0"]) == (WISH["two"], mine["two.remainder_0"])
    planner = EmbeddingShardingPlanner(topology(), BATCH, mine, stats=[])
    plan = planner.plan(of).plan["sparse.bags"]
    assert {name: how.sharding_type for name, how in plan.items()} == {
        "hashed": "row_wise",
        "low": "row_wise",
        "two.quotient": "row_wise",
        "two.remainder_0": "data_parallel",
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_the_report_is_the_footprint_by_the_users_tables(pooled):
    of = model(METHODS, pooled=pooled)
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(of), {"lr": 0.1})
    planner = EmbeddingShardingPlanner(topology(), BATCH, WISH, stats=[])
    planner.plan(of)
    report, real = planner.report, of.sparse.footprint()
    assert list(report.tables) == list(METHODS)
    for name, table in report.tables.items():
        assert (table.stored_bytes, table.stored("native"), table.stored("decoder")) == (
            real.tables[name].total_bytes,
            real.tables[name].native_bytes,
            real.tables[name].decoder_bytes,
        )
        assert table.stored_bytes == METHODS[name].stored_bytes(of.sparse.blueprint.by_table[name][0].table)
    two = report.tables["two"]
    assert sum(part.kind == "native" for part in two.parts) == 2
    assert two.optimizer_bytes == 4 * (1000 + 1000)
    low = report.tables["low"]
    assert low.optimizer_bytes == 4 * ROWS + RANKS * (8 * WIDTH * DIM + 4)
    ids = 1 if pooled else POOLING
    assert low.decoded_bytes == RANKS * ids * 4 * BATCH * DIM
    assert torch.device("meta") in {parameter.device for parameter in of.parameters()}


def test_a_table_without_its_sharder_is_planned_by_the_names_of_its_native_tables():
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    of = model(METHODS)
    planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    planner.plan(of, [EmbeddingBagCollectionSharder()])
    real = of.sparse.footprint().tables
    stored = {name: table.stored_bytes for name, table in planner.report.tables.items()}
    assert stored == {name: table.total_bytes for name, table in real.items()}
