"""Tables of FP16 and BF16: what a method keeps of them, and what it does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec import DataType, EmbeddingBagCollection

from tests.cases import CONFIGS, IDS, NUM_ROWS, batch, contexts, counts, fresh, is_managed, rows, table
from torchrec_compress import compress, decompress
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    MEmComConfig,
    MethodConfig,
    NarrowConfig,
    PQConfig,
    QRConfig,
    TableData,
)

BAGS = [[1, 2, 2], [], [402, 0], [7]]
GIVEN = {"counts": {"item": counts()}, "contexts": {"item": contexts()}}
# numbers of one id, which train by steps that FP16 would lose
OF_IDS = ("scalars", "biases", "weights", "weight_0", "weight_1")


def stock(data_type: DataType) -> EmbeddingBagCollection:
    made = EmbeddingBagCollection([table(data_type=data_type)])
    with torch.no_grad():
        made.embedding_bags["item"].weight.copy_(rows())
    return made


def native(collection) -> dict[str, torch.dtype]:
    """Return the dtypes of what lies in TorchRec's tables, by part."""
    parts = collection.blueprint.parts["item"].native
    weights = dict(collection._native_weights("item"))
    return {part.name: weights[part.name].dtype for part in parts}


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16], ids=lambda each: each.value)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rows_of_native_tables_are_of_the_tables_type(config: MethodConfig, data_type):
    half = table(data_type=data_type)
    parts = config.parts(table(), seed=0)
    if parts.managed is not None or (data_type == DataType.BF16 and (parts.native or parts.dense)):
        with pytest.raises(ValueError, match=rf"table 'item': data_type must be FP32.*, got {data_type.value}"):
            fresh(config, data_type=data_type)
        return
    is_kept = config.is_compressed and config.exported().stored_bytes(half) < NUM_ROWS * 16 * 2
    if not is_kept and data_type == DataType.BF16:  # else dense, and lost
        with pytest.raises(ValueError, match=r"table 'item': data_type must be FP32 or FP16 where rows lie"):
            fresh(config, data_type=data_type)
        return
    collection, wide = fresh(config, data_type=data_type), fresh(config)
    if not is_kept:
        assert not collection.methods()["item"].is_compressed
        assert collection.dense.embedding_bags["item"].weight.dtype == torch.float16
        return
    assert config.stored_bytes(half) == collection.footprint().total_bytes
    dtypes, stored = native(collection), {DataType.FP16: torch.float16}.get(data_type)
    assert stored is not None or not dtypes  # or it would be lost
    assert {dtype for name, dtype in dtypes.items() if name not in OF_IDS} <= {stored}
    assert {dtype for name, dtype in dtypes.items() if name in OF_IDS} <= {torch.float32}
    whole = wide.table_state("item").native  # several parts may be one table
    saved = {whole[name].data_ptr(): whole[name].nbytes // 2 for name, dtype in dtypes.items() if dtype == stored}
    assert collection.footprint().total_bytes == wide.footprint().total_bytes - sum(saved.values())
    if not saved and collection.decoder.banks:  # the rest does not know
        assert wide.footprint().compressed_ratio == pytest.approx(2 * collection.footprint().compressed_ratio)
    assert collection.eval()(batch(BAGS)).values().dtype == torch.float32


@pytest.mark.parametrize("config", [config for config in CONFIGS if not is_managed(config)], ids=lambda c: c.method)
def test_a_trained_table_of_fp16_is_compressed_and_expanded(config: MethodConfig):
    dense = stock(DataType.FP16)
    small = compress(dense, config, seed=3, **GIVEN).eval()
    full = EmbeddingBagCollection([table()])
    with torch.no_grad():
        full.embedding_bags["item"].weight.copy_(dense.embedding_bags["item"].weight.float())
    wide = compress(full, config, seed=3, **GIVEN).eval()
    ids = torch.arange(NUM_ROWS)
    if small.methods() != wide.methods():
        pytest.skip("of FP16 the table would not get smaller")
    torch.testing.assert_close(small.table_rows("item", ids), wide.table_rows("item", ids), rtol=2e-3, atol=4e-3)
    back = decompress(small).embedding_bags["item"].weight
    assert back.dtype == torch.float16 and torch.equal(back, small.table_rows("item", ids).half())
    assert small.table_configs()[0].data_type == DataType.FP16


def test_what_fp16_cannot_hold_is_told():
    large = EmbeddingBagCollection([table()])
    with torch.no_grad():
        large.embedding_bags["item"].weight.fill_(60_000.0)
        large.embedding_bags["item"].weight[5] = 7e4
    half = table(data_type=DataType.FP16)
    for config in (HashConfig(num_buckets=400), MEmComConfig(num_buckets=400), NarrowConfig(width=8)):
        made = fresh(config, data_type=DataType.FP16)
        learned = config.learn(half, TableData(large.embedding_bags["item"].weight.detach()))
        with pytest.raises(
            ValueError, match=r"table 'item': pre-trained values must be in \+-65504 for data_type FP16"
        ):
            learned.encode_all(large.embedding_bags["item"].weight.detach())
        assert torch.isfinite(made.table_rows("item", torch.arange(3))).all()
    codes = fresh(PQConfig(num_codes=4, codebook_size=16), data_type=DataType.FP16)
    with torch.no_grad():
        for value in codes.decoder.parameters():
            value.fill_(1e5)
    with pytest.raises(
        ValueError, match=r"decompress: table 'item': rows must be in \+-65504 to be stored as torch.fl"
    ):
        decompress(codes)


LOADED = (
    HashConfig(num_buckets=40),
    NarrowConfig(width=4),
    MEmComConfig(num_buckets=40),
    QRConfig(num_buckets=20),
    DenseConfig(),
)


@pytest.mark.parametrize("config", LOADED, ids=lambda config: config.method)
def test_a_checkpoint_of_another_type_is_loaded(config: MethodConfig, caplog):
    """TorchRec copies whatever there is; what is rounded is said, what would be infinite refused."""
    wide, half = fresh(config), fresh(config, data_type=DataType.FP16)
    with torch.no_grad():
        for value in wide.parameters():
            value.normal_()
    half.load_state_dict(wide.state_dict())
    assert "wider numbers than these, which are rounded" in caplog.text
    for (name, found), given in zip(half.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(found, given.to(found.dtype)), name
    caplog.clear()
    again = fresh(config)
    again.load_state_dict(half.state_dict())
    assert not caplog.text
    for found, given in zip(again.parameters(), half.parameters(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, given.float())
    half.load_state_dict(again.state_dict())  # a state dict that was loaded says what it holds
    with torch.no_grad():
        next(value for name, value in wide.named_parameters() if half.get_parameter(name).dtype != value.dtype)[3] = 7e4
    before = {name: value.clone() for name, value in half.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"values must be in \+-65504 to be stored as torch.float16, got 70000 in row 3"
    ):
        half.load_state_dict(wide.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_a_checkpoint_of_another_size_is_refused_whatever_its_type():
    half = fresh(HashConfig(num_buckets=40), data_type=DataType.FP16)
    with pytest.raises(ValueError, match="table 'item': the checkpoint's sizes must be those of"):
        half.load_state_dict(fresh(HashConfig(num_buckets=41)).state_dict())


def test_a_fitted_table_must_fit():
    half = fresh(HashConfig(num_buckets=40), data_type=DataType.FP16)
    state = half.table_state("item")
    large = {name: torch.full(value.shape, -7e4) for name, value in state.native.items()}
    with pytest.raises(ValueError, match=r"table 'item', 'buckets': values must be in \+-65504 .*, got 70000 in row 0"):
        half.load_table("item", dataclasses.replace(state, native=large))
    assert torch.isfinite(half.table_rows("item", torch.arange(3))).all()


def test_bf16_is_not_expanded_to_another_type():
    small = fresh(PQConfig(num_codes=4, codebook_size=16), data_type=DataType.BF16)
    with pytest.raises(
        ValueError, match=r"decompress: table 'item': data_type must be FP32 or FP16 .*got BF16; TorchRec would"
    ):
        decompress(small)
