"""Ids that a native table has no row for: neither looked up, nor lost from the length of a mean."""

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import BlocksConfig
from torchrec_compress.modules.partial_rows import put_in_place, some_rows, with_row, with_rows_alone

NUMBERS = torch.tensor([3, -1, 0, -1, 2])


def test_rows_of_other_ids_are_zeros_and_train_nothing():
    weight = torch.randn(4, 2, requires_grad=True)
    expected = torch.stack([weight[3], torch.zeros(2), weight[0], torch.zeros(2), weight[2]])
    assert with_row(NUMBERS).tolist() == [3, 0, 2]
    for found in (some_rows(weight, NUMBERS), put_in_place(weight[with_row(NUMBERS)], NUMBERS)):
        assert torch.equal(found, expected)
        (grad,) = torch.autograd.grad(found.sum(), weight)
        assert grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    nobody = torch.full((3,), -1)
    assert put_in_place(torch.empty(0, 2), nobody).tolist() == some_rows(weight, nobody).tolist() == [[0.0, 0.0]] * 3


def test_half_precision_rows_come_as_float32():
    assert some_rows(torch.ones(2, 2, dtype=torch.float16), NUMBERS[1:4]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_lose_the_ids_without_a_row(dtype):
    weights = torch.arange(5.0, requires_grad=True)
    given = KeyedJaggedTensor(["a", "b"], NUMBERS, weights, lengths=torch.tensor([2, 0, 1, 2], dtype=dtype))
    found = with_rows_alone(given)
    assert found.keys() == ["a", "b"] and found.stride() == 2
    assert found.values().tolist() == [3, 0, 2] and found.weights().tolist() == [0.0, 2.0, 4.0]
    assert found.lengths().tolist() == [1, 0, 1, 1] and found.lengths().dtype == dtype
    assert found.length_per_key() == [1, 2]
    assert torch.autograd.grad(found.weights().sum(), weights)[0].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    nobody = with_rows_alone(KeyedJaggedTensor(["a"], torch.full((2,), -1), lengths=torch.tensor([0, 2], dtype=dtype)))
    assert nobody.values().tolist() == [] and nobody.lengths().tolist() == [0, 0]


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_variable_batches_per_feature(pooling):
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=90, embedding_dim=8, feature_names=[name], pooling=pooling)
        for name in ("a", "b")
    ]
    ours = CompressedEmbeddingBagCollection(tables, compression=BlocksConfig(shares=(0.3,), order="ids"))
    lengths = torch.tensor([3, 1, 0, 2, 1])
    features = KeyedJaggedTensor(
        ["a", "b"],
        torch.tensor([1, 80, 40, 5, 70, 2, 33]),
        lengths=lengths,
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["a", "b"], torch.tensor([[1, 0, 1, 0], [2, 1, 0, 1]])),
    )
    out = ours(features)
    for name, picks in (("a", [1, 0, 1, 0]), ("b", [2, 1, 0, 1])):
        bags = torch.stack(
            [
                ours.table_rows(name, ids).sum(0) / (max(len(ids), 1) if pooling == PoolingType.MEAN else 1)
                for ids in features[name].values().split(features[name].lengths().tolist())
            ]
        )
        torch.testing.assert_close(out[name], bags[picks])
