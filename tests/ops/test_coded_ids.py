"""The index of ids with codes of their own, against plain counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_compress.ops import coded_ids, coded_ids_bytes, coded_ids_shape, coded_rows, index_coded_ids


def counted(is_coded: torch.Tensor) -> torch.Tensor:
    """Return the row of every id, by plain counting."""
    return torch.where(is_coded, is_coded.long().cumsum(0), 0)


@pytest.fixture(params=["auto", "torch"], autouse=True, scope="module")
def backend(request):
    """Run all with the C++ kernel and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_COMPRESS_BACKEND", request.param)
        yield request.param


@given(st.lists(st.booleans(), min_size=1, max_size=700))
def test_rows_are_counted(flags):
    is_coded = torch.tensor(flags)
    index = index_coded_ids(is_coded)
    ids = torch.arange(len(flags))
    assert torch.equal(coded_rows(index, ids), counted(is_coded))
    assert (index.shape, index.nbytes) == (coded_ids_shape(len(flags)), coded_ids_bytes(len(flags)))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_many_ids_in_any_order(share, dtype):
    generator = torch.Generator().manual_seed(0)
    is_coded = torch.rand(100_003, generator=generator) < share
    ids = torch.randint(0, len(is_coded), (5000,), generator=generator)
    found = coded_rows(index_coded_ids(is_coded), ids.to(dtype))
    assert found.dtype == torch.int64 and torch.equal(found, counted(is_coded)[ids])


@pytest.mark.parametrize("num_ids", [1, 255, 256, 257, 1000])
def test_an_index_that_is_made_in_parts_is_the_whole(num_ids, monkeypatch):
    is_coded = torch.rand(num_ids, generator=torch.Generator().manual_seed(2)) < 0.4
    whole = index_coded_ids(is_coded)
    monkeypatch.setattr(coded_ids, "_AT_ONCE", 2)
    assert torch.equal(index_coded_ids(is_coded), whole)


def test_no_ids_have_no_rows():
    assert coded_rows(index_coded_ids(torch.ones(3, dtype=torch.bool)), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_a_bit_and_a_quarter_an_id():
    assert coded_ids_bytes(1_280_000) * 8 == 1.25 * 1_280_000


@pytest.mark.parametrize("wrong", [-1, 128, 2**40])
def test_ids_beyond_the_index_are_refused(wrong):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        coded_rows(index_coded_ids(torch.ones(100, dtype=torch.bool)), torch.tensor([3, wrong]))


def test_it_compiles():
    is_coded = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.3
    compiled = torch.compile(coded_rows, backend="aot_eager", fullgraph=True, dynamic=True)
    index = index_coded_ids(is_coded)
    for ids in (torch.arange(7), torch.arange(1000)):
        assert torch.equal(compiled(index, ids), counted(is_coded)[ids])
