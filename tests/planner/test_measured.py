"""Every estimated byte of weights, optimizer state and gradients against the bytes that exist after a training step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.modules import batches
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MEmComConfig, PQConfig, RandomCodesConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import get_default_sharders

SIZES = {"product": 4001, "residual": 3002, "memcom": 2003, "hash": 1004, "int8": 405, "dense": 206, "tiny": 9}
METHODS = {
    "product": PQConfig(num_codes=4, codebook_size=64, num_hot_rows=50, hot_dtype="fp32"),
    "residual": PQConfig(num_codes=3, codebook_size=300, structure="residual", num_hot_rows=40, hot_dtype="int4"),
    "memcom": MEmComConfig(num_buckets=100, bias=True),
    "hash": HashConfig(num_buckets=130),
    "int8": Int8Config(),
    "dense": DenseConfig(),
    "tiny": RandomCodesConfig(num_codes=2, codebook_size=64),  # stays dense
}
# FBGEMM has no fused Adam on a CPU
OPTIMIZERS: dict[str, Any] = {"rowwise": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}


class Tower(nn.Module):
    """The compressed tables, and a linear layer that no table's bytes count."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        kind: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
        config: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
        tables = [
            config(name=name, num_embeddings=rows, embedding_dim=16, feature_names=[name])
            for name, rows in SIZES.items()
        ]
        self.embeddings = kind(tables, compression=METHODS)
        self.embeddings.code_tables.banks["int8"].load(torch.zeros(SIZES["int8"], 20, dtype=torch.uint8))
        self.pooled, self.over = pooled, nn.Linear(16, 1)

    def forward(self, features: Any) -> Tensor:
        found: Any = self.embeddings(features)
        rows = found.to_dict().values() if self.pooled else [jagged.values() for jagged in found.values()]
        return self.over(torch.cat(list(rows)))


def measure(pooled: bool, how: str | None, optimizer: str) -> tuple[dict[str, int], list[dict[str, int]] | None]:
    """Plan, shard, train a step; return this rank's bytes by kind and, on rank 0, the report's ranks."""
    model = Tower(pooled)
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], native_parameters(model), {"lr": 0.1})
    constraints = {name: ParameterConstraints(sharding_types=[how]) for name in SIZES} if how else {}
    if pooled and how == "row_wise":  # TorchRec offers no row-wise bags on a CPU
        constraints |= {name: ParameterConstraints(sharding_types=["table_wise"]) for name in ("dense", "tiny")}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, 4, constraints, dense_optimizer="adam", stats=[])
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=planner.collective_plan(model), sharders=get_default_sharders()
    )
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    tables = {name: parameter for name, parameter in rest.items() if ".over." not in f".{name}"}
    adam = torch.optim.Adam(tables.values()) if tables else None
    seeded = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.cat([torch.randint(0, rows, (4,), generator=seeded) for rows in SIZES.values()])
    features = batches.KeyedJaggedTensor.from_lengths_sync(list(SIZES), ids, torch.ones(len(ids), dtype=torch.int64))
    sharded(features).square().sum().backward()
    found = _weights(sharded)
    found["gradient_bytes"] = sum(_bytes(parameter.grad) for parameter in tables.values())
    if adam is not None:
        adam.step()
    found["optimizer_bytes"] = _state_bytes(sharded.fused_optimizer.state) + (_state_bytes(adam.state) if adam else 0)
    return found, planner.report.to_dict()["ranks"] if planner.report else None


def _weights(sharded: nn.Module) -> dict[str, int]:
    """Return the bytes of the tensors that this rank holds."""
    found = {"code_bytes": 0, "decoder_bytes": 0, "native_bytes": 0}
    for name, value in sharded.state_dict().items():
        local = sum(_bytes(shard.tensor) for shard in value.local_shards()) if _is_sharded(value) else _bytes(value)
        if name.endswith(".codes"):
            found["code_bytes"] += local
        elif ".decoder.banks." in name and value.dim() == 2:
            found["decoder_bytes"] += local
        elif name.endswith(".weight") and ".over." not in f".{name}":
            found["native_bytes"] += local
    return found


def _is_sharded(value: object) -> bool:
    return isinstance(value, ShardedTensor)


def _state_bytes(value: Any) -> int:
    """Return the bytes of this rank's tensors in an optimizer's state."""
    if isinstance(value, ShardedTensor):
        return sum(_bytes(shard.tensor) for shard in value.local_shards())
    if isinstance(value, Tensor):
        return _bytes(value)
    return sum(map(_state_bytes, value.values())) if isinstance(value, dict) else 0


def _bytes(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.numel() * tensor.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", [None, "row_wise", "table_wise", "column_wise", "data_parallel"])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
def test_the_report_is_what_a_training_step_takes(ranks, pooled, how, optimizer):
    results = ranks.run(measure, pooled, how, optimizer)
    estimated = results[0][1]
    assert [report for _, report in results[1:]] == [None] * (ranks.world_size - 1)  # rank 0 plans for all
    for rank, (measured, _) in enumerate(results):
        for name in ("code_bytes", "decoder_bytes", "native_bytes", "gradient_bytes"):
            assert estimated[rank][name] == measured[name], (rank, name)
        assert estimated[rank]["optimizer_bytes"] == pytest.approx(measured["optimizer_bytes"], rel=0.01), rank
    assert sum(measured["code_bytes"] for measured, _ in results) >= 4001 * 4 + 3002 * 3 * 2 + 405 * 20


def plan_in_vain() -> str:
    """Plan what fits nowhere; return the error of this rank."""
    table = EmbeddingBagConfig(name="huge", num_embeddings=10**9, embedding_dim=64, feature_names=["huge"])
    model = nn.ModuleList(
        [CompressedEmbeddingBagCollection([table], torch.device("meta"), compression={"huge": DenseConfig()})]
    )
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu", ddr_cap=2**30)
    try:
        EmbeddingShardingPlanner(topology, 4, stats=[]).collective_plan(model)
    except PlannerError as error:
        return f"{type(error).__name__}: {error}"
    return "fits"


def test_what_does_not_fit_is_an_error_on_every_rank(ranks):
    first, *others = ranks.run(plan_in_vain, timeout=60)
    assert first.startswith("InsufficientStorageError: planner: all tables must fit into ")
    assert '"huge": {"method"' in first and others == [first] * (ranks.world_size - 1)
