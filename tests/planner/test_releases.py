"""What TorchRec's releases ask of a planner: options it chose and chose from, a hash, and 1.9's dry run."""

import pytest
from torch import nn
from torchrec.distributed.model_parallel import get_default_sharders as get_stock_sharders
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.types import PlannerError

from tests.cases import fresh
from tests.planner.plans import BATCH, model, topology
from torchrec_compress.methods import CafeConfig, DenseConfig, HashConfig, Int8Config, MECConfig, MEmComConfig
from torchrec_compress.planner import CompressedPlannerProvider, EmbeddingShardingPlanner
from torchrec_compress.planner.provider import stock_provider
from torchrec_compress.sharding import get_default_sharders

METHODS = {
    "mec": MECConfig(num_codes=8, num_hot_rows=100),
    "memcom": MEmComConfig(num_buckets=1000),
    "hash": HashConfig(num_buckets=1000),
    "int8": Int8Config(),
    "dense": DenseConfig(),
}


def make_planner(**options):
    return EmbeddingShardingPlanner(topology(**options), BATCH, stats=[])


def of_rank(options):
    """Return bytes in device memory by rank."""
    found = {}
    for option in options:
        for shard in option.shards:
            found[shard.rank] = found.get(shard.rank, 0) + shard.storage.hbm
    return found


def test_the_options_that_were_chosen_are_those_of_the_plan():
    planner = make_planner()
    assert planner.get_selected_options() == [] and planner.get_search_space() is None
    plan = planner.plan(model(METHODS))
    chosen = planner.get_selected_options()
    told = {
        (path, name): (how.sharding_type, how.compute_kernel, list(how.ranks))
        for path, part in plan.plan.items()
        for name, how in part.items()
    }
    assert told == {
        (option.path, option.name): (
            option.sharding_type,
            option.compute_kernel,
            [shard.rank for shard in option.shards],
        )
        for option in chosen
    }
    assert of_rank(chosen) == {number: rank.device_bytes for number, rank in enumerate(planner.report.ranks)}
    space = planner.get_search_space()
    kinds = {(option.fqn, option.sharding_type, option.compute_kernel) for option in space}
    assert kinds > {(option.fqn, option.sharding_type, option.compute_kernel) for option in chosen}
    assert all(shard.perf and shard.storage for option in space for shard in option.shards)


def test_a_plan_that_fails_leaves_nothing_of_the_one_before():
    planner = make_planner(gigabytes=0.5)
    planner.plan(model(METHODS, rows=1000))
    assert planner.get_selected_options() and planner.report
    with pytest.raises(PlannerError):
        planner.plan(model(METHODS, rows=10**9))
    assert planner.get_selected_options() == [] and planner.report is None
    assert planner.get_search_space()  # it came so far


def test_a_model_without_tables_has_no_options():
    planner = make_planner()
    assert planner.plan(nn.Linear(2, 2)).plan == {}
    assert (planner.get_selected_options(), planner.get_search_space()) == ([], [])


def test_a_failure_before_options_are_listed_leaves_none():
    planner = EmbeddingShardingPlanner(topology(gigabytes=2), batch_size=1, stats=[])
    planner.plan(model({"t": Int8Config()}, rows=1000))
    planner._settings.reservation._percentage = 1.0
    with pytest.raises(PlannerError):
        planner.plan(model({"t": Int8Config()}, rows=1000))
    assert planner.get_selected_options() == [] and planner.get_search_space() is None


def test_options_that_would_cut_a_block_are_not_said_to_be_there():
    config = CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4)
    planner = EmbeddingShardingPlanner(topology(ranks=3), BATCH, stats=[])
    planner.plan(nn.ModuleDict({"sparse": fresh(config)}))
    for options in (planner.get_search_space(), planner._options.last_stored_search_space):
        assert {option.sharding_type for option in options if option.name == "item"} == {"table_wise"}


def test_the_hash_of_the_inputs_tells_methods_and_optimizers_apart():
    found = []
    for methods, optimizer in (
        ({"t": MECConfig(num_codes=8)}, "adam"),
        ({"t": MECConfig(num_codes=8)}, "adam"),
        ({"t": MECConfig(num_codes=8)}, "sgd"),
        ({"t": MECConfig(num_codes=4)}, "adam"),
        ({"t": DenseConfig()}, "adam"),
    ):
        planner = EmbeddingShardingPlanner(topology(), BATCH, dense_optimizer=optimizer, stats=[])
        planner.plan(model(methods))
        found.append(planner.hash_planner_context_inputs_str())
    assert found[0] == found[1] and len(set(found)) == 4


