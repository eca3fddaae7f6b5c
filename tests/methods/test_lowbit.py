import pytest
import torch
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from tests.cases import NUM_ROWS, batch, dense_collection, fitted, fresh, table
from torchrec_compress import decompress
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
def test_an_unfitted_collection_raises(config):
    with pytest.raises(RuntimeError, match=r"table 'item'.*must be filled .* call compress\(\)"):
        fresh(config)(batch([[0]]))
    with pytest.raises(RuntimeError, match="must be filled"):
        decompress(fresh(config))


@pytest.mark.parametrize("config", [Int8Config(), Int4Config()])
def test_nothing_trains(config):
    assert not list(fitted(config).parameters())


def test_fit_without_rows_raises():
    with pytest.raises(ValueError, match="table 'item': this method must be fitted to a pre-trained table, got none"):
        Int8Config().fit(table(), TableData(None))


def test_bytes():
    assert Int8Config().stored_bytes(table()) == NUM_ROWS * 20 + 1
    assert Int4Config().stored_bytes(table()) == NUM_ROWS * 12 + 1
