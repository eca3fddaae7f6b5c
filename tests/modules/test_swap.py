"""From outside it looks like TorchRec's class; what differs is listed in docs/swap.md."""

import copy
import re
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, at_rest, batch
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import HashConfig, PQConfig

PAGE = (Path(__file__).parents[2] / "docs" / "swap.md").read_text()
every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
pooled = pytest.mark.parametrize("is_pooled", [True, False], ids=["pooled", "unpooled"])
PQ = PQConfig(num_codes=4, codebook_size=16)
BAGS = [[1, 2], [], [402]]


def pair(config, is_pooled, changes=None, **options):
    """Return TorchRec's collection and ours, of the same config objects."""
    kind = EmbeddingBagConfig if is_pooled else EmbeddingConfig
    values = {"name": "item", "num_embeddings": NUM_ROWS, "embedding_dim": DIM, "feature_names": ["item"]}
    tables = [kind(**{**values, **(changes or {})})]
    stock, ours = (
        (EmbeddingBagCollection, CompressedEmbeddingBagCollection)
        if is_pooled
        else (EmbeddingCollection, CompressedEmbeddingCollection)
    )
    return stock(tables, **options), at_rest(ours(tables, compression=config, **options))


def values(output) -> torch.Tensor:
    return (output if isinstance(output, KeyedTensor) else output["item"]).values()


def configs_of(collection):
    pooled = isinstance(collection, EmbeddingBagCollection | CompressedEmbeddingBagCollection)
    return collection.embedding_bag_configs() if pooled else collection.embedding_configs()


def listed(whose: str, kind: str) -> set[str]:
    text = re.search(rf"Members that only {whose} have \(`{kind}`\): ([^.]*)\.", PAGE)
    assert text, (whose, kind)
    return set(re.findall(r"`(\w+)`", text.group(1)))


@pooled
def test_members_are_those_that_are_listed(is_pooled):
    # an attribute of a TorchRec release other than the one of the list is no difference of ours
    stock, ours = pair(PQ, is_pooled)
    theirs, mine = ({name for name in dir(made) if not name.startswith("_")} for made in (stock, ours))
    assert theirs - mine <= listed("TorchRec's", type(stock).__name__)
    assert mine - theirs == listed("ours", type(ours).__name__)


@every
@pooled
def test_everything_that_is_asked_of_it(config, is_pooled):
    stock, ours = pair(config, is_pooled)
    theirs, mine = stock(batch(BAGS)), ours(batch(BAGS))
    assert type(mine) is type(theirs)
    assert list(mine.keys()) == list(theirs.keys())
    assert values(mine).shape == values(theirs).shape and values(mine).dtype == values(theirs).dtype
    assert configs_of(ours) == configs_of(stock)
    assert all(one is other for one, other in zip(configs_of(ours), configs_of(stock), strict=True))
    assert ours.device == stock.device and ours.training is stock.training
    assert values(mine).requires_grad == any(parameter.requires_grad for parameter in ours.parameters())
    if is_pooled:
        assert mine.length_per_key() == theirs.length_per_key() and mine.offset_per_key() == theirs.offset_per_key()
        assert mine.key_dim() == theirs.key_dim() and ours.is_weighted() is stock.is_weighted()
    else:
        assert isinstance(mine["item"], JaggedTensor)
        assert torch.equal(mine["item"].lengths(), theirs["item"].lengths())
        assert torch.equal(mine["item"].offsets(), theirs["item"].offsets())
        assert ours.embedding_dim() == stock.embedding_dim() and ours.need_indices() is stock.need_indices()
        assert ours.embedding_names_by_table() == stock.embedding_names_by_table()


CASTS = {
    "half": torch.nn.Module.half,
    "bfloat16": torch.nn.Module.bfloat16,
    "double": torch.nn.Module.double,
    "to": lambda module: module.to(torch.float16),
}


@every
@pooled
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_outputs_are_float32_whatever_the_parameters_are_cast_to(config, is_pooled, cast):
    for made in pair(config, is_pooled):
        before = values(made(batch(BAGS)))
        twin = cast(copy.deepcopy(made))
        out = values(twin(batch(BAGS)))
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, before, rtol=0.02, atol=0.02)
        if out.requires_grad:
            out.sum().backward()
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in twin.parameters() if p.numel())


@every
def test_another_default_dtype_changes_nothing(config):
    torch.set_default_dtype(torch.float64)
    try:
        for made in pair(config, True):
            assert all(parameter.dtype == torch.float32 for parameter in made.parameters())
            assert values(made(batch(BAGS))).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@every
