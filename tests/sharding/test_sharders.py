"""What the sharders tell planners, and what they do to a decoder."""

import torch
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.modules import batches
from torchrec_compress.sharding import DecoderSharder


def test_optimizers_in_the_backward_are_taken_off_replicated_parameters():
    """One rank, where nothing else does it: DistributedDataParallel would run them, and fails to on a CPU."""
    decoder = batches.collection().decoder
    before = {name: value.detach().clone() for name, value in decoder.named_parameters()}
    apply_optimizer_in_backward(torch.optim.SGD, decoder.parameters(), {"lr": 0.1})
    sharded = DecoderSharder().shard(decoder, {}, ShardingEnv.from_local(world_size=1, rank=0))
    assert sharded is decoder and before
    for name, parameter in sharded.named_parameters():
        assert not hasattr(parameter, "_in_backward_optimizers"), name
        assert torch.equal(parameter, before[name])
