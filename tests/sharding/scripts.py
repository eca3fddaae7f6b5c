"""Training scripts as TorchRec's users write them; only the class of the collection and the sharders are swapped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

DENSE, DIM, BATCH = 5, 8, 6
SIZES = {"user": 300, "item": 200, "shop": 120}


@dataclass
class Clicks(Pipelineable):
    """A batch: numbers, ids and labels."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Clicks:
        return self

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self) -> Clicks:
        return self


def draw(step: int, rank: int) -> Clicks:
    """Return one rank's batch of a step."""
    seeded = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 4, (len(SIZES) * BATCH,), generator=seeded)
    counts = lengths.view(len(SIZES), BATCH).sum(1).tolist()
    ids = [torch.randint(0, rows, (n,), generator=seeded) for rows, n in zip(SIZES.values(), counts, strict=True)]
    labels = torch.randint(0, 2, (BATCH,), generator=seeded)
    features = KeyedJaggedTensor.from_lengths_sync(list(SIZES), torch.cat(ids), lengths)
    return Clicks(torch.rand(BATCH, DENSE, generator=seeded), features, labels)


def bag_configs() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
        for name, rows in SIZES.items()
    ]


class TwoTower(nn.Module):
    """A user tower and an item tower, as in retrieval examples."""

    def __init__(self, query: nn.Module, candidate: nn.Module) -> None:
        super().__init__()
        self.query, self.candidate = query, candidate
        self.query_proj, self.candidate_proj = nn.Linear(DIM, 4), nn.Linear(2 * DIM, 4)

    def forward(self, batch: Clicks) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        query = self.query_proj(self.query(batch.sparse_features).values())
        candidate = self.candidate_proj(self.candidate(batch.sparse_features).values())
        logits = (query * candidate).sum(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        return loss, (loss.detach(), logits.detach(), batch.labels)


def make(script: str, collection: type, compression: Any, device: str) -> nn.Module:
    """Return DLRM or the two-tower model; the collections are made with `device`."""
    extra = {} if compression is None else {"compression": compression}
    where = torch.device(device)
    if script == "dlrm":
        tables = collection(tables=bag_configs(), device=where, **extra)
        return DLRMTrain(
            DLRM(
                embedding_bag_collection=tables,
                dense_in_features=DENSE,
                dense_arch_layer_sizes=[16, DIM],
                over_arch_layer_sizes=[16, 1],
            )
        )
    user, item, shop = bag_configs()
    return TwoTower(
        collection(tables=[user], device=where, **extra), collection(tables=[item, shop], device=where, **extra)
    )


def train(script: str, collection: type, compression: Any, sharders: list[Any] | None, device: str, steps: int) -> dict:
    """Plan, shard, pipeline and train; return losses, what was pipelined, warnings and the sharding types."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("torchrec", "torchrec_compress")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    model = make(script, collection, compression, device)
    stock = [m for m in model.modules() if isinstance(m, EmbeddingBagCollection)]
    for module in model.modules():  # as users do it: everything in the collection, codebooks too
        if isinstance(module, collection) and module not in stock[1:]:
            apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in ("user", "shop")}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        batch_size=BATCH,
        constraints=constraints,
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)  # type: ignore[arg-type]
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense])
    pipeline = TrainPipelineSparseDist(sharded, optimizer, device=torch.device("cpu"), execute_all_batches=True)
    batches = iter([draw(step, dist.get_rank()) for step in range(steps)])
    losses = [float(pipeline.progress(batches)[0].detach()) for _ in range(steps)]
    for logger in loggers:
        logger.removeHandler(handler)
    kinds = {f"{path}.{name}": how.sharding_type for path, m in plan.plan.items() for name, how in m.items()}  # type: ignore[attr-defined]
    return {"losses": losses, "log": seen, "kinds": kinds, "trained": sorted(optimizer.params)}


def train_unsharded(script: str, collection: type, compression: Any, steps: int) -> list[list[float]]:
    """Return the losses of every rank's batch, one process training on all of them."""
    torch.manual_seed(0)
    model = make(script, collection, compression, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        found = [model(draw(step, rank))[0] for rank in range(2)]
        (sum(found) / 2).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in found])
    return losses
