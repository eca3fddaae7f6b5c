import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.cases import NUM_ROWS, batch, counts, fit, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, decompress
from torchrec_compress.methods import HashConfig, MEmComConfig, TableData


def native(collection):
    return dict(collection._native_weights("item"))


def test_a_row_is_its_bucket_times_its_scalar_plus_its_bias():
    # 7 ids, 2 shared rows: row(i) = U[i mod 2] * v_i + b_i, four ids to a stored row of scalars
    collection = fresh(MEmComConfig(num_buckets=2, bias=True), num_embeddings=40, embedding_dim=4)
    stored = native(collection)
    with torch.no_grad():
        stored["buckets"].copy_(torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]]))
        stored["scalars"].copy_(torch.arange(40.0).view(10, 4))
        stored["biases"].copy_(torch.arange(40.0).view(10, 4) / 100)
    out = collection(batch([[0], [3], [6, 5]])).values()
    expected = torch.tensor([[0.0, 0, 0, 0], [30.03, 60.03, 90.03, 120.03], [56.11, 112.11, 168.11, 224.11]])
    torch.testing.assert_close(out, expected)


def test_grouped_scalars_scale_a_quarter_each():
    collection = fresh(MEmComConfig(num_buckets=2, scalars="grouped"), num_embeddings=50, embedding_dim=8)
    stored = native(collection)
    with torch.no_grad():
        stored["buckets"].fill_(1.0)
        stored["scalars"][3] = torch.tensor([1.0, 2, 3, 4])
    assert collection(batch([[3]])).values().tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize("scalars", ["packed", "grouped"])
def test_weights_of_a_batch_may_be_of_any_float(scalars):
    tables = [EmbeddingBagConfig(name="item", num_embeddings=50, embedding_dim=8, feature_names=["item"])]
    config = MEmComConfig(num_buckets=5, scalars=scalars, bias=True)
    collection = CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=config)
    with torch.no_grad():
        native(collection)["biases"].normal_()
    ids, lengths, weights = torch.tensor([3, 9, 40]), torch.tensor([2, 0, 1]), torch.tensor([0.5, -2.0, 3.0])
    out = [
        collection(KeyedJaggedTensor(["item"], ids, weights=weights.to(dtype), lengths=lengths)).values()
        for dtype in (torch.float32, torch.float64, torch.float16)
    ]
    assert {values.dtype for values in out} == {torch.float32}
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("scalars", ["packed", "grouped"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_starts_as_the_hash_trick(scalars, bias):
    collection = fresh(MEmComConfig(num_buckets=40, scalars=scalars, bias=bias))
    served = decompress(collection).embedding_bags["item"].weight
    assert torch.equal(served, native(collection)["buckets"][torch.arange(NUM_ROWS) % 40])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_the_model_are_found_again(bias):
    shared, factor = torch.randn(5, 8), torch.rand(64, 1) + 0.5
    data = shared[torch.arange(64) % 5] * factor + (torch.randn(64, 1) if bias else 0.0)
    config, item = MEmComConfig(num_buckets=5, bias=bias), table(num_embeddings=64, embedding_dim=8)
    collection = fresh(config, num_embeddings=64, embedding_dim=8)
    collection.load_table("item", config.fit(item, TableData(data)))
    served = decompress(collection).embedding_bags["item"].weight
    worst = (served - data).square().mean() / data.var()
    assert worst < (0.02 if bias else 1e-10)


def test_more_freedom_never_fits_worse():
    def error(config):
        served = decompress(fit(config)).embedding_bags["item"].weight
        return float(((served - rows()).square().sum(1) * counts().clamp(min=1e-3)).sum().detach())

    packed = error(MEmComConfig(num_buckets=40))
    assert packed < error(HashConfig(num_buckets=40))
    assert error(MEmComConfig(num_buckets=40, bias=True)) < packed
    assert error(MEmComConfig(num_buckets=40, scalars="grouped")) < packed


def test_bytes():
    # 403 ids: 101 stored rows of 4 scalars
    assert MEmComConfig(num_buckets=40).stored_bytes(table()) == 4 * (40 * 16 + 101 * 4)
    assert MEmComConfig(num_buckets=40, bias=True).stored_bytes(table()) == 4 * (40 * 16 + 2 * 101 * 4)
    assert MEmComConfig(num_buckets=40, scalars="grouped").stored_bytes(table()) == 4 * (40 * 16 + 403 * 4)


@pytest.mark.parametrize("scalars", ["packed", "grouped"])
def test_buckets_of_zeros_are_served_as_zeros_and_train_on(scalars):
    """Their scalars stay 1: were both factors 0, neither would have a gradient."""
    config, trained = MEmComConfig(num_buckets=50, scalars=scalars), rows().clone()
    trained[torch.arange(NUM_ROWS) % 50 == 3] = 0.0
    state = config.fit(table(), TableData(trained))
    collection = fresh(config)
    collection.load_table("item", state)
    served = collection(batch([[3], [53]])).values()
    assert not served.any() and state.native["scalars"].isfinite().all()
    served.sum().backward()
    assert native(collection)["buckets"].grad[3].abs().min() > 0
