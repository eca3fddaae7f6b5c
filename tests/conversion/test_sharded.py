"""A dense model on two ranks becomes a compressed one on four, by way of the conversion alone."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim import RowWiseAdagrad

from tests.conversion.made import run
from tests.modules import batches
from tests.sharding.models import Model, local_state, shard, whole_state
from tests.sharding.test_checkpoints import COMPRESSION
from torchrec_compress import CompressedEmbeddingBagCollection, compress


def tables(is_half: bool) -> list[EmbeddingBagConfig]:
    """Return the tables of the other tests, of FP16 if asked."""
    data_type = DataType.FP16 if is_half else DataType.FP32
    return [dataclasses.replace(table, data_type=data_type) for table in batches.tables()]


class Dense(nn.Module):
    """What `Model` is, with stock tables."""

    def __init__(self, is_half: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = EmbeddingBagCollection(tables(is_half))
        with torch.no_grad():
            for weight in self.embeddings.parameters():
                weight.normal_()
        self.over = nn.Linear(76, 1)

    def forward(self, features):
        return self.over(self.embeddings(features).values())


def save_dense(kind: str, is_half: bool, folder: str) -> None:
    """Train a step on all ranks, so that the optimizer has a state, and save."""
    model = Dense(is_half)
    apply_optimizer_in_backward(RowWiseAdagrad, model.embeddings.parameters(), {"lr": 1e-20})
    names = [table.name for table in batches.tables()]
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name in names}
    planner = EmbeddingShardingPlanner(Topology(dist.get_world_size(), "cpu"), constraints=constraints)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    plan = planner.collective_plan(model, pg=dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)
    sharded.load_state_dict(values)
    sharded(batches.batch([[2, 0, 1, 3]] * 5)).sum().backward()
    state = {"model": sharded.state_dict(), "optimizer": sharded.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)


def load_small(kind: str, is_half: bool, folder: str) -> dict:
    torch.manual_seed(5)  # other values, to be replaced
    module = CompressedEmbeddingBagCollection(tables(is_half), compression=COMPRESSION)
    model = shard(Model(module), kind)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model(batches.batch([[2, 0, 1, 3]] * 5))  # the marks of codes are looked at
    return local_state(model)


@pytest.mark.parametrize(
    ("saved", "loaded", "is_half"),
    [("table_wise", "row_wise", False), ("column_wise", "table_wise", False), ("table_wise", "row_wise", True)],
)
def test_two_dense_ranks_become_four_compressed_ones(two_ranks, four_ranks, tmp_path, saved, loaded, is_half):
    two_ranks.run(save_dense, saved, is_half, str(tmp_path / "dense"))
    compression = {name: method.to_dict() for name, method in COMPRESSION.items()}
    counts, files = {}, {}
    for table in batches.tables():
        counts[table.name] = torch.randint(0, 50, (table.num_embeddings,))
        torch.save(counts[table.name], tmp_path / f"{table.name}.pt")
        files[table.name] = str(tmp_path / f"{table.name}.pt")
    told = {
        "compression": compression,
        "counts": files,
        # the planner orders tables by size; the model's order counts
        "tables": {f"model.embeddings.embedding_bags.{name}.weight": {} for name in counts},
    }
    report = run(tmp_path / "dense", tmp_path / "small", told)
    assert [name for name in report["dropped"] if ".ctx." in name] == []
    assert any("embedding_bags.user.weight.user.momentum" in name for name in report["dropped"])
    assert any(".ctx." in name for name in report["renamed"])
    wanted = Dense(is_half)
    wanted.embeddings = compress(wanted.embeddings, COMPRESSION, counts=counts)
    like = wanted.state_dict()
    got = whole_state(four_ranks.run(load_small, loaded, is_half, str(tmp_path / "small")), like)
    assert got.keys() == like.keys()
    for name, value in like.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    if saved == "table_wise":  # columns each have sums of their own
        run(tmp_path / "dense", tmp_path / "popular.pt", {**told, "counts": "optimizer"})
        popular = torch.load(tmp_path / "popular.pt")["model"]
        seen = popular["embeddings.code_tables.banks.user.codes"]
        assert not torch.equal(seen, like["embeddings.code_tables.banks.user.codes"])
