"""Plans of native parts in half precision."""

import pytest
import torch
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.methods.throwaway import HalfHashConfig, HalfMEmComConfig
from tests.planner.plans import BATCH, DIM, RANKS, model, options, topology
from torchrec_compress import native_parameters
from torchrec_compress.methods import HashConfig, MEmComConfig
from torchrec_compress.planner import EmbeddingShardingPlanner

BUCKETS = 1000
PARTS = pytest.mark.parametrize(
    ("half", "full", "path"),
    [
        (HalfHashConfig(num_buckets=BUCKETS), HashConfig(num_buckets=BUCKETS), "bags.t"),
        (HalfMEmComConfig(num_buckets=BUCKETS), MEmComConfig(num_buckets=BUCKETS), "rows.buckets_64.t"),
    ],
    ids=["bag", "rows"],
)


def bytes_of(option) -> int:
    storage = option.shards[0].storage
    return storage.hbm + storage.ddr


@PARTS
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_weights_are_halved_and_what_is_looked_up_is_not(half, full, path, optimizer):
    narrow, wide = (options(model({"t": method}), dense_optimizer=optimizer) for method in (half, full))
    assert narrow.keys() == wide.keys()
    saved = 2 * BUCKETS * DIM
    assert bytes_of(wide[path, "table_wise", "fused"]) - bytes_of(narrow[path, "table_wise", "fused"]) == saved
    assert bytes_of(narrow[path, "table_wise", "fused"]) == saved + RANKS * BATCH * (8 + 4 * DIM)
    # replicated: the gradient and the state of PyTorch's optimizers are half as large as well
    key, state = (path, "data_parallel", "dense"), {"adam": 2, "momentum": 1}[optimizer]
    assert bytes_of(wide[key]) - bytes_of(narrow[key]) == saved * (1 + 1 + state)


@PARTS
def test_a_fused_optimizer_keeps_float32_all_the_same(half, full, path):
    of = model({"t": half})
    without = options(of)
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(of), {"lr": 0.1})
    key = (path, "table_wise", "fused")
    assert bytes_of(options(of)[key]) - bytes_of(without[key]) == 4 * BUCKETS


@PARTS
def test_the_report_counts_what_is_stored(half, full, path):
    of = model({"t": half})
    wish = {"t": ParameterConstraints(sharding_types=["table_wise"])}
    planner = EmbeddingShardingPlanner(topology(), BATCH, wish, stats=[])
    planner.plan(of)
    table = planner.report.tables["t"]
    assert table.stored_bytes == half.stored_bytes(of["sparse"].blueprint.tables[0])
    assert table.stored_bytes == of["sparse"].footprint().total_bytes
    assert all(part.dtype == torch.float32 for name, part in of.named_parameters() if "buckets" not in name)
