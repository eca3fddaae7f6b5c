"""Models under test, and how they are sharded, trained and read back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.planner import translate_constraints
from torchrec_compress.sharding import get_default_sharders

RATE = 0.02  # so small that what rounding leaves is not blown up by the steps


class Model(nn.Module):
    """Embeddings, pooled or not, and a linear layer."""

    def __init__(self, embeddings: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
        super().__init__()
        self.embeddings = embeddings
        widths = [lookup.table.embedding_dim for lookup in embeddings.blueprint.lookups]
        self.pooled = isinstance(embeddings, CompressedEmbeddingBagCollection)
        self.over = nn.Linear(sum(widths) if self.pooled else widths[0], 1)

    def forward(self, features: Any) -> Tensor:
        if self.pooled:
            return self.over(self.embeddings(features).values())
        rows = self.embeddings(features)
        return self.over(torch.cat([rows[key].values() for key in sorted(rows)]))


def loss_of(model: nn.Module, features: Any) -> Tensor:
    """Return a loss that is a sum over outputs, so that it may be split over ranks, and is zero for none."""
    return (model(features) - 1).square().sum()


def make_plan(model: nn.Module, kind: str, sharders: list[ModuleSharder[nn.Module]] | None = None) -> Any:
    """Return a plan with one sharding type for all tables; "in turn": every third data-parallel, others row-wise.

    Under "row_wise" dense tables are table-wise (TorchRec offers no row-wise bags on a CPU), and in a mixed collection
    hashed ones too: TorchRec's row-wise bags need batches of one size on gloo.
    """
    methods = model.embeddings.methods()  # type: ignore[attr-defined, operator, union-attr]
    stay = {"dense", "hash"} if len(methods) > 1 else {"dense"}
    constraints = {}
    for number, (name, method) in enumerate(methods.items()):
        wish = ("row_wise" if number % 3 else "data_parallel") if kind == "in turn" else kind
        wish = "table_wise" if method.method in stay and wish == "row_wise" else wish
        constraints[name] = ParameterConstraints(sharding_types=[wish])
    constraints = translate_constraints(model, constraints, "cpu", sharders)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=8, constraints=constraints)
    return planner.collective_plan(model, sharders or get_default_sharders(), dist.GroupMember.WORLD)


def shard(model: Model, kind: str, in_backward: bool = True) -> DistributedModelParallel:
    """Return the model under DMP: native tables by SGD in the backward."""
    native = native_parameters(model.embeddings)
    if native and in_backward:
        apply_optimizer_in_backward(torch.optim.SGD, native, {"lr": RATE})
    sharders = get_default_sharders()
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=make_plan(model, kind, sharders), sharders=sharders
    )
    if not any(value.is_meta for value in values.values()):
        sharded.load_state_dict(values)  # TorchRec draws new values for stock tables that come from a CPU
    return sharded


def optimizer_of(sharded: DistributedModelParallel) -> CombinedOptimizer:
    """Return the fused optimizers and, for the rest, SGD."""
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    return CombinedOptimizer([sharded.fused_optimizer, dense])


def local_state(model: nn.Module) -> dict[str, list[tuple[tuple[int, int], Tensor]] | Tensor]:
    """Return the state dict with sharded tensors as lists of (offset, values) of this rank."""
    state: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            state[name] = [(tuple(s.metadata.shard_offsets), s.tensor.detach().clone()) for s in shards]
        else:
            state[name] = value.detach().clone()
    return state


def whole_state(by_rank: list[dict[str, Any]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the ranks' states together; a replicated tensor must be equal on all of them."""
    state = {}
    for name, first in by_rank[0].items():
        if isinstance(first, list):
            whole = torch.full_like(like[name].double(), float("nan"))
            for mine in by_rank:
                for offset, values in mine[name]:
                    rows, columns = (
                        slice(offset[0], offset[0] + len(values)),
                        slice(offset[1], offset[1] + values.shape[1]),
                    )
                    whole[rows, columns] = values.double()
            assert not whole.isnan().any(), f"{name}: no rank holds some of its rows"
            state[name] = whole.to(like[name].dtype)
        else:
            for mine in by_rank:
                assert torch.equal(mine[name], first), f"{name}: differs over the ranks"
            state[name] = first
    return state
