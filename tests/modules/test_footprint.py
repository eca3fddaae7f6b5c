import copy

import pytest
import torch

from tests.cases import CONFIGS, IDS, fresh
from tests.modules.batches import KEYS, batch, collection, tables
from torchrec_compress import Footprint, optimizer_bytes
from torchrec_compress.modules import TableFootprint
from torchrec_compress.modules.footprint import why_no_smaller


def test_totals_are_sums_and_codes_are_counted():
    footprint = collection().footprint()
    assert footprint.dense_bytes == sum(table.num_embeddings * table.embedding_dim * 4 for table in tables())
    assert footprint.total_bytes == sum(table.total_bytes for table in footprint.tables.values())
    user = footprint.tables["user"]
    assert user.code_bytes == 400 * 2 + 4  # four codes of 16 codewords in two bytes; the mark
    assert user.decoder_bytes == 16 * 16 * 4 + 20 * (16 + 4)
    assert user.native_bytes == 0
    assert footprint.tables["item"].native_bytes == 30 * 8 * 4
    assert footprint.tables["ctx"].ratio == 1.0


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_all_of_a_state_dict_is_counted_but_its_format_and_layout(config):
    made = fresh(config)
    state = made.state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) == made.footprint().total_bytes + 8 + 24
    assert state["decoder.format_version"].nbytes + state["decoder.layout"].nbytes == 8 + 24


def test_compressed_ratio_leaves_dense_tables_out():
    small = TableFootprint("dense", dense_bytes=100, code_bytes=0, decoder_bytes=0, native_bytes=100)
    big = TableFootprint("pq", dense_bytes=1000, code_bytes=60, decoder_bytes=40, native_bytes=0)
    footprint = Footprint({"small": small, "big": big})
    assert footprint.ratio == 1100 / 200
    assert footprint.compressed_ratio == 10.0
    assert Footprint({"small": small}).compressed_ratio == 1.0


def test_plain_data_and_text_name_every_table():
    footprint = collection().footprint()
    plain, text = footprint.to_dict(), str(footprint)
    assert plain["total_bytes"] == footprint.total_bytes
    assert plain["tables"]["user"]["total_bytes"] == footprint.tables["user"].total_bytes
    assert all(table.name in text for table in tables())
    assert f"{footprint.total_bytes:,}" in text


def test_tables_that_are_all_dense_say_why_nothing_is_smaller():
    small = TableFootprint("dense", dense_bytes=100, code_bytes=0, decoder_bytes=0, native_bytes=100)
    big = TableFootprint("pq", dense_bytes=1000, code_bytes=60, decoder_bytes=40, native_bytes=0)
    dense, mixed = Footprint({"small": small}), Footprint({"small": small, "big": big})
    assert "too small for their method to save bytes" in str(dense) and "all tables are dense" not in str(mixed)
    assert why_no_smaller(dense.to_dict()) == str(dense).splitlines()[-1] and why_no_smaller(mixed.to_dict()) is None
    assert why_no_smaller({"ratio": 1.0}) == "no table is compressed: no compression was asked for"


def test_optimizer_bytes_are_apart():
    compressed = copy.deepcopy(collection())
    before = compressed.footprint()
    optimizer = torch.optim.Adam(compressed.parameters())
    compressed(batch([[3]] * len(KEYS))).values().sum().backward()
    optimizer.step()
    parameters = list(compressed.parameters())
    assert optimizer_bytes(optimizer) == sum(2 * 4 * p.numel() + 4 for p in parameters)
    assert compressed.footprint() == before
