import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.bags import check, random_codes
from tests.ops.test_codebook_bags import BACKENDS
from tests.tolerances import assert_near
from torchrec_compress.ops import (
    code_dtype,
    codebook_bag,
    hot_row_codes,
    num_escape_codes,
    pack_codes,
    packed_width,
    unpack_codes,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [0, 9, 3], [-1, 3], [1, 3], [0, 2], [0, 4], [0], []])
def test_offsets_that_do_not_fit_raise_in_the_reference_too(offsets):
    with pytest.raises(ValueError, match="codebook_bag: offsets must"):
        codebook_bag(torch.zeros(3, 2).long(), torch.zeros(8, 4), torch.tensor(offsets, dtype=torch.int64))


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


@given(num_rows=st.integers(0, 5), num_codes=st.integers(1, 9), size=st.integers(1, 16))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_packed_codes_come_back(num_rows, num_codes, size, dtype):
    codes = torch.randint(0, size, (num_rows, num_codes)).to(dtype)
    before = codes.clone()
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, packed_width(num_codes))
    assert torch.equal(unpack_codes(packed, num_codes), codes.to(torch.uint8))
    assert torch.equal(codes, before)


def test_codes_lie_in_their_byte_as_the_kernels_read_them():
    assert pack_codes(torch.tensor([[1, 2, 15, 0, 7]])).tolist() == [[0x21, 0x0F, 0x07]]


@pytest.mark.parametrize("wrong", [-1, 16, 257])
def test_codes_that_half_a_byte_does_not_hold_are_errors(wrong):
    with pytest.raises(ValueError, match=r"every code must be in \[0, 16\), got"):
        pack_codes(torch.tensor([[1, 2, wrong]]))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_codes", "size"), [(300, 16), (200, 256), (1100, 2)])
def test_hot_rows_are_reached_behind_any_number_of_codes(num_codes, size, backend):
    """K**(M-1) is beyond what a float holds: an escape code less, and no code would lead to the hot rows."""
    codes = hot_row_codes(5, num_codes, size)
    assert codes.max() < size and num_escape_codes(5, num_codes, size) == 1
    hot = torch.randn(5, num_codes)
    got = codebook_bag(codes.to(torch.uint8), torch.randn(num_codes * size, 1), None, hot_rows=hot, backend=backend)
    assert torch.equal(got, hot)
