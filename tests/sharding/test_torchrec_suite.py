"""TorchRec's model-parallel test: plan, shard from meta, copy the state, train a step, compare with unsharded."""

import pytest

from tests.sharding.suite import CASES, run_case
from torchrec_compress.methods import (
    DPQConfig,
    GraphCodesConfig,
    HashConfig,
    Int4Config,
    Int8Config,
    LMAConfig,
    MECConfig,
    MEmComConfig,
    MethodConfig,
    PQConfig,
    QuantileCodesConfig,
    RandomCodesConfig,
)

KINDS = ["row_wise", "table_wise", "data_parallel"]
METHODS: dict[str, MethodConfig] = {
    "mec": MECConfig(num_codes=4, codebook_size=4),
    "pq tiers": PQConfig(num_codes=2, codebook_size=4, num_hot_rows=2, hot_dtype="fp32", popularity="count"),
    "residual": RandomCodesConfig(num_codes=2, codebook_size=2, structure="residual"),
    "random": RandomCodesConfig(num_codes=4, codebook_size=4),
    "quantile": QuantileCodesConfig(num_codes=4, codebook_size=4),
    "graph": GraphCodesConfig(num_codes=4, codebook_size=4),
    "lma": LMAConfig(num_codes=4, codebook_size=4),
    "dpq": DPQConfig(num_codes=4, codebook_size=2),
    "memcom": MEmComConfig(num_buckets=4, bias=True),
    "hash": HashConfig(num_buckets=4),
    "int8": Int8Config(),
    "int4": Int4Config(),
}
# where TorchRec's own EmbeddingBagCollection fails the same case: its row-wise bags need equal batches on gloo, its
# data-parallel bags do not know variable batches per feature
STOCK_FAILS = {
    ("hash", "row_wise"): ("variable batch", "vbe", "vbe mean", "zero batch"),
    ("hash", "data_parallel"): ("vbe", "vbe mean"),
}


def all_cases(config: MethodConfig, how: str, cases: list[str]) -> list[str]:
    """Run cases one after another; return the names of those that ran."""
    ran = []
    for case in cases:
        try:
            run_case(config, how, case)
        except Exception as error:
            raise AssertionError(f"case {case!r}") from error
        ran.append(case)
    return ran


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_suite_passes(two_ranks, method, how):
    cases = [case for case in CASES if case not in STOCK_FAILS.get((method, how), ())]
    for ran in two_ranks.run(all_cases, METHODS[method], how, cases):
        assert ran == cases


@pytest.mark.parametrize("config", [METHODS["mec"], MEmComConfig(num_buckets=4, scalars="grouped")])
def test_the_suite_passes_on_four_ranks(four_ranks, config):
    cases = ["plain", "variable batch", "vbe", "zero batch", "in backward"]
    for ran in four_ranks.run(all_cases, config, "row_wise", cases):
        assert ran == cases


def with_a_wrong_way_back() -> None:
    """Break the exchange: codes come back in the order of their owners, not of the ids."""
    from torchrec_compress.sharding import exchange

    right = exchange.sequence_context

    def wrong(features, dist):
        context = right(features, dist)
        context.unbucketize_permute_tensor = None
        return context

    exchange.sequence_context = wrong
    try:
        run_case(METHODS["mec"], "row_wise", "plain")
    finally:
        exchange.sequence_context = right


def test_the_suite_can_fail(two_ranks):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        two_ranks.run(with_a_wrong_way_back)
