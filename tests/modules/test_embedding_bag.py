"""`CompressedEmbeddingBagCollection` against `nn.EmbeddingBag` written out by hand over the decompressed tables."""

import copy
import pickle
from functools import cache

import pytest
import torch
import torchrec.fx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from tests.cases import CONFIGS, IDS, fitted, has_manager, steps_itself
from tests.cases import batch as one_feature
from tests.modules.batches import KEYS, ROWS, batch, collection, expected, tables
from torchrec_compress import CompressedEmbeddingBagCollection, decompress, native_parameters
from torchrec_compress.methods import DenseConfig, HashConfig, MECConfig, MEmComConfig, PQConfig, RandomCodesConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)


@cache
def mixed(pooling=PoolingType.SUM, is_weighted=False):
    torch.manual_seed(0)
    made = collection(None, pooling, is_weighted)
    return made, decompress(made)


def compare(out, wanted):
    assert out.keys() == list(wanted)
    assert out.length_per_key() == [value.shape[1] for value in wanted.values()]
    for key, value in wanted.items():
        torch.testing.assert_close(out[key], value, rtol=1e-4, atol=1e-4)


def test_variants_have_the_defaults_that_they_are_documented_with():
    found = {
        variant.__name__: variant.default_compression
        for variant in CompressedEmbeddingBagCollection.__subclasses__()
        if variant.__module__.startswith("torchrec_compress.")  # other tests have some of their own
    }
    assert found == {
        "MECEmbeddingBagCollection": MECConfig(num_codes=8),
        "PQEmbeddingBagCollection": PQConfig(num_codes=8),
        "RandomCodesEmbeddingBagCollection": RandomCodesConfig(num_codes=8),
        "MEmComEmbeddingBagCollection": MEmComConfig(num_buckets=1000),
    }


@given(data=st.data(), num_bags=st.integers(1, 5), mean=st.booleans(), narrow=st.booleans(), weighted=st.booleans())
def test_any_jagged_batch(data, num_bags, mean, narrow, weighted):
    weighted = weighted and not mean
    pooling = PoolingType.MEAN if mean else PoolingType.SUM
    compressed, dense = mixed(pooling, weighted)
    lengths = [data.draw(st.lists(st.integers(0, 4), min_size=num_bags, max_size=num_bags)) for _ in KEYS]
    features = batch(lengths, weighted=weighted, dtype=torch.int32 if narrow else torch.int64)
    compare(compressed(features), expected(dense, features, pooling))


def test_the_mixed_collection_uses_every_kind_of_part():
    compressed, _ = mixed()
    kinds = {name: method.method for name, method in compressed.methods().items()}
    assert kinds == {"user": "pq", "ctx": "dense", "item": "hash", "shop": "memcom", "tag": "random", "word": "int8"}


def test_keys_and_widths_are_torchrecs():
    compressed, dense = mixed()
    features = batch([[1, 2]] * len(KEYS))
    ours, theirs = compressed(features), dense(features)
    assert ours.keys() == theirs.keys() == ["u@user", "u2@user", "c", "u@ctx", "i@item", "i@shop", "u2@tag", "i@word"]
    assert ours.length_per_key() == theirs.length_per_key()
    torch.testing.assert_close(ours.values(), theirs.values(), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_batch_does_not_matter():
    compressed, _ = mixed()
    features = batch([[1, 2], [0, 3], [2, 2], [4, 0], [1, 1]])
    turned = features.permute([4, 2, 0, 3, 1])
    assert torch.equal(compressed(features).values(), compressed(turned).values())


def test_it_is_an_embedding_bag_collection():
    compressed, _ = mixed()
    assert isinstance(compressed, EmbeddingBagCollectionInterface)
    assert [table.name for table in compressed.embedding_bag_configs()] == [table.name for table in tables()]
    assert compressed.is_weighted() is False
    assert compressed.device == torch.device("cpu")


@pytest.mark.parametrize("pooling", list(PoolingType)[:2])
def test_variable_batch_per_feature(pooling):
    # VBE: deduplicated bags per feature, expanded by inverse indices; against the stock collection
    compressed, dense = mixed(pooling)
    strides = [2, 3, 1, 2, 3]
    ids = [torch.randint(0, ROWS[key], (2 * stride,)) for key, stride in zip(KEYS, strides, strict=True)]
    lengths = torch.cat([torch.tensor([[4, 0], [3, 3, 0], [2], [1, 3], [0, 5, 1]][f]) for f in range(5)])
    inverse = torch.stack([torch.randint(0, stride, (4,)) for stride in strides])
    features = KeyedJaggedTensor(
        keys=KEYS,
        values=torch.cat(ids),
        lengths=lengths,
        stride_per_key_per_rank=[[stride] for stride in strides],
        inverse_indices=(KEYS, inverse),
    )
    ours, theirs = compressed(features), dense(features)
    assert ours.values().shape[0] == 4
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours.values(), theirs.values(), rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torchrec.fx.symbolic_trace])
def test_fx_traces_to_the_same_outputs(config, trace):
    compressed = fitted(config)
    graph = trace(copy.deepcopy(compressed).train(not (steps_itself(config) or has_manager(config))))
    for bags in ([[1, 2], [], [3]], [[402], [0, 0]]):
        features = one_feature(bags)
        assert torch.equal(graph(features).values(), compressed(features).values())


