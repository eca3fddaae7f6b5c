"""Plans of tables whose rows are composed of rows of smaller tables, and of such as others read."""

import pytest
from torchrec.distributed.planner import ParameterConstraints

from tests.planner.plans import BATCH, DIM, model, options, topology
from torchrec_compress.methods import HashEmbeddingsConfig, QRConfig, RobeConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.planner.lookups import decode_bytes

POOLING = 20
ROBE = RobeConfig(num_blocks=5000, block_size=DIM // 4, memory="array")
METHODS = {
    "added": QRConfig(num_buckets=1000),
    "beside": QRConfig(num_buckets=1001, op="concat", partition="remainders"),
    "times": QRConfig(num_buckets=100, num_tables=3, op="mult"),
    "weighted": HashEmbeddingsConfig(num_buckets=1000, num_hashes=3),
    "few": HashEmbeddingsConfig(num_buckets=1000, num_weights=5000),
    "one": ROBE,
    "two": ROBE,
    "signed": RobeConfig(num_blocks=5000, block_size=DIM // 2, memory=None, signs=True),
}
WISH = {name: ParameterConstraints(pooling_factors=[float(POOLING)]) for name in METHODS}


@pytest.mark.parametrize("pooled", [True, False])
def test_the_report_is_the_footprint_by_the_users_tables(pooled):
    of = model(METHODS, pooled=pooled)
    planner = EmbeddingShardingPlanner(topology(), BATCH, WISH, stats=[])
    planner.plan(of)
    real = of.sparse.footprint()
    for name, table in planner.report.tables.items():
        assert (table.stored_bytes, table.stored("native")) == (real.tables[name].total_bytes,) * 2, name
    assert sum(table.stored_bytes for table in planner.report.tables.values()) == real.total_bytes
    assert planner.report.tables["one"].stored_bytes == 5000 * DIM // 2  # half of one array


def test_sums_travel_as_bags_products_and_weighted_vectors_as_rows():
    of = model(METHODS)
    found = {name for name, _, _ in options(of, WISH)}
    assert {"bags.added.remainder_0", "bags.added.quotient", "bags.beside.remainder_1", "bags.array"} <= found
    decoded = decode_bytes(of, WISH, BATCH)
    for name in ("added", "beside", "one", "two"):
        assert decoded[name] == 4 * BATCH * DIM, name
    for name in ("times", "weighted", "few", "signed"):
        assert decoded[name] == 4 * BATCH * DIM * (1 + POOLING), name


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_a_wish_for_a_table_reaches_all_its_parts(how):
    wish = {name: ParameterConstraints(sharding_types=[how], pooling_factors=[float(POOLING)]) for name in METHODS}
    plan = EmbeddingShardingPlanner(topology(), BATCH, wish, stats=[]).plan(model(METHODS)).plan
    for path, parts in plan.items():
        if "decoder" not in path:
            assert {part.sharding_type for part in parts.values()} == {how}, path
