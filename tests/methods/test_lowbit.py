from functools import partial

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from tests.cases import NUM_ROWS, batch, dense_collection, fitted, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress_into, decompress
from torchrec_compress.methods import Int4Config, Int8Config, TableData


def torchrec_quantised(dtype: torch.dtype, data_type: DataType) -> QuantEmbeddingBagCollection:
    """Return the test table as TorchRec quantises it."""
    stock = dense_collection()
    stock.qconfig = torch.ao.quantization.QConfig(
        activation=torch.ao.quantization.PlaceholderObserver.with_args(dtype=torch.float32),
        weight=torch.ao.quantization.PlaceholderObserver.with_args(dtype=dtype),
    )
    quantised = QuantEmbeddingBagCollection.from_float(stock)
    assert quantised.embedding_bag_configs()[0].data_type == data_type
    return quantised


@pytest.mark.parametrize(
    ("config", "dtype", "data_type"),
    [(Int8Config(), torch.qint8, DataType.INT8), (Int4Config(), torch.quint4x2, DataType.INT4)],
)
def test_it_serves_the_bits_of_torchrecs_quantised_tables(config, dtype, data_type):
    collection, theirs = fitted(config), torchrec_quantised(dtype, data_type)
    one_by_one = batch([[number] for number in range(NUM_ROWS)])
    assert torch.equal(collection(one_by_one).values(), theirs(one_by_one).values())
    pooled = batch([[1, 2, 2], [], [402, 0]])
    torch.testing.assert_close(collection(pooled).values(), theirs(pooled).values(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [Int8Config(), Int4Config()])
@pytest.mark.parametrize("init", [None, nn.init.ones_, partial(nn.init.normal_, mean=3.0, std=0.5)])
def test_an_unfitted_collection_serves_the_rows_that_its_table_would_start_from(config, init):
    served = decompress(fresh(config, init_fn=init, num_embeddings=3000)).embedding_bags["item"].weight
    if init is nn.init.ones_:
        assert (served == 1).all()
        return
    torch.manual_seed(0)
    stock = EmbeddingBagCollection([table(init_fn=init, num_embeddings=3000)]).embedding_bags["item"].weight
    assert torch.allclose(served.mean(), stock.mean(), atol=0.02)
    assert torch.allclose(served.std(), stock.std(), rtol=0.05)
    assert len(served.unique(dim=0)) == 3000


def test_an_init_fn_that_wants_the_whole_table_is_refused_until_a_fit():
    whole = table(init_fn=lambda weight: weight.copy_(torch.ones(NUM_ROWS, 16)))
    with pytest.raises(ValueError, match=r"table 'item': init_fn must fill any number of rows .*will_fit=True"):
        CompressedEmbeddingBagCollection([whole], compression=Int8Config())
    made = CompressedEmbeddingBagCollection([whole], compression=Int8Config(), will_fit=True)
    with pytest.raises(RuntimeError, match=r"table 'item'.*must be filled .* call compress\(\)"):
        made(batch([[0]]))
    compress_into(made, {"item": rows()})
    assert torch.equal(made(batch([[0]])).values(), fitted(Int8Config())(batch([[0]])).values())


@pytest.mark.parametrize("config", [Int8Config(), Int4Config()])
def test_nothing_trains(config):
    assert not list(fitted(config).parameters())


def test_fit_without_rows_raises():
    with pytest.raises(ValueError, match="table 'item': this method must be fitted to a pre-trained table, got none"):
        Int8Config().fit(table(), TableData(None))


def test_bytes():
    assert Int8Config().stored_bytes(table()) == NUM_ROWS * 20 + 4
    assert Int4Config().stored_bytes(table()) == NUM_ROWS * 12 + 4
