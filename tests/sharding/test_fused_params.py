"""Fused parameters that FBGEMM's tables do not take are errors where sharders are made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode, CacheAlgorithm
from torchrec.modules.embedding_configs import DataType

from tests.cases import table
from tests.sharding.models import Model, make_plan
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import CafeConfig, HashConfig, MEmComConfig
from torchrec_compress.sharding import RemappedEmbeddingBagRowsSharder, compressed_sharders, get_default_sharders

WRONG: list[tuple[Any, str]] = [
    ({"learning_rates": 0.1}, r"must be arguments of FBGEMM's tables.*got 'learning_rates'; give one of \['learning_r"),
    ({"lr": 0.1}, "got 'lr'; leave it out"),
    ({3: 0.1}, "got 3; leave it out"),
    ({"pooling_mode": None}, "got 'pooling_mode'; leave it out"),
    ({"weights_precision": "fp16"}, r"fused_params\['weights_precision'\] must be a member of SparseType, got 'fp16'"),
    ({"learning_rate": "0.1"}, r"fused_params\['learning_rate'\] must be float, got '0.1'"),
    ({"learning_rate": True}, r"fused_params\['learning_rate'\] must be float, got True"),
    ({"learning_rate": None}, "must be float, got None"),
    ({"cache_sets": 1.5}, "must be int, got 1.5"),
    ({"gradient_clipping": 1}, "must be bool, got 1"),
    ({"optimizer": "adam"}, "must be a member of EmbOptimType, got 'adam'"),
    ({"output_dtype": "fp16"}, "must be a member of DataType or a member of SparseType, got 'fp16'"),
    ({"cache_algorithm": 1}, "must be a member of CacheAlgorithm, got 1"),
    ({"optimizer_state_dtypes": [SparseType.FP16]}, "must be dict or None"),
    ("adam", "fused_params must be a dict of settings by name, got 'adam'"),
]
RIGHT: list[dict[str, Any]] = [
    {},
    {"optimizer": EmbOptimType.ADAM, "learning_rate": 1, "eps": 1e-8, "beta1": 0.9, "weight_decay": 0.0},
    {"output_dtype": SparseType.FP16, "cache_precision": DataType.FP16, "optimizer_state_dtypes": None},
    {"cache_algorithm": CacheAlgorithm.LFU, "bounds_check_mode": BoundsCheckMode.FATAL, "cache_load_factor": 0.3},
    {"optimizer_state_dtypes": {"momentum1": SparseType.FP16}, "enforce_hbm": True, "prefetch_pipeline": False},
    {"weights_precision": SparseType.FP16},
    {"ssd_storage_directory": "/tmp", "use_passed_in_path": True, "use_one_tbe_per_table": True},
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_ones_are_errors_at_once(settings, told):
    makers = [
        lambda: get_default_sharders(fused_params=settings),
        lambda: compressed_sharders(fused_params=settings),
        lambda: compressed_sharders([EmbeddingBagCollectionSharder(fused_params=settings)]),
        lambda: compressed_sharders([EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(settings)]),
        lambda: RemappedEmbeddingBagRowsSharder(EmbeddingBagCollectionSharder(settings)),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=told) as raised:
            make()
        assert re.match(r"\w+Sharder: ", str(raised.value))


@pytest.mark.parametrize("settings", RIGHT, ids=lambda value: str(value)[:30])
def test_those_that_a_table_takes_are_taken(settings):
    for sharder in compressed_sharders(fused_params=settings)[1:-1]:
        assert sharder.fused_params == settings  # type: ignore[attr-defined]


def shard_with(config: Any, settings: dict[str, Any]) -> str:
    """Return what is said, on this rank, of settings of a model's fused tables on a CPU."""
    model = Model(CompressedEmbeddingBagCollection([table()], compression=config))
    sharders = get_default_sharders(fused_params=settings)
    plan = make_plan(model, "table_wise", sharders)
    try:
        DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"l2_cache_size": 1, "ps_hosts": None}, r"\['l2_cache_size', 'ps_hosts'\] must be .* leave them out"),
        (
            {"weights_precision": SparseType.FP32},
            r"\['weights_precision'\] must be .* the table's data_type says it",
        ),
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        HashConfig(num_buckets=40),
        MEmComConfig(num_buckets=40),
        CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4),
    ],
    ids=lambda config: config.method,
)
def test_settings_of_tables_on_an_ssd_are_errors_of_all_ranks_for_others(two_ranks, config, settings, told):
    for said in two_ranks.run(shard_with, config, settings):
        assert re.search(f"{told}", said) and "in memory" in said, said
