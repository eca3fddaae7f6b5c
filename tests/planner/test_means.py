"""Plans that TorchRec would pool wrong means under are neither found nor accepted."""

import pytest
from torchrec import EmbeddingBagConfig, PoolingType
from torchrec.distributed.planner import ParameterConstraints, Topology

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import HashConfig, NarrowConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding.checks import wrong_means

MEAN, SUM = PoolingType.MEAN, PoolingType.SUM
SIZES = {"user": (50_000_000, MEAN), "item": (100_000, SUM), "day": (3000, MEAN)}


def planned(compression, sizes, world, wishes=None, device="cuda"):
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=64, feature_names=[name], pooling=pooling)
        for name, (rows, pooling) in sizes.items()
    ]
    model = CompressedEmbeddingBagCollection(tables, device="meta", compression=compression)
    topology = Topology(world_size=world, local_world_size=min(world, 8), compute_device=device, hbm_cap=8 * 2**30)
    planner = EmbeddingShardingPlanner(topology, 512, wishes, stats=[])
    plan = planner.plan(model).plan["bags"]
    physical = model.blueprint.bags()[0]
    means = {table.name.removesuffix("__rows").removesuffix("__buckets") for table in physical if table.pooling == MEAN}
    return {name: how.sharding_type for name, how in plan.items()}, means


@pytest.mark.parametrize("world", [2, 16])
@pytest.mark.parametrize("method", [NarrowConfig(width=16), HashConfig(num_buckets=2000)])
def test_a_plan_is_found_that_the_sharder_takes(method, world):
    kinds, means = planned(method, SIZES, world)
    assert means == {"user", "day"} and wrong_means(kinds, means) == ([], [])


def test_a_table_too_large_for_one_rank_is_cut_and_so_are_those_beside_it():
    kinds, means = planned(NarrowConfig(width=16), {**SIZES, "user": (250_000_000, MEAN)}, 4)
    assert kinds["user"] != "table_wise" and wrong_means(kinds, means) == ([], [])


def test_wishes_that_mix_kinds_beside_means_find_no_plan():
    wishes = {"user": ParameterConstraints(["row_wise"]), "day": ParameterConstraints(["table_wise"])}
    with pytest.raises(ValueError, match=r"planner: bags: .*got \['user'\] row-wise and \['day'\] otherwise"):
        planned(NarrowConfig(width=16), SIZES, 2, wishes)


def test_sums_may_be_of_any_kinds():
    sizes = {name: (rows, SUM) for name, (rows, _) in SIZES.items()}
    wishes = {"user": ParameterConstraints(["row_wise"]), "day": ParameterConstraints(["table_wise"])}
    kinds, _ = planned(NarrowConfig(width=16), sizes, 2, wishes)
    assert (kinds["user"], kinds["day"]) == ("row_wise", "table_wise")
