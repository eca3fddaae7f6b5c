"""Nothing of size [ids, D] is made in a training step over ranks either; replicated codes are gathered once."""

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from tests.made import Made
from tests.modules.test_made import CODEBOOKS, LARGEST, METHODS, NAMES, NUM_IDS, batch, pooled
from tests.sharding.models import Model, loss_of
from torchrec_compress.methods import MethodConfig
from torchrec_compress.ops.dispatch import cpp_serves
from torchrec_compress.sharding import get_default_sharders

# the sharding types of tables "a" and "b"
PLANS = [("row_wise", "row_wise"), ("data_parallel", "data_parallel"), ("data_parallel", "row_wise")]


def step(config: MethodConfig, kinds: tuple[str, str], weighted: bool) -> tuple[int, list[str]]:
    """Train one step; return the elements of the largest float tensor, and what made tensors as large as all codes."""
    model = Model(pooled(config, weighted))  # the same on all ranks, as what is cut into shards must be
    torch.manual_seed(dist.get_rank())
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name, kind in zip(NAMES, kinds, strict=True)}
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=8, constraints=constraints)
    plan = planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=get_default_sharders())
    features = batch(weighted)
    loss_of(sharded, features).backward()  # exchanges are set up
    with Made() as made:
        loss_of(sharded, features).backward()
    large = [name for size, name in made.integers if size >= 2 * NUM_IDS * len(NAMES)]
    return max(made.floats)[0], large


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kinds", PLANS, ids=" ".join)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "hash"])
def test_a_step(two_ranks, method, kinds, weighted):
    if method.startswith("memcom") and "row_wise" in kinds:
        pytest.skip("TorchRec's exchange brings a row per id")
    for floats, large in two_ranks.run(step, METHODS[method], kinds, weighted):
        assert floats <= LARGEST
        if "row_wise" not in kinds and method in CODEBOOKS and cpp_serves():
            assert large == ["torchrec_compress.codebook_bags_forward.default"]
