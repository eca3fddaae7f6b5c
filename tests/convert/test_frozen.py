"""Frozen tables stay frozen however they are stored, also where nothing that is stored says so."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.cases import CONFIGS, IDS, contexts, counts
from tests.convert.test_models import D, N, pooled
from torchrec_compress import compress, decompress, dequantize_codebooks, quantize_codebooks
from torchrec_compress.methods import DenseConfig, HashConfig, Int4Config, Int8Config, PQConfig

PQ = PQConfig(num_codes=2, codebook_size=16)


def half_frozen():
    """Return tables of which "user" is frozen."""
    source = pooled("user", "item")
    source.embedding_bags["user"].weight.requires_grad_(False)
    return source


def trained(dense):
    return [dense.embedding_bags[name].weight.requires_grad for name in ("user", "item")]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_there_and_back(config):
    plain = nn.Embedding(N, D)
    plain.weight.requires_grad_(False)
    given = {name: counts() for name in ("user", "item", "0")}
    seen = {name: contexts() for name in ("user", "item", "0")}
    back = decompress(compress(nn.Sequential(plain, half_frozen()), config, counts=given, contexts=seen))
    assert not back[0].weight.requires_grad and trained(back[1]) == [False, True]


@pytest.mark.parametrize(
    "config", [Int8Config(), Int4Config(), PQConfig(num_codes=2, codebook_size=16, width=8)], ids=str
)
def test_stored_again_and_copied(config):
    small = compress(half_frozen(), config)
    for each in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        again = compress(each, HashConfig(num_buckets=40))
        free = {name: one.requires_grad for name, one in again.named_parameters()}
        assert len(free) == 2 and all(is_free == ("user" not in name) for name, is_free in free.items()), free
        assert trained(decompress(compress(again, Int8Config()))) == [False, True]
        assert trained(decompress(compress(each, DenseConfig()))) == [False, True]


def test_what_can_be_trained_tells_itself():
    small = compress(half_frozen(), PQ)
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    assert trained(decompress(small)) == [True, True]


def test_codebooks_in_few_bits():
    small = compress(half_frozen(), PQConfig(num_codes=2, codebook_size=16, codebook_dtype="int8"))
    assert not [*small.parameters()] and trained(decompress(small)) == [False, True]
    floats = dequantize_codebooks(small)  # to be trained
    assert all(each.requires_grad for each in floats.parameters()) and trained(decompress(floats)) == [True, True]
    floats.decoder.banks["item"].codebooks.requires_grad_(False)
    assert trained(decompress(quantize_codebooks(floats, small.methods()))) == [True, False]


def test_a_table_is_frozen_where_nothing_of_it_is_trained():
    """Of two tensors of one table one may be frozen, as hot rows; the table is not."""
    config = PQConfig(num_codes=2, codebook_size=16, num_hot_rows=9, hot_dtype="fp32", popularity="count")
    small = compress(pooled("user"), config, counts={"user": counts()})
    first, second = small.parameters()
    first.requires_grad_(False)
    assert all(each.requires_grad for each in compress(small, PQ).parameters())
    second.requires_grad_(False)
    assert not any(each.requires_grad for each in compress(small, PQ).parameters())


def test_a_state_dict_says_nothing_of_it():
    """As PyTorch's does not: what loads it is trained as it was before."""
    small, other = compress(half_frozen(), Int8Config()), compress(pooled("user", "item"), Int8Config())
    other.load_state_dict(small.state_dict())
    assert trained(decompress(other)) == [True, True]
    torch.testing.assert_close(decompress(other).state_dict(), decompress(small).state_dict())
