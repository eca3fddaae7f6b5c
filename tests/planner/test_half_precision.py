"""Plans of native parts in half precision."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.methods.throwaway import HalfHashConfig, HalfMEmComConfig
from tests.planner.plans import BATCH, DIM, RANKS, model, options, topology
from torchrec_compress import get_default_sharders, native_parameters
from torchrec_compress.methods import HashConfig, MEmComConfig, PQConfig
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


def activations(constraints: dict[str, DataType | None], of_all: SparseType | None = None) -> dict[str, int]:
    """Return what is planned for each part of two tables of codes and a hashed one."""
    codes = PQConfig(num_codes=8, codebook_size=16)
    wishes = {
        name: ParameterConstraints(sharding_types=["table_wise", "data_parallel"], output_dtype=each)
        for name, each in constraints.items()
    }
    planner = EmbeddingShardingPlanner(topology(), BATCH, wishes, stats=[])
    sharders = get_default_sharders(fused_params=None if of_all is None else {"output_dtype": of_all})
    of = model({"a": codes, "b": codes, "c": HashConfig(num_buckets=BUCKETS)})
    found = planner._enumerator.enumerate(of, sharders)  # type: ignore[union-attr]
    return {
        f"{option.path} {option.name}": bytes_of(option)
        for option in found
        if "codebooks" in option.name or (option.path.endswith("bags") and option.sharding_type == "table_wise")
    }


def test_what_is_looked_up_is_of_the_type_that_is_asked_for():
    """By constraints and by fused parameters alike; of different ones the widest, as what is served."""
    full = activations({})
    assert len(full) == 3
    half = activations(dict.fromkeys("abc", DataType.FP16))
    assert all(half[name] < full[name] for name in full)
    assert activations({}, SparseType.FP16) == half == activations(dict.fromkeys("ab", DataType.FP16), SparseType.FP16)
    mixed = activations({"a": DataType.FP16, "b": DataType.BF16, "c": DataType.FP16})
    hashed = next(name for name in full if "codebooks" not in name)
    assert {name: mixed[name] for name in full if name != hashed} == {
        name: full[name] for name in full if name != hashed
    }
    assert mixed[hashed] == half[hashed]  # what it sends
    wide = activations({"c": DataType.FP32}, SparseType.FP16)
    assert wide == full
