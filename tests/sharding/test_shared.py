"""Native tables that several of the user's tables share, over ranks: against one process, from meta, when loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from tests.methods.throwaway import SharedHashConfig
from tests.modules import batches
from tests.sharding import swaps
from tests.sharding.models import Model, local_state, loss_of, make_plan, optimizer_of, shard, whole_state
from tests.sharding.test_parity import KINDS, check, compare_with_unsharded, draw
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import MemRecConfig, MethodConfig, PQConfig, RobeConfig

KEYS = ["i", "u", "u2"]
SHARED: dict[str, MethodConfig] = {
    "bags": SharedHashConfig(num_buckets=50),
    "rows": RobeConfig(num_blocks=60, block_size=4, memory="memory", signs=True),
    "tokens": MemRecConfig(num_tokens=60, num_weights=40, num_weight_hashes=2, memory="memory"),
}


def build(kind: str, pooled: bool = True, device: str = "cpu", seed: int = 0) -> Model:
    """Return two tables that share, of two features and of one, and one that does not."""
    torch.manual_seed(seed)
    config: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    tables = [
        config(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, rows, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]), ("shop", 300, ["i"]))
    ]
    methods: dict[str, MethodConfig] = {"shop": PQConfig(num_codes=2, codebook_size=16), "*": SHARED[kind]}
    collection: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
    return Model(collection(tables, device=torch.device(device), compression=methods, seed=seed))


@pytest.mark.parametrize("how", [*KINDS, "column_wise"])
@pytest.mark.parametrize("batch", ["plain", "rank 1 empty"])
def test_shared_bags_train_as_unsharded(two_ranks, batch, how):
    check(two_ranks.run(compare_with_unsharded, build, ("bags",), how, batch, KEYS, batches.ROWS, False), 1e-5)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(
    ("kind", "pooled"), [("rows", True), ("rows", False), ("tokens", True), ("tokens", False), ("bags", False)]
)
def test_shared_rows_train_as_unsharded(two_ranks, kind, pooled, how):
    arguments = (kind, pooled)
    check(two_ranks.run(compare_with_unsharded, build, arguments, how, "uneven", KEYS, batches.ROWS, False), 1e-5)


def from_meta(kind: str, pooled: bool, how: str) -> dict[str, Any]:
    return local_state(shard(build(kind, pooled, "meta", seed=3), how))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(("kind", "pooled"), [("bags", True), ("rows", True), ("bags", False)])
def test_it_starts_the_same_under_every_plan(two_ranks, four_ranks, kind, pooled, how):
    like = build(kind, pooled, seed=3).state_dict()
    (key,) = (name for name in like if "memory.weight" in name)
    for ranks in (two_ranks, four_ranks):
        by_rank = ranks.run(from_meta, kind, pooled, how)
        assert torch.equal(whole_state([{key: state[key]} for state in by_rank], like)[key], like[key])


def in_scripts(kind: str, pooled: bool) -> dict[tuple[str, ...], str]:
    more = dict.fromkeys(("one", "two"), SHARED[kind])
    swaps.STORED.update(more)
    try:
        return swaps.all_swaps([*more, "hash", "pq"], pooled, ("TorchRec's planner",))
    finally:
        for name in more:
            del swaps.STORED[name]


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kind", SHARED)
def test_every_kind_of_script(two_ranks, kind, pooled):
    """Whosesoever sharders, from CPU or meta, piped or not."""
    for found in two_ranks.run(in_scripts, kind, pooled):
        assert {key: wrong for key, wrong in found.items() if wrong} == {}


def starts(how: str) -> dict[str, Any]:
    sharders: Any = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    model = build("bags", device="meta")
    plan = make_plan(model, how, sharders)
    return local_state(DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders))


@pytest.mark.parametrize("how", ["table_wise", "column_wise"])
def test_torchrecs_own_sharders_draw_where_they_do_not_tell_the_rows(two_ranks, how):
    like = build("bags").state_dict()
    (key,) = (name for name in like if "memory.weight" in name)
    weight = whole_state([{key: state[key]} for state in two_ranks.run(starts, how)], like)[key]
    assert 0.9 * 50**-0.5 < float(weight.abs().max()) <= 50**-0.5
    assert len(weight.unique()) > 0.9 * weight.numel()


def save(kind: str, how: str, folder: str) -> tuple[Any, Any]:
    model = shard(build(kind), how)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    before = local_state(model)
    train(model, optimizer, 1)
    return before, local_state(model)


def load(kind: str, how: str, folder: str) -> tuple[Any, Any]:
    model = shard(build(kind, seed=0), how)
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)  # other values, to be replaced
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    loaded = local_state(model)
    train(model, optimizer, 1)
    return loaded, local_state(model)


def train(model: Any, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, draw("plain", number, 0, KEYS, batches.ROWS, False)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize(("saved", "loaded"), [("row_wise", "table_wise"), ("table_wise", "row_wise")])
def test_any_plan_loads_any_other(two_ranks, four_ranks, tmp_path, kind, saved, loaded):
    like = build(kind).state_dict()
    first, second = four_ranks.run(save, kind, saved, str(tmp_path)), two_ranks.run(load, kind, loaded, str(tmp_path))
    for part, tolerance in ((0, 0.0), (1, 1e-5)):
        theirs, ours = (whole_state([result[part] for result in results], like) for results in (first, second))
        assert theirs.keys() == ours.keys() == like.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
