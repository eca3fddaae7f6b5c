"""A load that fails on one rank raises there at once, and with the next batch on every rank until it is put right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingConfig

from tests.cases import batch, table
from tests.sharding.models import Model, optimizer_of, shard
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import CafeConfig, HashConfig, MEmComConfig, MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.sharding.loading import load_plain

FEATURES = batch([[number] for number in range(0, 400, 7)])
CODED = PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, popularity="count")
MANAGED = CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4)
TRAINED = NarrowConfig(width=8, bits=8)


def to_float(value: Tensor) -> Tensor:
    return value.float()


def poison(value: Tensor) -> Tensor:
    wrong = value.clone()
    wrong[-1] = float("nan")  # of the rows of the last rank
    return wrong


def count_on(value: Tensor) -> Tensor:
    return value + 1


def halve(value: Tensor) -> Tensor:
    return value // 2


def make(config: MethodConfig, pooled: bool) -> Model:
    torch.manual_seed(0)
    if pooled:
        return Model(CompressedEmbeddingBagCollection([table()], compression=config))
    rows = EmbeddingConfig(name="item", num_embeddings=403, embedding_dim=16, feature_names=["item"])
    return Model(CompressedEmbeddingCollection([rows], compression=config))


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as caught:
        return str(caught)
    return ""


def load_apart(config: MethodConfig, pooled: bool, part: str, change: Callable[[Tensor], Tensor]) -> list[str]:
    """Return what loading says where the last rank's state is bad, then two batches, then a good load and batch."""
    model = make(config, pooled)
    good = {name: value.detach().clone() for name, value in model.state_dict().items()}
    sharded: Any = shard(model, "row_wise").eval()
    state = dict(good)
    (name,) = [name for name in good if name.endswith(part) and "embeddings." in name]
    if dist.get_rank() == 1:
        state[name] = change(state[name])
    calls = [lambda: sharded.load_state_dict(state), lambda: sharded(FEATURES), lambda: sharded(FEATURES)]
    return [message(call) for call in (*calls, lambda: sharded.load_state_dict(dict(good)), lambda: sharded(FEATURES))]


@pytest.mark.parametrize(
    ("config", "pooled", "part", "change", "told"),
    [
        (CODED, True, "item.codes", to_float, "codes: must be integers, got torch.float32"),
        (CODED, True, "decoder.layout", count_on, "table 'item': the checkpoint's method and sizes and seed must be"),
        (CODED, True, "item.codebooks", poison, "item.codebooks: values must be finite"),
        (HashConfig(num_buckets=40), True, ".weight", poison, "weight: values must be finite"),
        (MEmComConfig(num_buckets=40), False, "item__buckets.weight", poison, "weight: values must be finite"),
        (MANAGED, True, "weight", poison, "weight: values must be finite"),
        (TRAINED, True, "item.rows", to_float, "rows: must be integers, got torch.float32"),
        (TRAINED, True, "item.rows", halve, "table 'item': rows of 8 bits must be as training"),
    ],
)
def test_a_bad_shard_of_one_rank_is_an_error_of_all_with_the_next_batch(two_ranks, config, pooled, part, change, told):
    first, last = two_ranks.run(load_apart, config, pooled, part, change)
    assert first[0] == "" and told in last[0]
    for number in (1, 2):
        assert first[number].startswith("rank 1: ") and told in first[number]
        assert told in last[number] and "load on all ranks" in last[number]
    assert first[3:] == last[3:] == ["", ""]


def load_other_steps() -> list[str]:
    """Return what is said where the last rank's optimizer is given steps that it cannot have made."""
    sharded = shard(make(TRAINED, True), "row_wise")
    optimizer = optimizer_of(sharded)
    sharded(FEATURES).sum().backward()
    state = sharded.fused_optimizer.state_dict()
    steps = [value for held in state["state"].values() for name, value in held.items() if name.endswith("step")]
    good = [int(value) for value in steps]
    if dist.get_rank() == 1:
        steps[0].fill_(-1)
    found = [message(lambda: sharded.fused_optimizer.load_state_dict(state)), message(lambda: sharded(FEATURES))]
    for value, number in zip(steps, good, strict=True):
        value.fill_(number)
    optimizer.zero_grad()
    found.append(message(lambda: sharded.fused_optimizer.load_state_dict(state)))
    return [*found, message(lambda: sharded(FEATURES))]


def test_a_bad_state_of_an_optimizer_is_an_error_of_all(two_ranks):
    first, last = two_ranks.run(load_other_steps)
    assert first[0] == "" and "the optimizer's step must be in" in last[0]
    assert first[1].startswith("rank 1: ") and "the optimizer's step must be in" in first[1]
    assert first[2:] == last[2:] == ["", ""]


def load_whole() -> str:
    """Return what loading whole tensors says of a number in the rows of the last rank."""
    sharded = shard(make(HashConfig(num_buckets=40), True), "row_wise")
    values = make(HashConfig(num_buckets=40), True).state_dict()
    (name,) = [name for name in values if name.endswith("weight") and "bags" in name]
    return message(lambda: load_plain(sharded.module, {**values, name: poison(values[name])}))


def test_whole_tensors_are_refused_by_all_ranks(two_ranks):
    assert all("values must be finite" in told for told in two_ranks.run(load_whole))
