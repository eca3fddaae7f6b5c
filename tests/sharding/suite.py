"""TorchRec's own shipped model-parallel test, with compressed collections in its model."""

from __future__ import annotations

import copy
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.test_utils import emb_sharder
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

# the harness imports one class from a package that is not in the wheel
if "torchrec.distributed.tests" not in sys.modules:
    for missing in ("torchrec.distributed.tests", "torchrec.distributed.tests.test_sequence_model"):
        sys.modules[missing] = ModuleType(missing)
    sys.modules["torchrec.distributed.tests.test_sequence_model"].TestEmbeddingCollectionSharder = (  # type: ignore[attr-defined]
        emb_sharder.TestECSharder
    )

from torchrec.distributed.test_utils.test_model import TestSparseNN
from torchrec.distributed.test_utils.test_sharding import sharding_single_rank_test_single_process

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import MethodConfig, TableData
from torchrec_compress.sharding import (
    CodeTableCollectionSharder,
    DecoderSharder,
    RemappedEmbeddingBagCollectionSharder,
    RemappedEmbeddingCollectionSharder,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {"has_weighted_tables": True},
    "no weighted": {"has_weighted_tables": False},
    "mean": {"pooling": PoolingType.MEAN, "has_weighted_tables": False},
    "variable batch": {"variable_batch_size": True},
    "vbe": {"variable_batch_per_feature": True, "has_weighted_tables": False},
    "vbe mean": {
        "variable_batch_per_feature": True,
        "global_constant_batch": True,
        "pooling": PoolingType.MEAN,
        "has_weighted_tables": False,
    },
    "zero batch": {"allow_zero_batch_size": True},
    "offsets": {"use_offsets": True},
    "int32": {"indices_dtype": torch.int32, "lengths_dtype": torch.int32, "offsets_dtype": torch.int32},
    "in backward": {
        "apply_optimizer_in_backward_config": {
            name: (torch.optim.SGD, {"lr": 0.1}) for name in ("embedding_bags", "embeddings", "codebooks")
        }
    },
}

if version("torchrec") < "1.7":  # its own model fails too: the generator's offsets are not those of one batch
    del CASES["offsets"]


def tables(pooling: PoolingType) -> list[EmbeddingBagConfig]:
    """Return the harness's tables; the last two share features with the first two."""
    sizes = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (5, 1)]
    return [
        EmbeddingBagConfig(
            name=f"table_{number}",
            num_embeddings=(size + 1) * 10,
            embedding_dim=(size + 2) * 8,
            feature_names=[f"feature_{size}"],
            pooling=pooling,
        )
        for number, size in sizes
    ]


def weighted_tables() -> list[EmbeddingBagConfig]:
    """Return the harness's weighted tables."""
    return [
        EmbeddingBagConfig(
            name=f"weighted_table_{i}",
            num_embeddings=(i + 1) * 10,
            embedding_dim=(i + 2) * 4,
            feature_names=[f"weighted_feature_{i}"],
        )
        for i in range(2)
    ]


def sharders() -> list[Any]:
    """Return our sharders, the native ones with the learning rate of the harness in their fused optimizer."""
    fused = {"learning_rate": 0.1}
    return [
        CodeTableCollectionSharder(),
        RemappedEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder(fused_params=fused)),
        RemappedEmbeddingCollectionSharder(EmbeddingCollectionSharder(fused_params=fused)),
        DecoderSharder(),
    ]


def model_class(config: MethodConfig) -> type[TestSparseNN]:
    """Return TorchRec's test model with its collections swapped."""

    class Compressed(TestSparseNN):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name in ("ebc", "weighted_ebc"):
                stock = getattr(self.sparse, name)
                if stock is None:
                    continue
                swapped = CompressedEmbeddingBagCollection(
                    stock.embedding_bag_configs(), stock.device, stock.is_weighted(), compression=config
                )
                assert not any(method.method == "dense" for method in swapped.methods().values())
                fill_unset(swapped, config)
                setattr(self.sparse, name, swapped)

    return Compressed


def fill_unset(collection: CompressedEmbeddingBagCollection, config: MethodConfig) -> None:
    """Fit tables that have no start codes to random rows."""
    if collection.device.type == "meta":
        return
    for table in collection.embedding_bag_configs():
        if not bool(collection.code_tables.banks[table.name].is_set if collection.code_tables else 1):
            rows = torch.randn(table.num_embeddings, table.embedding_dim)
            collection.load_table(table.name, config.fit(table, TableData(rows=rows)))


def run_case(config: MethodConfig, how: str, case: str) -> None:
    """Run one case of the harness on this rank."""
    options = copy.deepcopy(CASES[case])  # TorchRec writes into the arguments of optimizers
    pooling = options.pop("pooling", PoolingType.SUM)
    weighted = weighted_tables() if options.pop("has_weighted_tables", True) else None
    mine = tables(pooling)
    names = [table.name for table in [*mine, *(weighted or [])]]
    groups = [
        f"{f}@{table.name}" if f in ("feature_0", "feature_1") else f for table in mine for f in table.feature_names
    ]
    world_size = dist.get_world_size()
    sharding_single_rank_test_single_process(
        pg=dist.GroupMember.WORLD,
        device=torch.device("cpu"),
        rank=dist.get_rank(),
        world_size=world_size,
        model_class=model_class(config),  # type: ignore[arg-type]
        embedding_groups={"group_0": groups},
        tables=mine,  # type: ignore[arg-type]
        weighted_tables=weighted,  # type: ignore[arg-type]
        sharders=sharders(),
        optim=EmbOptimType.EXACT_SGD,
        constraints={name: ParameterConstraints(sharding_types=[how]) for name in names},
        local_size=world_size,
        random_seed=7,
        **options,
    )
