"""Sharded tables whose codes change: beside tables of other kinds, whole on every rank, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from tests.sharding.models import RATE, Model, local_state, loss_of, optimizer_of, shard, whole_state
from torchrec_compress import CompressedEmbeddingBagCollection, after_step
from torchrec_compress.methods import CafeConfig, CceConfig, DenseConfig, PQConfig

CCE = CceConfig(num_codes=2, codebook_size=8, cluster_every=2, cluster_until=4)
SIZES = {"item": 120, "user": 90, "word": 80, "day": 7}
MIXED = {
    "item": CCE,
    "user": CafeConfig(num_hot_rows=8, num_cold_rows=20, num_blocks=4),
    "word": PQConfig(num_codes=2, codebook_size=8),
    "*": DenseConfig(),
}
STEPS = 5


def model_of(compression: Any = MIXED) -> Model:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=size, embedding_dim=8, feature_names=[name])
        for name, size in SIZES.items()
    ]
    return Model(CompressedEmbeddingBagCollection(tables, compression=compression))


def draw(step: int, rank: int) -> KeyedJaggedTensor:
    """Return one rank's batch."""
    seeded = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 4, (len(SIZES), 4), generator=seeded)
    ids = [
        torch.randint(size, (number,), generator=seeded)
        for size, number in zip(SIZES.values(), lengths.sum(1).tolist(), strict=True)
    ]
    return KeyedJaggedTensor.from_lengths_sync(list(SIZES), torch.cat(ids), lengths.view(-1))


def train(model: torch.nn.Module, optimizer: Any) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, draw(step, dist.get_rank())).backward()
        optimizer.step()
        after_step(model, step, optimizer)


def train_sharded(how: str) -> dict[str, Any]:
    sharded = shard(model_of(), how)
    train(sharded, optimizer_of(sharded))
    return local_state(sharded)


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_beside_other_methods_as_the_unsharded_tables(two_ranks, how):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, draw(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
        after_step(model, step, optimizer)
    expected = model.state_dict()
    got = whole_state(two_ranks.run(train_sharded, how), expected)
    assert expected["embeddings.decoder.banks.item.draw"][0, 1] == 2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def train_all(how: str) -> dict[str, Any]:
    sharded = shard(model_of({"day": DenseConfig(), "*": CCE}), how)
    train(sharded, optimizer_of(sharded))
    return local_state(sharded)


def test_whole_on_every_rank_as_spread(two_ranks):
    like = model_of({"day": DenseConfig(), "*": CCE}).state_dict()
    spread = whole_state(two_ranks.run(train_all, "row_wise"), like)
    whole = whole_state(two_ranks.run(train_all, "in turn"), like)  # the first is data-parallel
    for name, value in spread.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def refused(case: str) -> str:
    model = model_of({"day": DenseConfig(), "*": CCE})
    if case == "no sharder":
        copied = DistributedModelParallel(model, plan=ShardingPlan({}), device=torch.device("cpu"))
        try:
            after_step(copied, 0, optimizer_of(copied))
        except ValueError as error:
            return str(error)
        return ""
    sharded = shard(model, "row_wise")
    optimizer = optimizer_of(sharded)
    loss_of(sharded, draw(0, dist.get_rank())).backward()
    optimizer.step()
    try:
        if case == "averaged":
            if dist.get_rank() == 1:
                sharded.module.embeddings.code_tables.banks["item"].codes[3] += 1
        else:
            after_step(sharded, 0, optimizer)
            tables, context = sharded.module.embeddings.code_tables, None
            context = tables.create_context()
            ids = tables.input_dist(context, draw(1, dist.get_rank())).wait().wait()
            ahead = tables.output_dist(context, tables.compute(context, ids))
            after_step(sharded, 1, optimizer)
            ahead.wait()
        after_step(sharded, 1, optimizer)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no sharder", "table 'item': several ranks must share a table whose codes change, got a copy on each"),
        ("averaged", "table 'item': codes and low-bit rows must be those that a fit or a checkpoint gave it"),
        ("ahead", "code tables: codes must be read in the step that they were looked up in"),
    ],
)
def test_what_is_refused_is_refused_on_every_rank(two_ranks, case, message):
    assert all(message in found for found in two_ranks.run(refused, case))
