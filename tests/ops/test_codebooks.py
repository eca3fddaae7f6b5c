import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_near
from torchrec_compress.ops import code_dtype, codebook_bag, hot_row_codes, num_escape_codes

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def reference(codes, codebooks, offsets, structure, weights, hot_rows, upstream):
    """Values and gradients of `codebook_bag`, one number at a time, in float64.

    Returns (output, gradient of codebooks, of hot rows, of weights).
    """
    codes = codes.tolist()
    words = codebooks.detach().double()
    hot = None if hot_rows is None else hot_rows.detach().double()
    factors = [1.0] * len(codes) if weights is None else weights.detach().double().tolist()
    bounds = list(range(len(codes) + 1)) if offsets is None else offsets.tolist()
    num_codes = len(codes[0]) if codes else 1
    size = len(words) // num_codes
    width = words.shape[1]
    dim = upstream.shape[1]
    first_size = size if hot is None else size - math.ceil(len(hot) / size ** (num_codes - 1))
    out = torch.zeros(len(bounds) - 1, dim, dtype=torch.float64)
    grad_words, grad_weights = torch.zeros_like(words), torch.zeros(len(codes), dtype=torch.float64)
    grad_hot = None if hot is None else torch.zeros_like(hot)
    for bag in range(len(bounds) - 1):
        up = upstream[bag].double()
        for i in range(bounds[bag], bounds[bag + 1]):
            row = torch.zeros(dim, dtype=torch.float64)
            if codes[i][0] >= first_size:
                number = codes[i][0] - first_size
                for digit in codes[i][1:]:
                    number = number * size + digit
                row = hot[number]
                grad_hot[number] += factors[i] * up
            else:
                for m, code in enumerate(codes[i]):
                    span = slice(m * width, (m + 1) * width) if structure == "product" else slice(None)
                    row[span] += words[m * size + code]
                    grad_words[m * size + code] += factors[i] * up[span]
            out[bag] += factors[i] * row
            grad_weights[i] = torch.dot(row, up)
    return out, grad_words, grad_hot, grad_weights


def random_codes(num_ids: int, num_codes: int, size: int, num_hot: int) -> Tensor:
    codes = torch.randint(0, size, (num_ids, num_codes))
    if num_hot:
        codes[:, 0] %= size - num_escape_codes(num_hot, num_codes, size)
        is_hot = torch.rand(num_ids) < 0.5
        picks = torch.randint(0, num_hot, (num_ids,))
        codes[is_hot] = hot_row_codes(num_hot, num_codes, size)[picks][is_hot]
    return codes


def check(num_ids, lengths, num_codes, size, width, structure, num_hot, weighted, dtype, index_dtype=torch.int64):
    dim = width * num_codes if structure == "product" else width
    codes = random_codes(num_ids, num_codes, size, num_hot).to(code_dtype(size))
    books = torch.randn(num_codes * size, width, dtype=dtype, requires_grad=True)
    hot = torch.randn(num_hot, dim, dtype=dtype, requires_grad=True) if num_hot else None
    weights = torch.randn(num_ids, dtype=dtype, requires_grad=True) if weighted else None
    offsets = None
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    out = codebook_bag(codes, books, offsets, structure=structure, weights=weights, hot_rows=hot)
    assert out.dtype == dtype
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected, grad_books, grad_hot, grad_weights = reference(codes, books, offsets, structure, weights, hot, upstream)
    scale = max(1.0, num_ids / max(1, len(out)))
    assert out.shape == expected.shape
    assert_near(out, expected, scale)
    assert_near(books.grad, grad_books, num_ids + 1)
    if hot is not None:
        assert_near(hot.grad, grad_hot, num_ids + 1)
    if weights is not None:
        assert_near(weights.grad, grad_weights, dim)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_hot", [0, 9])
@pytest.mark.parametrize("structure", ["product", "residual"])
@pytest.mark.parametrize(
    ("num_ids", "lengths"),
    [
        (1, [1]),
        (3, [0, 3, 0]),
        (63, [1] * 60 + [0, 3, 0]),
        (63, None),
        (130, [100, 0, 30]),
        (0, []),
        (0, [0, 0]),
        (0, None),
    ],
)
def test_codebook_bag_equals_the_reference(num_ids, lengths, structure, num_hot, weighted):
    check(num_ids, lengths, 3, 5, 3, structure, num_hot, weighted, torch.float64)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_codebook_bag_in_float32_with_int32_offsets(structure):
    check(200, [7, 0, 93, 100], 4, 256, 5, structure, 300, True, torch.float32, torch.int32)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_codebook_bag_reads_codes_above_255(structure):
    assert code_dtype(1000) == torch.int16
    check(150, [100, 50], 2, 1000, 2, structure, 1500, False, torch.float64)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_one_code_per_row(structure):
    # with one code a hot row takes one escape code
    check(40, [40], 1, 20, 4, structure, 7, True, torch.float64)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_gradients_numerically(structure):
    codes = random_codes(6, 2, 4, 3)
    books = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    hot = torch.randn(3, 4 if structure == "product" else 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 6])
    assert torch.autograd.gradcheck(
        lambda b, h, w: codebook_bag(codes, b, offsets, structure=structure, weights=w, hot_rows=h),
        (books, hot, weights),
    )


@given(
    lengths=st.lists(st.integers(0, 5), min_size=0, max_size=6),
    num_codes=st.integers(1, 4),
    size=st.integers(2, 9),
    width=st.integers(1, 3),
    structure=st.sampled_from(["product", "residual"]),
    num_hot=st.integers(0, 8),
    weighted=st.booleans(),
)
def test_codebook_bag_on_any_jagged_batch(lengths, num_codes, size, width, structure, num_hot, weighted):
    if num_escape_codes(num_hot, num_codes, size) >= size:
        num_hot = 0
    check(sum(lengths), lengths, num_codes, size, width, structure, num_hot, weighted, torch.float64)


def test_a_bag_is_the_sum_of_its_ids_served_alone():
    codes, books = random_codes(10, 3, 6, 0), torch.randn(18, 4, dtype=torch.float64)
    alone = codebook_bag(codes, books, None)
    pooled = codebook_bag(codes, books, torch.tensor([0, 4, 4, 10]))
    assert_near(pooled, torch.stack([alone[:4].sum(0), torch.zeros(12), alone[4:].sum(0)]))


def test_a_code_behind_the_last_codebook_raises():
    with pytest.raises((IndexError, RuntimeError)):
        codebook_bag(torch.tensor([[0, 4]]), torch.zeros(8, 2), None)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (2, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_code_dtype_holds_every_code(size, dtype):
    assert code_dtype(size) == dtype
    assert torch.iinfo(dtype).max >= size - 1


@given(num_hot=st.integers(0, 700), num_codes=st.integers(1, 4), size=st.integers(2, 40))
def test_hot_row_codes_name_every_hot_row_once(num_hot, num_codes, size):
    escapes = num_escape_codes(num_hot, num_codes, size)
    assert (escapes - 1) * size ** (num_codes - 1) < num_hot <= escapes * size ** (num_codes - 1) or num_hot == 0
    if escapes >= size:
        return
    codes = hot_row_codes(num_hot, num_codes, size)
    assert codes.shape == (num_hot, num_codes)
    assert len({tuple(row) for row in codes.tolist()}) == num_hot
    if num_hot:
        assert codes.min() >= 0
        assert codes.max() < size
        assert codes[:, 0].min() == size - escapes
