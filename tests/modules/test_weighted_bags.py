"""Weights of any float dtype: taken as float32 by every method and by tables that stay dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchrec import DataType, EmbeddingBagCollection, KeyedJaggedTensor

from tests.cases import CONFIGS, IDS, at_rest, is_managed, table
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, HashConfig, MethodConfig, dense_bytes

LENGTHS = torch.tensor([3, 0, 2, 1])
IDS_OF_BAGS = torch.tensor([1, 2, 2, 402, 0, 7])
WEIGHTS = torch.tensor([1.03, 0.51, 0.27, -2.1, 3.3, 0.7])  # no float16 or bfloat16 holds them
OTHERS = [torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", OTHERS, ids=str)


def served(collection, weights: Tensor) -> Tensor:
    return collection(KeyedJaggedTensor(["item"], IDS_OF_BAGS, weights, lengths=LENGTHS)).values()


def weighted(config: MethodConfig, *types: DataType) -> CompressedEmbeddingBagCollection:
    tables = [table(name=f"item{number}", data_type=each) for number, each in enumerate(types)]
    torch.manual_seed(0)
    return at_rest(CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=config))


@dtypes
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_they_are_taken_as_float32(config, dtype):
    types = [DataType.FP32] if is_managed(config) else [DataType.FP32, DataType.FP16]
    parts, half = config.parts(table(), 0), table(data_type=DataType.BF16)
    if not (parts.native or parts.dense) and config.stored_bytes(half) < dense_bytes(half):
        types.append(DataType.BF16)  # else in a table of TorchRec's, which has none
    for collection in (weighted(config, *types), *(weighted(config, each) for each in types[1:])):
        given = WEIGHTS.to(dtype).requires_grad_()
        wide = given.detach().float().requires_grad_()
        got, expected = served(collection, given), served(collection, wide)
        assert got.dtype == torch.float32 and torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert given.grad is not None and wide.grad is not None and given.grad.dtype == dtype
        torch.testing.assert_close(given.grad, wide.grad.to(dtype))  # tables' are added up before or after the rounding
        assert torch.equal(served(torch.fx.symbolic_trace(collection.eval()), given), got)


@pytest.mark.parametrize("config", [DenseConfig(), HashConfig(num_buckets=40)], ids=["dense", "hash"])
def test_half_precision_tables_do_not_round_them(config):
    collection = weighted(config, DataType.FP16)
    (weight,) = collection.parameters()
    rows = collection.table_rows("item0", IDS_OF_BAGS).float() * WEIGHTS[:, None]
    got = served(collection, WEIGHTS)
    torch.testing.assert_close(got, torch.stack([part.sum(0) for part in rows.split(LENGTHS.tolist())]))
    got.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16 and weight.grad.ne(0).any()


def test_weights_of_the_tables_dtype_give_what_torchrec_gives():
    stock = EmbeddingBagCollection([table()], is_weighted=True)
    ours = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=DenseConfig())
    ours.dense.load_state_dict(stock.state_dict())
    assert torch.equal(served(ours, WEIGHTS), served(stock, WEIGHTS))
    out = ours(KeyedJaggedTensor(["item"], IDS_OF_BAGS, WEIGHTS, lengths=LENGTHS))
    assert out.keys() == ["item"] and out.length_per_key() == [16]


@dtypes
def test_variable_batches_keep_their_order(dtype):
    tables = [table(name=name, feature_names=[name]) for name in ("a", "b")]
    collection = CompressedEmbeddingBagCollection(
        tables, is_weighted=True, compression={"a": DenseConfig(), "b": HashConfig(num_buckets=40)}
    )

    def batch(weights: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            ["a", "b"],
            torch.tensor([1, 2, 3, 4]),
            weights,
            lengths=torch.tensor([1, 2, 1]),
            stride_per_key_per_rank=[[2], [1]],
            inverse_indices=(["a", "b"], torch.tensor([[1, 0, 1], [0, 0, 0]])),
        )

    weights = WEIGHTS[:4].to(dtype)
    got = collection(batch(weights)).values()
    assert got.shape == (3, 32) and torch.equal(got, collection(batch(weights.float())).values())
    rows = collection.table_rows("a", torch.tensor([1, 2, 3])) * weights[:3, None].float()
    torch.testing.assert_close(got[:, :16], torch.stack([rows[1:].sum(0), rows[0], rows[1:].sum(0)]))
