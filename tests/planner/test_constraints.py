"""Constraints that name the user's table reach its parts, and every change is said."""

import dataclasses

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType

from tests.planner.plans import BATCH, model, options, topology
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MEmComConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner, translate_constraints

METHODS = {
    "codes": PQConfig(num_codes=8),
    "rows": MEmComConfig(num_buckets=1000),
    "bag": HashConfig(num_buckets=1000),
    "plain": DenseConfig(),
}


def translate(device: str = "cuda", **wishes: ParameterConstraints):
    return translate_constraints(model(METHODS), wishes, device)


@pytest.mark.parametrize(
    ("table", "asked", "got"),
    [
        ("codes", ["column_wise"], ["row_wise"]),
        ("codes", ["table_row_wise", "grid_shard"], ["row_wise"]),
        (
            "codes",
            ["column_wise", "table_wise"],
            ["column_wise", "table_wise"],
        ),  # the planner leaves out what it cannot
        ("codes", ["data_parallel"], ["data_parallel"]),
        ("rows", ["table_row_wise"], ["row_wise"]),
        ("rows", ["table_column_wise"], ["column_wise"]),
        ("rows", ["column_wise"], ["column_wise"]),
        ("bag", ["table_row_wise"], ["table_row_wise"]),
        ("plain", ["grid_shard"], ["grid_shard"]),
    ],
)
def test_sharding_types_become_the_nearest_that_a_part_can_do(caplog, table, asked, got):
    found = translate(**{table: ParameterConstraints(sharding_types=asked)})
    assert found[table].sharding_types == got
    if asked == got:
        assert not caplog.records
    else:
        (record,) = caplog.records[:1]
        assert f"table {table!r}" in record.message and "instead" in record.message and got[0] in record.message
        assert {"codes": "code table 'sparse.code_tables'", "rows": "unpooled rows"}[table] in record.message
    options(model(METHODS), found)  # every part has an option left


def test_kernels_become_the_plain_one(caplog):
    wish = ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused_uvm_caching"])
    found = translate(codes=wish, bag=wish)
    assert found["codes"].compute_kernels == ["fused"] and found["bag"] == wish
    assert "has no kernel fused_uvm_caching; it is planned with fused instead" in caplog.text
    replicated = ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["fused"])
    assert translate(codes=replicated)["codes"].compute_kernels == ["dense"]


def test_pooling_factors_and_batch_sizes_reach_every_part_and_nothing_else_is_lost_unsaid(caplog):
    wish = ParameterConstraints(
        pooling_factors=[3.0, 4.0], num_poolings=[1.0, 2.0], batch_sizes=[8, 9], feature_names=["a", "b"]
    )
    assert translate(codes=wish, rows=wish) == {"codes": wish, "rows": wish}
    assert not caplog.records
    cached = dataclasses.replace(wish, cache_params=CacheParams(load_factor=0.2), output_dtype=DataType.FP16)
    found = translate(codes=cached, rows=cached)
    assert found == {"codes": dataclasses.replace(wish, output_dtype=DataType.FP16), "rows": cached}
    assert "has no use for the constraints ['cache_params']" in caplog.text
    assert cached.output_dtype == DataType.FP16  # what was handed in is never written to
    option = options(model(METHODS), found)["rows.buckets_64.rows", "table_wise", "fused"]
    assert option.input_lengths == [3.0, 4.0]


def test_names_of_no_table_are_said(caplog):
    translate(codse=ParameterConstraints(sharding_types=["row_wise"]))
    assert "no table or tensor is called ['codse']; they have no effect" in caplog.text


def test_a_decoder_stays_replicated(caplog):
    found = translate(**{"codes.codebooks": ParameterConstraints(sharding_types=["row_wise"])})
    assert found["codes.codebooks"].sharding_types == ["data_parallel"]
    assert "replicated decoder" in caplog.text


