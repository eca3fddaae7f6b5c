"""A model with managed tables, trained on any number of ranks by TorchRec's pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.streamable import Pipelineable

from tests.sharding.models import local_state
from torchrec_compress import CompressedEmbeddingBagCollection, after_step, native_parameters
from torchrec_compress.methods import MethodConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import get_default_sharders

KEYS = ["a", "b", "u"]
ROWS = {"a": 120, "b": 120, "u": 90}
GLOBAL_BATCH = 8
OPTIMIZERS = {
    "rowwise": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


@dataclass
class Batch(Pipelineable):
    """Ids and targets."""

    features: KeyedJaggedTensor
    targets: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Stay where it is."""
        return self

    def record_stream(self, stream: Any) -> None:
        """Do nothing on a CPU."""

    def pin_memory(self) -> Batch:
        """Stay where it is."""
        return self


class Model(nn.Module):
    """Two managed tables, one of them looked up by two features, and a linear layer."""

    def __init__(self, config: MethodConfig, device: torch.device | None = None) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name="item", num_embeddings=120, embedding_dim=8, feature_names=["a", "b"]),
            EmbeddingBagConfig(
                name="user", num_embeddings=90, embedding_dim=12, feature_names=["u"], pooling=PoolingType.MEAN
            ),
        ]
        self.embeddings = CompressedEmbeddingBagCollection(tables, device, compression=config)
        self.over = nn.Linear(28, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, and the outputs."""
        out = self.over(self.embeddings(batch.features).values()).squeeze(1)
        loss = (out - batch.targets).square().mean()
        return loss, out.detach()


def draw(step: int) -> Batch:
    """Return a global batch, steep, whose popular ids change over time."""
    seeded = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (len(KEYS), GLOBAL_BATCH), generator=seeded)
    values = []
    for key, number in zip(KEYS, lengths.sum(1).tolist(), strict=True):
        steep = (torch.rand(number, generator=seeded) ** 3 * ROWS[key]).long()
        values.append((steep + 11 * (step // 4)) % ROWS[key])
    features = KeyedJaggedTensor.from_lengths_sync(KEYS, torch.cat(values), lengths.view(-1))
    return Batch(features, torch.randn(GLOBAL_BATCH, generator=seeded))


def share(batch: Batch) -> Batch:
    """Return this rank's rows of a global batch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    number = GLOBAL_BATCH // world
    mine = slice(rank * number, (rank + 1) * number)
    jagged = batch.features.to_dict()
    bags = [[each for each in jagged[key].to_dense()[mine]] for key in KEYS]
    lengths = torch.tensor([len(bag) for of_key in bags for bag in of_key])
    values = torch.cat([bag for of_key in bags for bag in of_key]).long()
    return Batch(KeyedJaggedTensor.from_lengths_sync(KEYS, values, lengths), batch.targets[mine])


def shard(
    config: MethodConfig, how: str, optimizer: str = "rowwise", seed: int = 0, meta: bool = False
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Return a sharded model, managed tables by an optimizer in the backward, and all optimizers."""
    torch.manual_seed(seed)
    model = Model(config, torch.device("meta") if meta else None)
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], native_parameters(model), {"lr": 0.2})
    world = dist.get_world_size()
    constraints = {name: ParameterConstraints(sharding_types=[how]) for name in ("item", "user")}
    planner = EmbeddingShardingPlanner(
        Topology(world_size=world, compute_device="cpu"), batch_size=8, constraints=constraints, stats=[]
    )
    sharders = get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.Adagrad(parameters, lr=0.05))
    return sharded, CombinedOptimizer([("fused", sharded.fused_optimizer), ("dense", dense)])


class Stepping:
    """Optimizers that tell the end of each step, as a training loop must."""

    def __init__(self, model: nn.Module, optimizer: CombinedOptimizer, first: int = 0, tells: bool = True) -> None:
        self.model, self.optimizer, self.step_number, self.tells = model, optimizer, first, tells

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Step, and tell it."""
        self.optimizer.step()
        if self.tells:
            after_step(self.model, self.step_number, self.optimizer)
        self.step_number += 1


def run(
    model: nn.Module, optimizer: CombinedOptimizer, steps: range, pipelined: bool = True, tells: bool = True
) -> None:
    """Train over the batches of some steps."""
    model.train()
    stepping: Any = Stepping(model, optimizer, steps.start, tells)
    cpu = torch.device("cpu")
    if pipelined:
        pipeline: Any = TrainPipelineSparseDist(model, stepping, cpu, execute_all_batches=True)
    else:
        pipeline = TrainPipelineBase(model, stepping, cpu)
    batches: Iterator[Batch] = iter([share(draw(step)) for step in steps])
    for _ in steps:
        pipeline.progress(batches)
    if pipelined:
        assert len(pipeline._pipelined_modules) == 1  # the managed tables, ids of the next batch ahead
        pipeline.detach()


def state_of(model: DistributedModelParallel) -> dict[str, Any]:
    """Return this rank's parts of all values and of the fused optimizers' state."""
    state = local_state(model)
    for path, values in model.fused_optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if hasattr(value, "local_shards"):
                shards = value.local_shards()
                state[f"optimizer {path} {name}"] = [
                    ((*s.metadata.shard_offsets, 0)[:2], s.tensor.detach().clone().view(len(s.tensor), -1))
                    for s in shards
                ]
    return state


def together(by_rank: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the states of ranks together."""
    whole = {}
    for name, first in {name: value for rank in by_rank for name, value in rank.items()}.items():
        if isinstance(first, list):  # no rank's optimizer knows of tables that are not on it
            parts = sorted((part for rank in by_rank for part in rank.get(name, [])), key=lambda part: part[0])
            ends = [offset[0] + len(values) for offset, values in parts]
            assert [offset[0] for offset, _ in parts] == [0, *ends[:-1]], name
            whole[name] = torch.cat([values for _, values in parts])
        else:
            assert all(torch.equal(rank[name], first) for rank in by_rank), name
            whole[name] = first
    return whole
