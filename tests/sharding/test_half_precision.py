"""Native parts in half precision over ranks, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.cases import NUM_ROWS, fresh
from tests.methods.throwaway import HalfHashConfig, HalfMEmComConfig
from tests.sharding.models import Model, whole_state
from tests.sharding.test_parity import KINDS, compare_with_unsharded
from torchrec_compress.methods import MethodConfig

HALF = [HalfHashConfig(num_buckets=40), HalfMEmComConfig(num_buckets=40)]


def one_table(config: MethodConfig) -> Model:
    torch.manual_seed(0)
    return Model(fresh(config))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("config", HALF, ids=["bag", "rows"])
def test_half_precision_trains_as_unsharded(two_ranks, config, how):
    results = two_ranks.run(
        compare_with_unsharded, one_table, (config,), how, "plain", ["item"], {"item": NUM_ROWS}, False
    )
    expected = results[0][2]
    got = whole_state([state for _, state, _ in results], expected)
    assert all(gap < 2e-3 for gap, _, _ in results)
    assert got.keys() == expected.keys()
    assert {value.dtype for name, value in got.items() if "buckets" in name} == {torch.float16}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=5e-3, atol=2e-3)