def test_gradients_of_weights(config):
    for made in pair(config, True, is_weighted=True):
        weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        features = KeyedJaggedTensor(["item"], torch.tensor([1, 2, 402]), weights, lengths=torch.tensor([2, 0, 1]))
        values(made(features)).sum().backward()
        assert weights.grad is not None and weights.grad.shape == (3,) and weights.grad.ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_than_stock_tables(dtype):
    stock, ours = pair(HashConfig(num_buckets=40), True, is_weighted=True)
    features = KeyedJaggedTensor(["item"], torch.tensor([1]), torch.ones(1, dtype=dtype), lengths=torch.tensor([1]))
    with pytest.raises(RuntimeError):
        stock(features)
    assert torch.equal(ours(features).values(), ours(batch([[1]], [1.0])).values())


@every
@pooled
def test_a_tensor_dict(config, is_pooled):
    bags = torch.nested.nested_tensor([[1, 2], [402]], layout=torch.jagged)
    for made in pair(config, is_pooled):
        assert torch.equal(values(made(TensorDict({"item": bags}))), values(made(batch([[1, 2], [402]]))))


@pooled
def test_a_device_context(is_pooled):
    with torch.device("meta"):
        stock, ours = pair(PQ, is_pooled)
    assert {tensor.device.type for tensor in ours.state_dict().values()} == {"meta"}
    assert ours.device == torch.device("meta")
    if is_pooled:
        assert stock.device == ours.device


@pooled
def test_configs_without_features_are_named_in_a_copy(is_pooled):
    kind = EmbeddingBagConfig if is_pooled else EmbeddingConfig
    mine = kind(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=[])
    made = (CompressedEmbeddingBagCollection if is_pooled else CompressedEmbeddingCollection)([mine], compression=PQ)
    (found,) = configs_of(made)
    assert mine.feature_names == [] and found.feature_names == ["item"]
    assert found.init_fn is mine.init_fn


@pooled
@pytest.mark.parametrize("config", [PQ, HashConfig(num_buckets=40)], ids=["pq", "hash"])
def test_managed_collisions_take_it(config, is_pooled):
    stock, ours = pair(config, is_pooled)
    wrap = ManagedCollisionEmbeddingBagCollection if is_pooled else ManagedCollisionEmbeddingCollection
    features = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([10**9, 5]), torch.tensor([1, 1]))
    for made in (stock, ours):
        policy = DistanceLFU_EvictionPolicy()
        managed = MCHManagedCollisionModule(
            zch_size=NUM_ROWS, device=torch.device("cpu"), eviction_interval=1, eviction_policy=policy
        )
        collection = wrap(made, ManagedCollisionCollection({"item": managed}, configs_of(stock)))
        out, _ = collection(features)
        assert values(out).shape == (2, DIM) and values(out).isfinite().all()


@pooled
def test_what_reads_the_tables_of_stock_collections_is_told_that_there_are_none(is_pooled):
    stock, ours = pair(PQ, is_pooled)
    name = "embedding_bags" if is_pooled else "embeddings"
    assert hasattr(stock, name) and not hasattr(ours, name) and not hasattr(ours, "anything")
    with pytest.raises(AttributeError, match=rf"has no {name}, its tables are compressed; rows are read by table_rows"):
        getattr(ours, name)
    wrap, sharder = ManagedCollisionEmbeddingCollection, ManagedCollisionEmbeddingCollectionSharder()
    if is_pooled:
        wrap, sharder = ManagedCollisionEmbeddingBagCollection, ManagedCollisionEmbeddingBagCollectionSharder()
    managed = MCHManagedCollisionModule(
        zch_size=NUM_ROWS,
        device=torch.device("cpu"),
        eviction_interval=1,
        eviction_policy=DistanceLFU_EvictionPolicy(),
    )
    collection = wrap(ours, ManagedCollisionCollection({"item": managed}, configs_of(stock)))
    with pytest.raises(
        AttributeError, match="managed collisions do, cannot shard it: remap ids in a module of its own"
    ):
        sharder.shardable_parameters(collection)


def test_mean_pooling_and_the_order_of_arguments():
    stock, ours = pair(PQ, True, {"pooling": PoolingType.MEAN})
    assert configs_of(ours)[0].pooling == configs_of(stock)[0].pooling == PoolingType.MEAN
    with pytest.raises(ValueError, match=r"device must be .*, got True; pass is_weighted and need_indices by name"):
        CompressedEmbeddingBagCollection(configs_of(stock), True, compression=PQ)
