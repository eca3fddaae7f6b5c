"""Nearest codewords of slices: against brute force, whatever lies beside a row; and the gradient written out."""

import pytest
import torch
from torch import Tensor

from torchrec_compress.ops import quantize_slices, slice_codes
from torchrec_compress.ops.dispatch import cpp_serves


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and not cpp_serves("auto"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", request.param)
    return request.param


def drawn(num_rows: int, num_codes: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, num_codes * width, generator=seeded)
    return rows, torch.randn(num_codes * size, width, generator=seeded)


def half_way(num_rows: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows of one slice, each half-way between two codewords."""
    seeded = torch.Generator().manual_seed(0)
    book = 0.05 * torch.randn(size, width, generator=seeded)
    one, other = torch.randint(size, (2, num_rows), generator=seeded)
    return (book[one] + book[other]) / 2, book


@pytest.mark.parametrize(("num_rows", "num_codes", "size", "width"), [(0, 2, 3, 4), (1, 1, 2, 1), (777, 3, 40, 5)])
def test_codes_are_those_of_brute_force(backend, num_rows, num_codes, size, width):
    rows, books = drawn(num_rows, num_codes, size, width)
    codes = slice_codes(rows, books)
    assert codes.shape == (num_rows, num_codes) and codes.dtype == torch.int64
    for number, (part, book) in enumerate(zip(rows.split(width, 1), books.split(size), strict=True)):
        squares = (part.double()[:, None] - book.double()).square().sum(2)
        assert torch.equal(codes[:, number], squares.argmin(1))


@pytest.mark.parametrize("width", [2, 4, 16, 33])
def test_a_code_does_not_hang_on_the_rows_beside_it(backend, width):
    rows, book = half_way(3000, 256, width)
    whole = slice_codes(rows, book)
    for size in (1, 3, 100):
        assert torch.equal(torch.cat([slice_codes(part, book) for part in rows.split(size)]), whole), size


def test_blocks_of_distances_are_no_seam(backend, monkeypatch):
    rows, books = drawn(500, 2, 30, 4)
    whole = slice_codes(rows, books)
    monkeypatch.setattr("torchrec_compress.ops.slices.BLOCK_FLOATS", 7 * 30)
    assert torch.equal(slice_codes(rows, books), whole)


def test_of_equal_codewords_the_first_is_nearest(backend):
    _, books = drawn(9, 2, 20, 4)
    twice = torch.cat([part for book in books.split(20) for part in (book, book)])
    rows = torch.cat([book for book in books.split(20)], dim=1)
    assert torch.equal(slice_codes(rows, twice), torch.arange(20)[:, None].expand(20, 2))


def test_rows_become_codewords_to_the_bit(backend):
    rows, books = drawn(600, 3, 20, 4)
    codes, found = slice_codes(rows, books), quantize_slices(rows, books)
    expected = torch.cat([book[mine] for book, mine in zip(books.split(20), codes.T, strict=True)], dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(slice_codes(found, books), codes)  # which is all that an export may rely on


def test_gradients_are_those_written_out():
    rows, books = (each.requires_grad_() for each in drawn(50, 2, 6, 3))
    codes, weights = slice_codes(rows, books), torch.randn(50, 6)
    mine = torch.autograd.grad((quantize_slices(rows, books) * weights).sum(), [rows, books])
    of_books = torch.zeros(12, 3, dtype=torch.float64)
    for row in range(50):
        for number in range(2):
            of_books[6 * number + codes[row, number]] += weights[row, 3 * number : 3 * number + 3].double()
    assert torch.equal(mine[0], weights)
    torch.testing.assert_close(mine[1].double(), of_books, rtol=1e-5, atol=1e-5)
    assert len(codes.unique()) == 6 and not mine[1][~of_books.any(1)].any()
    alone = quantize_slices(rows, books.detach())  # frozen codebooks, as frozen rows, get none
    assert torch.equal(torch.autograd.grad((alone * weights).sum(), [rows])[0], mine[0])
    (found,) = torch.autograd.grad((quantize_slices(rows.detach(), books) * weights).sum(), [books])
    assert torch.equal(found, mine[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype):
    rows, books = drawn(20, 2, 6, 3)
    rows, books = rows.requires_grad_(), books.to(dtype).requires_grad_()
    out = quantize_slices(rows, books)
    out.sum().backward()
    assert out.dtype == dtype and rows.grad is not None and books.grad is not None
    assert (rows.grad.dtype, books.grad.dtype) == (torch.float32, dtype)
    assert torch.equal(out, quantize_slices(rows, books.detach()))
