"""Weights of any float dtype over ranks: what the unsharded collection makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor, PoolingType

from tests.modules import batches
from tests.sharding.models import shard
from tests.sharding.test_parity import KINDS, draw, mixed


def gap(how: str, dtype: torch.dtype) -> float:
    """Return by how much a sharded model differs from one process."""
    plain = mixed(PoolingType.SUM, True)
    sharded = shard(copy.deepcopy(plain), how)
    drawn = draw("plain", 0, dist.get_rank(), batches.KEYS, batches.ROWS, True)
    features = KeyedJaggedTensor(
        drawn.keys(), drawn.values(), drawn.weights().to(dtype), drawn.lengths(), drawn.offsets()
    )
    return float((sharded(features) - plain(features)).abs().max())


@pytest.mark.parametrize("how", [*KINDS, "in turn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_they_are_taken_as_unsharded(two_ranks, dtype, how):
    assert max(two_ranks.run(gap, how, dtype)) < 1e-5
