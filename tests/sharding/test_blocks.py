"""Blocks by popularity over many ranks: means, weights, batches of any size, and where ids have their rows."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import NUM_ROWS, batch, fitted, table
from tests.sharding.models import Model, shard
from tests.sharding.test_parity import check, compare_with_unsharded
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compress_into
from torchrec_compress.methods import BlocksConfig

SORTED, COUNTED = BlocksConfig(order="ids", widths=(16, 8, 4)), BlocksConfig(shares=(0.1, 0.3))
KINDS = ["row_wise", "table_wise", "data_parallel"]
RANGES = {"u": 400, "u2": 400, "i": 300}
FEATURES = batch([[number, (5 * number) % NUM_ROWS] for number in range(NUM_ROWS)])


def popularity(number: int) -> torch.Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(number))


def filled(collection):
    tables = collection.table_configs()
    compress_into(collection, {}, counts={each.name: popularity(each.num_embeddings) for each in tables})
    return Model(collection)


def pooled(pooling: PoolingType, weighted: bool) -> Model:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=size, embedding_dim=16, feature_names=features, pooling=pooling)
        for name, size, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]))
    ]
    methods = {"user": COUNTED, "item": SORTED}
    return filled(CompressedEmbeddingBagCollection(tables, is_weighted=weighted, compression=methods))


def unpooled() -> Model:
    torch.manual_seed(0)
    tables = [
        EmbeddingConfig(name=name, num_embeddings=size, embedding_dim=16, feature_names=features)
        for name, size, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]))
    ]
    return filled(CompressedEmbeddingCollection(tables, compression={"user": COUNTED, "item": SORTED}))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_bags_train_as_unsharded(two_ranks, how, kind):
    arguments = (PoolingType.MEAN if kind == "mean" else PoolingType.SUM, kind == "weighted")
    results = two_ranks.run(
        compare_with_unsharded, pooled, arguments, how, "plain", ["i", "u", "u2"], RANGES, kind == "weighted"
    )
    check(results, 1e-6)


@pytest.mark.parametrize("how", ["table_wise", "data_parallel"])  # row-wise bags of TorchRec's need equal batches
@pytest.mark.parametrize("kind", ["uneven", "empty", "rank 1 empty", "int32"])
def test_means_of_any_batch_train_as_unsharded(two_ranks, how, kind):
    arguments = (PoolingType.MEAN, False)
    check(two_ranks.run(compare_with_unsharded, pooled, arguments, how, kind, ["i", "u", "u2"], RANGES, False), 1e-6)


@pytest.mark.parametrize("how", [*KINDS, "in turn"])
@pytest.mark.parametrize("kind", ["uneven", "empty", "rank 1 empty"])
def test_unpooled_rows_train_as_unsharded(two_ranks, how, kind):
    check(two_ranks.run(compare_with_unsharded, unpooled, (), how, kind, ["i", "u", "u2"], RANGES, False), 1e-6)


def ids_sent(how: str) -> list[int]:
    """Return how many ids this rank looks up in native tables, and how many it was given."""
    sharded = shard(pooled(PoolingType.SUM, False), how)
    bags, seen = sharded.module.embeddings.bags, []
    sent = bags.native.input_dist
    bags.native.input_dist = lambda ctx, features: (seen.append(features), sent(ctx, features))[1]
    keys = ["i", "u", "u2"]
    ids = torch.arange(9) + 50 * dist.get_rank()
    sharded(KeyedJaggedTensor.from_lengths_sync(keys, ids, torch.ones(9, dtype=torch.int64)))
    return [len(seen[0].values()), len(ids)]


def test_an_id_travels_once(two_ranks):
    for sent, given in two_ranks.run(ids_sent, "row_wise"):
        assert sent == given


def model_of(device: str = "cpu") -> Model:
    torch.manual_seed(0)
    made = CompressedEmbeddingBagCollection([table()], device=torch.device(device), compression=COUNTED)
    if device == "cpu":
        made.load_state_dict(fitted(COUNTED).state_dict())
    return Model(made)


def load(folder: str, how: str) -> torch.Tensor:
    sharded = shard(model_of(device="meta"), how)
    state = {"model": sharded.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    sharded.load_state_dict(state["model"])
    return sharded(FEATURES).detach()


@pytest.mark.parametrize("how", KINDS)
def test_a_checkpoint_brings_the_blocks_to_every_rank(two_ranks, tmp_path, how):
    model = model_of()
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path), no_dist=True)
    for found in two_ranks.run(load, str(tmp_path), how):
        torch.testing.assert_close(found, model(FEATURES).detach(), rtol=1e-6, atol=1e-6)


def start_from_meta(how: str) -> torch.Tensor:
    sharded = shard(model_of(device="meta"), how)
    sharded(FEATURES)
    return sharded.module.embeddings.decoder.bank("item").places.clone()


def test_without_one_they_are_cut_in_the_order_of_ids(two_ranks):
    expected = CompressedEmbeddingBagCollection([table()], compression=COUNTED).decoder.bank("item").places
    for found in two_ranks.run(start_from_meta, "row_wise"):
        assert torch.equal(found, expected)