def test_the_list_of_sharders_begins_with_torchrecs_own():
    stock = [type(sharder) for sharder in get_stock_sharders()]
    ours = get_default_sharders(fused_params={"learning_rate": 0.3})
    assert [type(sharder) for sharder in ours][: len(stock)] == stock
    # a later release may add sharders; of those that train tables none may be left with other settings
    named = {type(sharder).__name__: sharder for sharder in ours}
    for name in ("EmbeddingBagCollectionSharder", "PECEmbeddingCollectionSharder"):
        if name in named:
            assert named[name].fused_params == {"learning_rate": 0.3}


def dry_run(gigabytes, provider=None, **options):
    """Return what TorchRec 1.9's dry run says of two kinds of machines, and what it kept of the session."""
    pytest.importorskip("torchrec.distributed.planner.dry_run", reason="TorchRec 1.9 has it", exc_type=ImportError)
    from torchrec.distributed.planner.dry_run import DryRunOrchestrator, DryRunRequest
    from torchrec.distributed.planner.executor import DefaultPlannerExecutor
    from torchrec.distributed.planner.types import PlannerSessionContext

    request = DryRunRequest(
        model=model(METHODS),
        sharders=get_default_sharders(),
        world_size=8,
        local_world_size=8,
        batch_size=BATCH,
        hbm_gb=gigabytes,
        ddr_gb=1e-9,  # a byte, so that nothing lies there
        training_framework="apf",
        sku_list=["one", "other"],
        capture_search_space=True,
        **options,
    )
    context = PlannerSessionContext(request=request, results={})
    orchestrator = DryRunOrchestrator(DefaultPlannerExecutor(provider or CompressedPlannerProvider()))
    return orchestrator.plan(request, context), context


def test_the_dry_run_of_torchrec_counts_compressed_tables():
    provider = CompressedPlannerProvider() if has_provider() else None
    results, context = dry_run(80.0, provider)
    alone = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    alone.plan(model(METHODS))
    for sku in ("one", "other"):
        found, report = results[sku], provider.planners[sku].report
        assert found.success and found.planner_failure_reason is None
        assert found.estimated_max_hbm_bytes == max(rank.device_bytes for rank in report.ranks)
        assert report.tables == alone.report.tables
        assert {option.fqn for option in found.sharding_options} == {
            option.fqn for option in alone.get_selected_options()
        }
        assert found.perf_imbalance_ratio >= 1 and found.critical_path_ms > 0
        assert len(context.search_space[sku]) == len(alone.get_search_space())
    assert results["one"].request_fingerprint != results["other"].request_fingerprint
    # TorchRec's own provider takes codes for trained floats
    stock, _ = dry_run(80.0, stock_provider())
    assert stock["one"].estimated_max_hbm_bytes != results["one"].estimated_max_hbm_bytes


def test_the_dry_run_says_what_would_fit():
    results, _ = dry_run(0.03)
    assert not results["one"].success
    assert "It fits with these methods" in results["one"].planner_failure_reason


def test_the_dry_run_takes_proposers_that_are_named_and_refuses_other_estimates():
    pytest.importorskip("torchrec.distributed.planner.provider", reason="TorchRec 1.9 has it", exc_type=ImportError)
    from torchrec.distributed.planner.provider import PlannerProvider
    from torchrec.distributed.planner.types import PlannerConfig

    provider = CompressedPlannerProvider(dense_optimizer="sgd")
    assert isinstance(provider, PlannerProvider)
    wish = {"mec": ParameterConstraints(sharding_types=["table_wise"])}
    config = PlannerConfig(proposer_type="greedy", partitioner_type="memory_balanced", timeout_seconds=100)
    results, _ = dry_run(80.0, provider, planner_config=config, constraints=wish)
    planner = provider.planners["one"]
    assert [type(each).__name__ for each in planner._proposers] == ["GreedyProposer"]
    assert type(planner._partitioner._inner).__name__ == "MemoryBalancedPartitioner"
    assert planner._timeout_seconds == 100
    kinds = {option.fqn: option.sharding_type for option in results["one"].sharding_options}
    assert kinds["sparse.code_tables.mec"] == "table_wise"
    for wrong in ({"pipeline_type": "train_sparse_dist"}, {"use_hardware_based_compute": True}):
        results, _ = dry_run(80.0, provider, planner_config=PlannerConfig(**wrong))
        (name,) = wrong
        assert f"planner_config.{name} must be left as it is" in results["one"].planner_failure_reason
    with pytest.raises(ValueError, match="dense_optimizer"):
        CompressedPlannerProvider(dense_optimizer="lion")


def has_provider():
    try:
        stock_provider()
    except ImportError:
        return False
    return True


@pytest.mark.skipif(has_provider(), reason="this TorchRec has one")
def test_before_torchrec_1_9_there_is_no_provider():
    with pytest.raises(ImportError, match=r"torchrec must be at least 1\.9"):
        CompressedPlannerProvider()
