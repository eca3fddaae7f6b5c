"""Whole tensors and blocks of rows into modules that are sharded, or are not."""

import pytest
import torch
from torch import nn

from torchrec_compress.sharding.loading import copy_rows, load_plain


def test_whole_tensors_must_fit():
    model = nn.Linear(3, 2)
    load_plain(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"'weight' must have shape \(2, 3\), got \(1, 3\)"):
        load_plain(model, {"weight": torch.ones(1, 3), "bias": torch.zeros(2)})
    half = nn.Linear(3, 2).half()
    with pytest.raises(ValueError, match=r"weight: values must be in \+-65504 .*, got 70000 in row 0; give the table"):
        load_plain(half, {"weight": torch.full((2, 3), 7e4), "bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"bias: values must be finite, got NaN or infinity in row 1"):
        load_plain(model, {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, torch.inf])})
    with pytest.raises(ValueError, match=r"names must fit, got \['bias', 'weight'\]"):
        load_plain(model, {})


@pytest.mark.parametrize("first", [0, 2, 3])
def test_blocks_of_rows_go_where_they_belong(first):
    whole = torch.zeros(5, 3)
    rows = torch.arange(1.0, 7.0).view(2, 3)
    copy_rows(first, rows, whole)
    wanted = torch.zeros(5, 3)
    wanted[first : first + 2] = rows
    assert torch.equal(whole, wanted)
