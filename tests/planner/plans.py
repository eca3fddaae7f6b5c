"""Models on the meta device, and what the enumerator makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption

from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import MethodConfig
from torchrec_compress.planner import estimators
from torchrec_compress.sharding import get_default_sharders

META = torch.device("meta")
DIM, BATCH, RANKS = 64, 512, 8


def model(methods: dict[str, MethodConfig] | None, rows: int = 1_000_000, pooled: bool = True, dim: int = DIM) -> Any:
    """Return one table per method, named as its key; TorchRec's own where there are no methods."""
    kind: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    names = list(methods or ["first", "second"])
    tables = [kind(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name]) for name in names]
    if methods is None:
        return nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=META)})
    collection: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
    return nn.ModuleDict({"sparse": collection(tables, device=META, compression=methods)})


def topology(device: str = "cuda", ranks: int = RANKS, gigabytes: float = 80) -> Topology:
    """Return machines of eight ranks each, or of all where there are fewer."""
    memory = int(gigabytes * 2**30)
    return Topology(
        world_size=ranks,
        local_world_size=min(8, ranks),
        compute_device=device,
        hbm_cap=memory,
        ddr_cap=memory if device == "cpu" else 1,  # TorchRec 1.6 takes 0 for its default
    )


def options(
    of: nn.Module,
    constraints: dict[str, ParameterConstraints] | None = None,
    *,
    device: str = "cuda",
    ranks: int = RANKS,
    stock: bool = False,
    dense_optimizer: Any = "adam",
) -> dict[tuple[str, str, str], ShardingOption]:
    """Return every option by (name, sharding type, kernel), estimated by our estimators or by the stock ones."""
    machines = topology(device, ranks)
    estimator = None if stock else estimators(machines, constraints, dense_optimizer)
    enumerator = EmbeddingEnumerator(machines, BATCH, constraints, estimator)
    found = enumerator.enumerate(of, get_default_sharders())
    return {
        (option.fqn.removeprefix("sparse."), option.sharding_type, option.compute_kernel): option for option in found
    }
