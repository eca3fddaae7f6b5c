"""Rows of a table pooled where they lie: values and gradients, on every backend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import assert_near
from torchrec_compress.ops import TableRows, pool_table

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS = 20


def check(lengths, dim, weighted, dtype, index_dtype):
    num_ids = sum(lengths)
    weight = torch.randn(ROWS, dim, dtype=dtype, requires_grad=True)
    numbers = torch.randint(0, ROWS, (num_ids,), dtype=index_dtype)
    factors = torch.randn(num_ids, dtype=dtype, requires_grad=True) if weighted else None
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out = pool_table(TableRows(weight, numbers), offsets, factors)
    assert out.shape == (len(lengths), dim)
    assert out.dtype == dtype
    upstream = torch.randn_like(out)
    out.backward(upstream)
    bag_of = [bag for bag, length in enumerate(lengths) for _ in range(length)]
    scale = [1.0] * num_ids if factors is None else factors.tolist()
    expected, of_weight = torch.zeros(len(lengths), dim).double(), torch.zeros(ROWS, dim).double()
    for i, (bag, number) in enumerate(zip(bag_of, numbers.tolist(), strict=True)):
        expected[bag] += scale[i] * weight[number].detach().double()
        of_weight[number] += scale[i] * upstream[bag].double()
        if factors is not None:
            assert_near(factors.grad[i], torch.dot(weight[number].detach().double(), upstream[bag].double()), dim)
    assert_near(out, expected, max(1, num_ids))
    assert_near(weight.grad, of_weight, max(1, num_ids))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [63, 0, 1], [1000]])
def test_pool_table_equals_the_reference(lengths, weighted, index_dtype, backend, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", backend)
    check(lengths, 3, weighted, torch.float32, index_dtype)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    dim=st.integers(1, 5),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pool_table_on_any_jagged_batch(lengths, dim, weighted, dtype):
    check(lengths, dim, weighted, dtype, torch.int64)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrong_offsets_are_errors(backend, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", backend)
    rows = TableRows(torch.randn(ROWS, 4), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="offsets must not decrease"):
        pool_table(rows, torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="must end with the number of ids, 3"):
        pool_table(rows, torch.tensor([0, 2]))