def test_a_name_in_two_collections_gets_what_each_can_do():
    both = torch.nn.ModuleList([model({"t": Int8Config()}), model({"t": DenseConfig()})])
    wish = {"t": ParameterConstraints(sharding_types=["column_wise"])}
    found = translate_constraints(both, wish, "cuda")
    kinds = {key[1] for key in options(both, found)}
    assert kinds == {"row_wise", "column_wise"}


def test_the_planner_translates_and_repeats_itself_for_every_model(caplog):
    wish = {"codes": ParameterConstraints(sharding_types=["column_wise"], pooling_factors=[5.0])}
    planner = EmbeddingShardingPlanner(topology(), BATCH, wish, stats=[])
    for _ in range(2):
        plan = planner.plan(model(METHODS)).plan["sparse.code_tables"]
        assert plan["codes"].sharding_type == "row_wise"
    assert caplog.text.count("cannot be sharded column_wise") == 2
    assert wish["codes"].sharding_types == ["column_wise"]


def test_a_missing_sharder_is_said(caplog):
    planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    of = model(METHODS)
    planner.plan(of, [EmbeddingBagCollectionSharder()])
    assert "no sharder for ['CodeTableCollection', 'Decoder', 'RemappedEmbeddingBagCollection'" in caplog.text
    report, real = planner.report, of.sparse.footprint().tables
    assert {name: table.stored_bytes for name, table in report.tables.items()} == {
        name: table.total_bytes for name, table in real.items()
    }
    assert report.tables["codes"].parts[0].sharding_type == "unplanned"
    assert min(rank.decoder_bytes for rank in report.ranks) == real["codes"].total_bytes + real["rows"].total_bytes


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"sharding_types": ["row-wise"]},
            r"constraints\['codes'\].sharding_types: .* got 'row-wise'; did you mean 'row_wise'",
        ),
        ({"compute_kernels": ["fusd"]}, r"constraints\['codes'\].compute_kernels: .* got 'fusd'; did you mean 'fused'"),
        ({"sharding_types": ["x"]}, r"got 'x'; they are \['data_parallel'"),
    ],
)
def test_misspelt_names_are_refused(wish, message):
    with pytest.raises(ValueError, match=message):
        translate(codes=ParameterConstraints(**wish))


@pytest.mark.parametrize("field", ["pooling_factors", "num_poolings", "batch_sizes"])
@pytest.mark.parametrize("number", [-3.0, float("nan"), float("inf"), 2**63, "3", True, None])
def test_look_ups_are_numbers_that_can_be_counted(field, number):
    message = rf"\].{field}: must be numbers of at least 0 and below 2\*\*63, one a feature, got {number!r}"
    with pytest.raises(ValueError, match=r"constraints\['codes'" + message):
        translate(codes=ParameterConstraints(**{field: [2, number]}))
    with pytest.raises(ValueError, match=r"constraints\['plain'" + message):
        translate(plain=ParameterConstraints(**{field: [number]}), codes=ParameterConstraints(pooling_factors=[0.0]))


@pytest.mark.parametrize(
    ("types", "kernels", "has"),
    [
        (["data_parallel"], ["fused"], "; data_parallel: dense"),
        (["data_parallel"], ["key_value", "fused_uvm"], "; data_parallel: dense"),
        (["row_wise", "table_wise"], ["dense"], "; row_wise: fused.*; table_wise: fused"),
    ],
)
def test_what_a_table_of_torchrecs_cannot_do_together_is_named(types, kernels, has):
    wish = ParameterConstraints(sharding_types=types, compute_kernels=kernels)
    for name, of in (("plain", model(METHODS)), ("first", model(None))):
        where = rf"constraints\['{name}'\]: sharding_types and compute_kernels must be of its sharder and go together, "
        with pytest.raises(ValueError, match=f"{where}got .*{types[0]}.* and .*{kernels[0]}.*{has}"):
            EmbeddingShardingPlanner(topology(), BATCH, {name: wish}, stats=[]).plan(of)
    options(model(METHODS), translate(codes=wish, bag=wish))  # these are planned otherwise, which is said
