"""Bad input on one rank is an error on every rank, at once."""

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.modules import batches
from tests.sharding.models import Model, shard
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, Int8Config, MEmComConfig, RandomCodesConfig

KINDS = ["row_wise", "table_wise", "data_parallel"]


def features_with(key: str, wrong: int, rank: int) -> KeyedJaggedTensor:
    features = batches.batch([[1, 1]] * 5)
    if dist.get_rank() == rank:
        at = int(features.offset_per_key()[batches.KEYS.index(key)])
        features.values()[at] = wrong
    return features


def bad_id(how: str, key: str, wrong: int) -> str:
    """Return the error of a batch with one wrong id on the last rank; then run a good batch."""
    sharded = shard(Model(batches.collection()), how)
    try:
        sharded(features_with(key, wrong, dist.get_world_size() - 1))
        message = ""
    except ValueError as error:
        message = str(error)
    sharded(batches.batch([[1, 1]] * 5))  # the ranks are still in step
    return message


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(
    ("key", "wrong", "table"), [("u2", 400, "user"), ("i", -1, "item"), ("i", 301, "item"), ("c", 9, "ctx")]
)
def test_an_id_out_of_range_is_an_error_on_every_rank(two_ranks, how, key, wrong, table):
    mine, theirs = two_ranks.run(bad_id, how, key, wrong)
    for message in (mine, theirs):
        assert f"feature {key!r}" in message and f"got {wrong}" in message and "must be in [0, " in message
    assert mine.startswith("rank 1: ")  # the first rank quotes the other
    assert theirs.startswith("table ")


def never_filled(how: str) -> str:
    """Return the error of a table that waits for its fit and was materialised from the meta device."""
    table = EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"])
    meta = CompressedEmbeddingBagCollection(
        [table], device=torch.device("meta"), compression=Int8Config(), will_fit=True
    )
    sharded = shard(Model(meta), how)
    try:
        sharded(KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1]), torch.tensor([1])))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", KINDS)
def test_an_unfilled_table_raises(two_ranks, how):
    for message in two_ranks.run(never_filled, how):
        assert "table 't': the code table must be filled" in message


def small_tables(how: str) -> float:
    """Return the largest gap to unsharded with tables of fewer rows than ranks, and dense ones that a rank lacks."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name="a", num_embeddings=5, embedding_dim=64, feature_names=["a"]),
        EmbeddingBagConfig(name="b", num_embeddings=2, embedding_dim=8, feature_names=["b"]),
    ]

    compression = {"a": RandomCodesConfig(num_codes=2, codebook_size=2), "b": DenseConfig()}
    plain = Model(CompressedEmbeddingBagCollection(tables, compression=compression))
    features = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([4, 0, 3, 1]), torch.tensor([1, 2, 1, 0]))
    expected = plain(features).detach()
    return float((shard(plain, how)(features) - expected).abs().max())


def native_rows_for_some_ranks() -> str:
    """Return the error of a native table with fewer rows than ranks, which FBGEMM would raise on one rank only."""
    table = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=32, feature_names=["f"])
    try:
        shard(Model(CompressedEmbeddingBagCollection([table], compression=MEmComConfig(num_buckets=4))), "row_wise")
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_without_native_rows_is_refused_on_every_rank(four_ranks):
    for message in four_ranks.run(native_rows_for_some_ranks):
        assert "table 't'" in message and "gives rank 3 none" in message


@pytest.mark.parametrize("how", KINDS)
def test_fewer_rows_than_ranks(four_ranks, how):
    assert four_ranks.run(small_tables, how) == [0.0] * 4
