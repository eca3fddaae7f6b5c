"""Conversion of whole collections; the methods' own truths are in tests/methods."""

import copy
from importlib import import_module

import pytest
import torch
from torchrec import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    PoolingType,
)

from tests.cases import CASES, DIM, NUM_ROWS, contexts, counts, dense_collection, fit, fitted, fresh, rows, table
from tests.cases import batch as one_feature
from tests.modules.batches import KEYS, MIXED, batch, collection, expected, tables
from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into, decompress
from torchrec_compress.compression import resolve
from torchrec_compress.methods import DenseConfig, HashConfig, PQConfig, RandomCodesConfig, TableData


def stock(**kwargs):
    made = EmbeddingBagCollection(tables(), **kwargs)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made


def test_keys_widths_and_weights_are_kept():
    dense = stock(is_weighted=True)
    seen = {table.name: torch.randint(0, 9, (table.num_embeddings,)) for table in tables()}
    compressed = compress(dense, MIXED, counts=seen)
    features = batch([[2, 1]] * len(KEYS), weighted=True)
    assert compressed.is_weighted()
    assert compressed(features).keys() == dense(features).keys()
    assert compressed(features).length_per_key() == dense(features).length_per_key()
    assert compressed.footprint().tables.keys() == {table.name for table in tables()}


def test_dense_tables_are_copied_bit_for_bit():
    dense = stock()
    compressed = compress(dense, DenseConfig())
    features = batch([[2, 1]] * len(KEYS))
    assert torch.equal(compressed(features).values(), dense(features).values())
    with torch.no_grad():
        next(dense.parameters()).zero_()
    assert not torch.equal(compressed(features).values(), dense(features).values())


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_decompress_gives_a_stock_collection(pooling):
    compressed = collection(None, pooling)
    dense = decompress(compressed)
    assert type(dense) is EmbeddingBagCollection
    features = batch([[2, 0, 3]] * len(KEYS))
    wanted = expected(dense, features, pooling)
    for made in (compressed, dense):
        for key, value in wanted.items():
            torch.testing.assert_close(made(features)[key], value, rtol=1e-4, atol=1e-4)


def test_a_weighted_collection_stays_weighted():
    assert decompress(collection(None, is_weighted=True)).is_weighted()
    assert not decompress(collection(None)).is_weighted()


@pytest.mark.parametrize("method", ["pq", "memcom", "hash", "dense"])
@pytest.mark.parametrize("at_once", [1, 100, 402, 403])
def test_rows_are_expanded_piece_by_piece(method, at_once, monkeypatch):
    compressed = fit(CASES[method][0])
    whole = decompress(compressed).embedding_bags["item"].weight
    monkeypatch.setattr(import_module("torchrec_compress.convert.collections"), "_ROWS_AT_ONCE", at_once)
    torch.testing.assert_close(decompress(compressed).embedding_bags["item"].weight, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["pq", "mec", "quantile", "random"])
def test_the_fit_of_every_method_gets_the_seed(method):
    config = CASES[method][0]
    for seed in (0, 5):
        state = config.fit(table(), TableData(rows(), counts(), contexts(), seed))
        assert torch.equal(fit(config, seed=seed).code_tables.banks["item"].codes, state.codes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", CASES)
def test_what_is_compressed_without_gradients_can_be_trained(method, mode):
    config, features = CASES[method][-1], one_feature([[1, 2], [402]])
    with mode():
        model = fit(config)
    for name, value in fitted(config).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(value.is_inference() for value in [*model.parameters(), *model.buffers()])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        model(features).values().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_a_collection_that_can_never_be_trained_is_refused():
    with torch.inference_mode():
        collection = fresh(PQConfig(num_codes=2, codebook_size=16))
        with pytest.raises(ValueError, match="collection must not be made under"):
            compress_into(collection, {"item": rows()})


def test_decompressing_twice_changes_nothing():
    compressed = fit(CASES["pq"][0])
    once = decompress(compressed).state_dict()
    assert all(torch.equal(value, once[name]) for name, value in decompress(compressed).state_dict().items())


def test_compress_into_leaves_trainable_tables_without_rows_at_their_start():
    both = [table(name="a"), table(name="b")]
    start = CompressedEmbeddingBagCollection(both, compression={"a": HashConfig(num_buckets=9), "b": CASES["pq"][0]})
    before = copy.deepcopy(start)
    compress_into(start, {"b": rows()})
    ids = torch.arange(9)
    assert torch.equal(start.table_rows("a", ids), before.table_rows("a", ids))
    assert not torch.equal(start.table_rows("b", ids), before.table_rows("b", ids))


@pytest.mark.parametrize("method", ["pq", "mec", "int8", "int4"])
def test_compress_into_without_the_rows_that_a_method_needs(method):
    with pytest.raises(ValueError, match="table 'item': this method must be fitted to a pre-trained table, got none"):
        compress_into(fresh(CASES[method][0]), {}, counts={"item": counts()})


def test_compress_into_takes_the_collections_seed():
    """Hashed tables are read with the collection's hash: a fit by another seed would fill the wrong rows."""
    config = HashConfig(num_buckets=40)
    compressed = fresh(config, seed=5)
    compress_into(compressed, {"item": rows()}, counts={"item": counts()})
    wanted = fit(config, seed=5)
    ids = torch.arange(403)
    assert torch.equal(compressed.table_rows("item", ids), wanted.table_rows("item", ids))
    with pytest.raises(ValueError, match="seed must be the collection's own, 5, got 0; leave it out"):
        compress_into(compressed, {"item": rows()}, seed=0)


def test_rows_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"the pre-trained table must be 403 x 16, got \(403, 8\)"):
        compress_into(fresh(CASES["pq"][0]), {"item": torch.zeros(403, 8)})


