"""What tells the arguments of ranks apart."""

import torch

from torchrec_compress.convert.shards import digest
from torchrec_compress.methods import HashConfig, PQConfig


def test_tensors_of_the_same_bytes_are_told_apart_by_shape_and_type():
    zeros = torch.zeros(6)
    others = [zeros.view(2, 3), zeros.view(3, 2), zeros.int(), zeros[:5], zeros + 1, zeros.bool()]
    assert len({digest(each) for each in [zeros, *others]}) == 1 + len(others)
    assert digest({"a": zeros}) != digest({"a": zeros.int()}) != digest({"b": zeros.int()})
    assert digest(zeros) == digest(zeros.clone()) == digest(torch.zeros(2, 6)[1])


def test_values_are_told_apart_by_all_that_they_hold():
    assert digest(3) != digest(4) and digest({"a": None}) != digest({})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest(PQConfig(num_codes=2)) != digest(PQConfig(num_codes=4)) != digest(HashConfig(num_buckets=4))
