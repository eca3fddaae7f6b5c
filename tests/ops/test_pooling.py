import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import assert_near
from torchrec_compress.ops import check_weights, pool_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(lengths, dim, weighted, dtype, index_dtype):
    num_ids = sum(lengths)
    rows = torch.randn(num_ids, dim, dtype=dtype, requires_grad=True)
    weights = torch.randn(num_ids, dtype=dtype, requires_grad=True) if weighted else None
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    out = pool_rows(rows, offsets, weights)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert out.shape == (len(lengths), dim)
    expected = torch.zeros(len(lengths), dim, dtype=torch.float64)
    bag_of = [bag for bag, length in enumerate(lengths) for _ in range(length)]
    factors = [1.0] * num_ids if weights is None else weights.tolist()
    for i, bag in enumerate(bag_of):
        expected[bag] += factors[i] * rows[i].detach().double()
        assert_near(rows.grad[i], factors[i] * upstream[bag].double())
        if weights is not None:
            assert_near(weights.grad[i], torch.dot(rows[i].detach().double(), upstream[bag].double()), dim)
    assert_near(out, expected, max(1, num_ids))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [63, 0, 1], [1000]])
def test_pool_rows_equals_the_reference(lengths, weighted, index_dtype):
    check(lengths, 3, weighted, torch.float32, index_dtype)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    dim=st.integers(1, 5),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pool_rows_on_any_jagged_batch(lengths, dim, weighted, dtype):
    check(lengths, dim, weighted, dtype, torch.int64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_weights_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="feature 'u': weights must be finite, got NaN or infinity; clean"):
        check_weights(torch.tensor([1.0, bad]), "feature 'u'")


def test_check_weights_passes_good_weights():
    weights = torch.tensor([0.0, -3.0])
    assert check_weights(weights, "here") is weights
    assert check_weights(weights[:0], "here").numel() == 0
