"""Perplexity of codes, worked out by hand."""

import math

import pytest
import torch

from tests.cases import NUM_ROWS, counts, fitted, fresh
from torchrec_compress.methods import HashConfig, PQConfig, RandomCodesConfig
from torchrec_compress.ops import pack_codes
from torchrec_compress.train.evaluate.usage import code_usage


@pytest.mark.parametrize("codebook_size", [16, 17])  # packed, and not
def test_usage_is_the_perplexity_of_codes_over_rows_and_over_look_ups(codebook_size):
    collection = fresh(RandomCodesConfig(num_codes=2, codebook_size=codebook_size))
    codes = torch.stack([torch.arange(NUM_ROWS) % 4, torch.zeros(NUM_ROWS, dtype=torch.int64)], dim=1)
    codes[-3:] = 0  # 403 rows: a hundred of each of four codewords, and three more
    bank = collection.code_tables.banks["item"]
    bank.codes.copy_(pack_codes(codes) if codebook_size == 16 else codes)
    counts = torch.zeros(NUM_ROWS, dtype=torch.int64)
    counts[1:3] = torch.tensor([30, 10])  # rows of codewords 1 and 2
    shares = torch.tensor([103, 100, 100, 100]) / 403
    found = code_usage(collection, {"item": counts})["item"]
    assert found["by_rows"] == pytest.approx((float(torch.special.entr(shares).sum().exp()) + 1) / 2)
    by_lookups = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found["by_lookups"] == pytest.approx((by_lookups + 1) / 2)
    assert found["codebook_size"] == codebook_size
    assert code_usage(fresh(HashConfig(num_buckets=20)), {"item": counts}) == {}


@pytest.mark.parametrize("num_coded", [None, 90])
def test_look_ups_count_where_their_codes_are(num_coded):
    config = PQConfig(num_codes=2, codebook_size=32, popularity="count", num_coded=num_coded)
    collection = fitted(config)
    bank = collection.code_tables.banks["item"]
    codes = bank.codes[bank.row_numbers(torch.arange(NUM_ROWS))].long()  # of every id
    expected = []
    for column in codes.T:
        share = torch.zeros(32, dtype=torch.float64).index_add_(0, column, counts().double()) / counts().sum()
        expected.append(float(torch.special.entr(share).sum().exp()))
    found = code_usage(collection, {"item": counts()})["item"]
    assert found["by_lookups"] == pytest.approx(sum(expected) / 2)
    assert found["codebook_size"] == 32
