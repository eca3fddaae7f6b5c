"""Plans of native tables that several of the user's tables share: planned and counted once."""

import dataclasses

import pytest
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.methods.throwaway import SharedHashConfig, registered
from tests.planner.plans import BATCH, DIM, RANKS, model, options, topology
from torchrec_compress import native_parameters
from torchrec_compress.methods import PQConfig, RobeConfig
from torchrec_compress.planner import EmbeddingShardingPlanner, translate_constraints
from torchrec_compress.sharding import CodeTableCollectionSharder

BUCKETS, POOLING = 1000, {"a": 20.0, "b": 3.0, "c": 1.0}
HASH = SharedHashConfig(num_buckets=BUCKETS)
# blocks of signs, which come back unpooled
PIECES = RobeConfig(num_blocks=2 * BUCKETS, block_size=DIM // 2, memory="memory", signs=True)
WEIGHTS = 4 * BUCKETS * DIM
WISH = {
    name: ParameterConstraints(sharding_types=["table_wise"], pooling_factors=[factor])
    for name, factor in POOLING.items()
}
STOCK = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
EITHER = pytest.mark.parametrize("config", [HASH, PIECES], ids=["bags", "rows"])


def shared(config=HASH, pooled: bool = True):
    return model({**dict.fromkeys(POOLING, config), "own": PQConfig(num_codes=4, codebook_size=16)}, pooled=pooled)


@EITHER
@pytest.mark.parametrize("pooled", [True, False])
def test_it_is_one_table_of_the_planner(config, pooled):
    names = {name for name, _, _ in options(shared(config, pooled))}
    assert sum(name.endswith("memory") for name in names) == 1
    assert not any(name.rpartition(".")[2] in POOLING for name in names)


def test_it_is_charged_the_look_ups_of_all_its_tables():
    of = shared()
    found = options(of, translate_constraints(of, WISH, "cuda"))
    storage = found["bags.memory", "table_wise", "fused"].shards[0].storage
    ids = sum(POOLING.values())
    assert storage.hbm + storage.ddr == WEIGHTS + RANKS * BATCH * int(8 * ids + 4 * len(POOLING) * DIM)


def test_parts_of_one_table_that_share_are_charged_each():
    found = translate_constraints(shared(PIECES), WISH, "cuda")["memory"]
    assert found.pooling_factors == [20.0, 20.0, 3.0, 3.0, 1.0, 1.0]
    assert found.num_poolings == [1.0] * 6
    assert (found.batch_sizes, found.sharding_types) == (None, ["table_wise"])


def test_wishes_of_its_tables_must_agree_and_its_own_come_first(caplog):
    of = shared()
    differ = {**WISH, "b": dataclasses.replace(WISH["b"], sharding_types=["row_wise"])}
    with pytest.raises(ValueError, match=r"tables 'a' and 'b' share the native table 'memory'.*name 'memory' instead"):
        translate_constraints(of, differ, "cuda")
    own = {**differ, "memory": ParameterConstraints(sharding_types=["column_wise"])}
    found = translate_constraints(of, own, "cuda")["memory"]
    assert (found.sharding_types, found.pooling_factors) == (["column_wise"], [20.0, 3.0, 1.0])
    own["memory"] = ParameterConstraints(pooling_factors=[7.0])
    assert translate_constraints(of, own, "cuda")["memory"] == own["memory"]
    some = {**WISH, "c": dataclasses.replace(WISH["c"], batch_sizes=[64])}
    with pytest.raises(ValueError, match=r"share the native table 'memory' must all have batch_sizes, or none"):
        translate_constraints(of, some, "cuda")
    assert not caplog.records
    translate_constraints(of, {"memry": ParameterConstraints()}, "cuda")
    assert "no table or tensor is called ['memry']" in caplog.text


@EITHER
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("sharders", [None, STOCK, [CodeTableCollectionSharder()]], ids=["ours", "TorchRec's", "few"])
def test_the_report_is_the_footprint_and_counts_it_once(config, pooled, sharders):
    of = shared(config, pooled)
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(of), {"lr": 0.1})
    planner = EmbeddingShardingPlanner(topology(), BATCH, WISH, stats=[])
    planner.plan(of, sharders)
    with registered(SharedHashConfig):
        real = of.sparse.footprint()
    report = planner.report
    assert list(report.tables) == [*POOLING, "own"]
    assert {name: table.stored_bytes for name, table in report.tables.items()} == {
        name: table.total_bytes for name, table in real.tables.items()
    }
    assert sum(report.tables[name].stored_bytes for name in POOLING) == WEIGHTS
    if sharders is None:
        assert sum(report.tables[name].stored("native") for name in POOLING) == WEIGHTS
        rows = WEIGHTS // 4 // (DIM if config is HASH else DIM // 2)
        assert sum(report.tables[name].optimizer_bytes for name in POOLING) == 4 * rows
        assert sum(rank.native_bytes for rank in report.ranks) == WEIGHTS
