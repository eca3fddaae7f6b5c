"""`codebook_bag` checked against float64, one number at a time."""

import math

import torch
from torch import Tensor

from tests.tolerances import assert_near
from torchrec_compress.ops import code_dtype, codebook_bag, hot_row_codes, num_escape_codes, pack_codes


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


def check(
    num_ids,
    lengths,
    num_codes,
    size,
    width,
    structure,
    num_hot,
    weighted,
    dtype,
    index_dtype=torch.int64,
    codes_as=None,
    packed=False,
):
    dim = width * num_codes if structure == "product" else width
    codes = random_codes(num_ids, num_codes, size, num_hot).to(codes_as or code_dtype(size))
    books = torch.randn(num_codes * size, width, dtype=dtype, requires_grad=True)
    hot = torch.randn(num_hot, dim, dtype=dtype, requires_grad=True) if num_hot else None
    weights = torch.randn(num_ids, dtype=dtype, requires_grad=True) if weighted else None
    offsets = None
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    given, num_packed = (pack_codes(codes), num_codes) if packed else (codes, 0)
    out = codebook_bag(given, books, offsets, structure=structure, weights=weights, hot_rows=hot, num_packed=num_packed)
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
