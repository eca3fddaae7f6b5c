"""Projections that several tables have together, over ranks: against one process, and saved and loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig, EmbeddingConfig

from tests.modules import batches
from tests.sharding.models import Model, local_state, loss_of, optimizer_of, shard, whole_state
from tests.sharding.test_parity import KINDS, check, compare_with_unsharded, draw
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import MethodConfig, NarrowConfig, PQConfig

KEYS = ["i", "u", "u2"]
SHARED = NarrowConfig(width=4, shared="kind")


def build(pooled: bool = True, seed: int = 0) -> Model:
    """Return two tables that share, of two features and of one, and one that does not."""
    torch.manual_seed(seed)
    config: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    tables = [
        config(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, rows, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]), ("shop", 300, ["i"]))
    ]
    methods: dict[str, MethodConfig] = {"shop": PQConfig(num_codes=2, codebook_size=16), "*": SHARED}
    collection: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
    return Model(collection(tables, compression=methods, seed=seed))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("pooled", [True, False])
def test_it_trains_as_unsharded(two_ranks, pooled, how):
    """Both ranks' gradients of both tables."""
    batch = "plain" if pooled else "uneven"
    check(two_ranks.run(compare_with_unsharded, build, (pooled,), how, batch, KEYS, batches.ROWS, False), 1e-5)


def train_and_save(folder: str) -> tuple[dict[str, Any], int]:
    model = shard(build(seed=1), "row_wise")
    optimizer = optimizer_of(model)
    loss_of(model, draw("plain", 0, 0, KEYS, batches.ROWS, False)).backward()
    optimizer.step()
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    (collection,) = (part for part in model.modules() if isinstance(part, CompressedEmbeddingBagCollection))
    return local_state(model), collection.footprint().total_bytes


def test_it_is_saved_once_and_loaded_unsharded(two_ranks, tmp_path):
    like = build().state_dict()
    found = two_ranks.run(train_and_save, str(tmp_path))
    before = whole_state([state for state, _ in found], like)
    assert [key for key in before if "projection" in key] == ["embeddings.decoder.banks.kind.projection"]
    assert {size for _, size in found} == {build().embeddings.footprint().total_bytes}
    model = build(seed=7)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    model.load_state_dict(state["model"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
