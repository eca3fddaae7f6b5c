"""Under TorchRec's `DistributedModelParallel` with its default sharders, one process."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType

from tests.cases import CASES, batch, fit, steps_itself
from tests.modules import batches
from torchrec_compress import CompressedEmbeddingBagCollection, native_parameters

BATCH = batch([[1, 2, 2], [], [402, 0], [7]])


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, embeddings: CompressedEmbeddingBagCollection, width: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.over = nn.Linear(width, 1)

    def forward(self, features):
        return self.over(self.embeddings(features).values())


def shard(model: nn.Module, kind: ShardingType = ShardingType.TABLE_WISE) -> DistributedModelParallel:
    """Return the model under DMP with the same values; DMP re-initialises stock tables that come from the CPU."""
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    stock = [m for m in model.modules() if isinstance(m, EmbeddingBagCollection | EmbeddingCollection)]
    tables = [name for m in stock for name in getattr(m, "embedding_bags", getattr(m, "embeddings", None))]
    constraints = {name: ParameterConstraints(sharding_types=[kind.value]) for name in tables}
    planner = EmbeddingShardingPlanner(Topology(world_size=1, compute_device="cpu"), constraints=constraints)
    plan = planner.plan(model, get_default_sharders())
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)
    with torch.no_grad():
        for name, value in sharded.state_dict().items():
            target = value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
            target.copy_(values[name])
    return sharded


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def test_tables_with_managers_are_refused():
    """Their ids must be managed where their rows are, which TorchRec's sharders know nothing of."""
    sharded = shard(Model(fit(CASES["cafe"][0]), 16))
    with pytest.raises(ValueError, match=r"table 'item': a table with a manager must be sharded by the sharders"):
        sharded(BATCH)


@pytest.mark.parametrize("method", sorted(set(CASES) - {"cafe"}))
def test_forward_and_two_training_steps_equal_the_unsharded_model(method):
    """Native tables by SGD in backward, all else by a dense Adam."""
    rate = 0.1
    plain = Model(fit([config for config in CASES[method] if not steps_itself(config)][-1]), 16)
    sharded = copy.deepcopy(plain)
    native = native_parameters(sharded.embeddings)
    if native:
        apply_optimizer_in_backward(torch.optim.SGD, native, {"lr": rate})
    sharded = shard(sharded)
    torch.testing.assert_close(sharded(BATCH), plain(BATCH))
    start = values_of(plain)

    fused = set(sharded.fused_optimizer.params)
    assert len(fused) == len(native)
    mine = {id(parameter) for parameter in native_parameters(plain.embeddings)}
    by_sgd = [p for p in plain.parameters() if id(p) in mine]
    by_adam = [p for p in plain.parameters() if id(p) not in mine]
    optimizers = [torch.optim.Adam(by_adam, lr=rate)] + ([torch.optim.SGD(by_sgd, lr=rate)] if by_sgd else [])
    dense = torch.optim.Adam([p for name, p in sharded.named_parameters() if name not in fused], lr=rate)
    for _ in range(2):
        for model, steps in ((plain, optimizers), (sharded, [dense])):
            for optimizer in steps:
                optimizer.zero_grad()
            (model(BATCH) - 1).square().mean().backward()
            for optimizer in steps:
                optimizer.step()
    trained, ours = values_of(plain), values_of(sharded)
    assert trained.keys() == ours.keys()
    trainable = {name for name, _ in plain.named_parameters()}
    for name, value in trained.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(value, start[name]) == (name not in trainable), name
    torch.testing.assert_close(sharded(BATCH), plain(BATCH), rtol=1e-4, atol=1e-5)


def test_a_mixed_collection_with_weights():
    plain = batches.collection(is_weighted=True)
    sharded = shard(copy.deepcopy(plain))
    features = batches.batch([[2, 0, 1]] * 5, weighted=True)
    ours, theirs = sharded(features), plain(features)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours.values(), theirs.values(), rtol=1e-4, atol=1e-4)


def test_data_parallel_rows_on_a_cpu_raise():
    """TorchRec 1.8's data-parallel `EmbeddingCollection` pools the rows of a bag on a CPU; planners choose it."""
    sharded = shard(batches.collection(), ShardingType.DATA_PARALLEL)
    with pytest.raises(ValueError, match=r"\['shop__buckets'\]: must not be sharded data-parallel on a CPU"):
        sharded(batches.batch([[2, 0, 1]] * 5))


def test_meta_construction_never_serves_zero_codes():
    """DMP turns meta buffers to zeros and does not call reset_parameters on a module that has only buffers."""
    meta = CompressedEmbeddingBagCollection(
        [batches.tables()[0]], device=torch.device("meta"), compression=CASES["random"][0]
    )
    sharded = DistributedModelParallel(meta, device=torch.device("cpu"))
    features = batches.batch([[1]] * 5)
    direct = CompressedEmbeddingBagCollection([batches.tables()[0]], compression=CASES["random"][0])
    try:
        sharded(features)
    except RuntimeError as error:
        assert "the code table must be filled" in str(error)
        sharded.module.reset_parameters()
        sharded(features)
    (codes,) = [value for name, value in sharded.state_dict().items() if name.endswith("codes")]
    assert torch.equal(codes, direct.code_tables.banks["user"].codes)