def test_an_unknown_table_of_rows():
    with pytest.raises(ValueError, match=r"rows must name tables of \['item'\], got \['user'\]"):
        compress_into(fresh(CASES["pq"][0]), {"user": rows()})


def test_half_precision_tables_stay_half_and_dense():
    half = EmbeddingBagConfig(
        name="h", num_embeddings=50, embedding_dim=8, feature_names=["h"], data_type=DataType.FP16
    )
    compressed = compress(EmbeddingBagCollection([half]), DenseConfig())
    assert [parameter.dtype for parameter in compressed.parameters()] == [torch.float16]
    footprint = compressed.footprint()
    assert footprint.total_bytes == footprint.dense_bytes == DenseConfig().stored_bytes(half) == 50 * 8 * 2


def test_names_go_before_patterns_and_patterns_by_order():
    many = [table(name=name) for name in ("item_a", "item_b", "user")]
    one, two, rest = (RandomCodesConfig(num_codes=n, codebook_size=8) for n in (1, 2, 4))
    chosen = resolve(many, {"item_*": one, "*": rest, "item_b": two})
    assert chosen == {"item_a": one, "item_b": two, "user": rest}


def test_what_would_not_save_bytes_stays_dense():
    small = [table(name=name, num_embeddings=size) for name, size in (("big", 4000), ("small", 20), ("edge", 270))]
    chosen = resolve(small, PQConfig(num_codes=4, codebook_size=256))
    assert [config.method for config in chosen.values()] == ["pq", "dense", "dense"]


def test_a_collection_trained_after_its_fit_can_be_compressed_again():
    once = decompress(fit(CASES["pq"][0]))
    again = compress(once, CASES["int8"][0])
    served = decompress(again).embedding_bags["item"].weight
    assert (served - once.embedding_bags["item"].weight).abs().max() < 0.03
    assert not torch.equal(dense_collection().embedding_bags["item"].weight, served)


@pytest.mark.parametrize("method", ["pq", "memcom", "hash", "int8", "mec"])
def test_an_unpooled_collection_is_compressed_and_expanded(method):
    config = CASES[method][-1]
    configs = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])]
    dense = EmbeddingCollection(configs, need_indices=True)
    with torch.no_grad():
        dense.embeddings["item"].weight.copy_(rows())
    compressed = compress(dense, config, counts={"item": counts()}, seed=5)
    features = one_feature([[1, 5], [], [402]])
    assert compressed.seed == 5
    pooled = fit(config, seed=5)(one_feature([[1], [5], [402]])).values()
    assert compressed.need_indices()
    torch.testing.assert_close(compressed(features)["item"].values(), pooled)
    expanded = decompress(compressed)
    assert isinstance(expanded, EmbeddingCollection) and expanded.need_indices()
    torch.testing.assert_close(expanded(features)["item"].values(), pooled)


def test_a_table_may_be_called_method():
    """Which is also the key of a method in plain data."""
    dense = EmbeddingBagCollection([EmbeddingBagConfig(name="method", num_embeddings=300, embedding_dim=8)])
    methods = compress(dense, PQConfig(num_codes=2, codebook_size=16)).methods()
    assert compress(dense, methods).methods() == methods == {"method": PQConfig(num_codes=2, codebook_size=16)}
    with pytest.raises(ValueError, match="got plain data"):
        compress(dense, methods["method"].to_dict())


def test_of_a_compressed_collection_every_table_is_named_exactly():
    model = torch.nn.ModuleDict({"sparse": collection(HashConfig(num_buckets=2))})
    now = model["sparse"].methods()
    first, *rest = now
    for keys in ({f"sparse.{first}": DenseConfig(), "*": HashConfig(num_buckets=1)}, {first: DenseConfig()}):
        with pytest.raises(ValueError, match=r"'sparse' is compressed already.* must be named exactly") as refused:
            compress(model, keys)
        assert "for the rest" not in str(refused.value)
        missing = {f"sparse.{name}": now[name] for name in rest}
        assert f"got no name of {list(missing)}; as they are stored now, add {missing}" in str(refused.value)
    assert compress(model, {first: DenseConfig(), **missing}).sparse.methods() == {**now, first: DenseConfig()}