def test_fx_traces_a_mixed_collection_with_weights():
    compressed, _ = mixed(is_weighted=True)
    graph = torch.fx.symbolic_trace(compressed)
    for num_bags in (1, 4):
        features = batch([[2] * num_bags] * len(KEYS), weighted=True)
        assert torch.equal(graph(features).values(), compressed(features).values())


@every
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_copies_serve_the_same_and_share_nothing(config, twin):
    compressed = fitted(config)
    other = twin(compressed)
    features = one_feature([[1, 2], [], [402]])
    assert torch.equal(other(features).values(), compressed(features).values())
    mine = {tensor.data_ptr() for tensor in compressed.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in other.state_dict().values()}


def test_a_training_step_moves_every_parameter_and_no_code():
    compressed = copy.deepcopy(mixed()[0])
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    optimizer = torch.optim.SGD(compressed.parameters(), lr=0.5)
    compressed(batch([[3] * 6] * len(KEYS))).values().square().sum().backward()
    optimizer.step()
    trained = {name for name, _ in compressed.named_parameters()}
    for name, value in compressed.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_half_precision_leaves_codes_alone():
    compressed = copy.deepcopy(mixed()[0]).to(torch.bfloat16)
    kinds = {name: value.dtype for name, value in compressed.state_dict().items()}
    assert kinds["code_tables.banks.user.codes"] == torch.uint8
    assert kinds["decoder.banks.user.codebooks"] == torch.bfloat16


def test_native_parameters_are_the_stock_tables():
    compressed, _ = mixed()
    names = {name for name, p in compressed.named_parameters() if any(p is q for q in native_parameters(compressed))}
    assert names == {name for name, _ in compressed.named_parameters() if "codebooks" not in name}
    assert len(names) == 5  # ctx, item's buckets, shop's buckets, scalars and biases


def test_user_init_fn_reaches_the_stored_tables():
    from tests.cases import table

    ones = table(init_fn=nn.init.ones_)
    for config in (DenseConfig(), HashConfig(num_buckets=40), MEmComConfig(num_buckets=40)):
        compressed = CompressedEmbeddingBagCollection([ones], compression=config)
        assert (compressed(one_feature([[5]])).values() == 1).all()
    pq = CompressedEmbeddingBagCollection([ones], compression=PQConfig(num_codes=2, codebook_size=8))
    assert (pq(one_feature([[5]])).values() == 1).all()


def test_an_ebc_of_the_same_tables_loads_into_dense():
    stock = EmbeddingBagCollection(tables())
    compressed = CompressedEmbeddingBagCollection(tables(), compression=DenseConfig())
    compressed.dense.load_state_dict(stock.state_dict())
    features = batch([[2, 1]] * len(KEYS))
    assert torch.equal(compressed(features).values(), stock(features).values())
    assert compressed.footprint().ratio == 1.0
