import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.test_codebook_bags import BACKENDS
from torchrec_compress.ops import check_ids, code_gather, hash_codes, hash_ids, lookup_codes, stable_salt

FLAG = torch.ones(1, dtype=torch.uint8)


def signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def reference_hash(number: int, num_buckets: int, salt: int) -> int:
    """`hash_ids` in Python integers: wrap to 64 bits after each product, shift with the sign."""
    x = signed(number * -7046029254386353131 + (salt + 1) * 0x2545F491)
    x = signed((x ^ (x >> 30)) * -4658895280553007687)
    x = signed((x ^ (x >> 27)) * -7723592293110705685)
    return ((x ^ (x >> 31)) & 0x3FFFFFFFFFFFFFFF) % num_buckets


@given(
    ids=st.lists(st.integers(0, 2**62), max_size=20),
    num_buckets=st.integers(1, 2**40),
    salt=st.integers(0, 2**32 - 1),
)
def test_hash_ids_equals_the_reference(ids, num_buckets, salt):
    got = hash_ids(torch.tensor(ids, dtype=torch.int64), num_buckets, salt)
    assert got.dtype == torch.int64
    assert got.tolist() == [reference_hash(number, num_buckets, salt) for number in ids]


def test_hashes_never_change():
    # checkpoints of hashed tables store no map of ids: a changed hash would serve wrong rows without an error
    assert stable_salt(0, "user") == 4076736380
    assert hash_ids(torch.arange(6), 1000, salt=3).tolist() == [913, 960, 308, 491, 356, 627]
    assert hash_codes(torch.arange(3), 2, 256, salt=5).tolist() == [[246, 13], [232, 95], [21, 157]]


@pytest.mark.parametrize("num_buckets", [1, 3, 64, 1000])
def test_hash_ids_fills_buckets_evenly(num_buckets):
    expected = 200
    found = hash_ids(torch.arange(num_buckets * expected), num_buckets, 7).bincount(minlength=num_buckets).double()
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < num_buckets + 6 * (2 * num_buckets) ** 0.5


def test_hash_is_the_same_for_int32_and_int64():
    ids = torch.randint(0, 2**31 - 1, (1000,))
    assert torch.equal(hash_ids(ids.int(), 97, 1), hash_ids(ids, 97, 1))


def test_codes_of_one_id_are_independent():
    codes = hash_codes(torch.arange(160_000), 3, 10)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = (codes[:, a] * 10 + codes[:, b]).bincount(minlength=100).double()
        assert float(((pairs - 1600) ** 2 / 1600).sum()) < 100 + 6 * 200**0.5


def test_hash_codes_respects_the_first_size():
    codes = hash_codes(torch.arange(5000), 3, 16, first_size=5)
    assert codes.amax(0).tolist() == [4, 15, 15]
    assert codes.amin(0).tolist() == [0, 0, 0]


def test_salts_depend_on_seed_and_name():
    salts = {stable_salt(seed, name) for seed in range(10) for name in ("user", "item", "user2")}
    assert len(salts) == 30


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_check_ids_passes_good_ids(dtype):
    ids = torch.tensor([0, 9, 9], dtype=dtype)
    assert check_ids(ids, 10, "here") is ids
    empty = ids[:0]
    assert check_ids(empty, 10, "here") is empty


@pytest.mark.parametrize(("ids", "wrong"), [([3, -1], -1), ([10, 2], 10), ([2**31 - 1], 2**31 - 1)])
def test_check_ids_names_place_and_id(ids, wrong):
    with pytest.raises(ValueError, match=rf"table 'user': every id must be in \[0, 10\), got {wrong}; map ids"):
        check_ids(torch.tensor(ids), 10, "table 'user'")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("num_ids", [0, 1, 63, 1000])
def test_lookup_codes_gathers(dtype, num_ids):
    table, ids = torch.randint(0, 100, (37, 3)).to(dtype), torch.randint(0, 37, (num_ids,))
    got = lookup_codes(table, FLAG, ids, "here")
    assert got.dtype == dtype
    assert got.tolist() == [table[i].tolist() for i in ids.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_bytes", [None, 6, 7, 16])
def test_code_gather_pads_rows_at_their_end(backend, row_bytes):
    table, ids = torch.randint(0, 100, (37, 3)).to(torch.int16), torch.tensor([5, 0, 36])
    got = code_gather(table, ids, "here", row_bytes, backend)
    assert got.shape == (3, row_bytes or 6) and not got[:, 6:].any()
    assert got[:, :6].contiguous().view(torch.int16).tolist() == [table[i].tolist() for i in ids.tolist()]


def test_lookup_codes_refuses_an_unfilled_table():
    with pytest.raises(RuntimeError, match=r"table 't': the code table must be filled .* reset_parameters\(\)"):
        lookup_codes(torch.zeros(4, 1, dtype=torch.uint8), FLAG * 0, torch.tensor([1]), "table 't'")


def test_lookup_codes_refuses_an_id_out_of_range():
    with pytest.raises(ValueError, match=r"table 't': every id must be in \[0, 4\), got 4"):
        lookup_codes(torch.zeros(4, 1, dtype=torch.uint8), FLAG, torch.tensor([4]), "table 't'")


@pytest.mark.parametrize("num_codes", [1, 2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("kind", ["whole", "slice", "shifted", "columns"])
def test_lookup_codes_copies_the_bits_of_rows_of_any_width(num_codes, dtype, kind):
    info = torch.iinfo(dtype)
    flat = torch.randint(info.min, info.max + 1, (100 * num_codes + 1,), dtype=torch.int64).to(dtype)
    table = {
        "whole": flat[:-1].view(100, num_codes),
        "slice": flat[:-1].view(100, num_codes)[30:],
        "shifted": flat[1:].view(100, num_codes),
        "columns": flat[:-1].view(num_codes, 100).t(),
    }[kind]
    is_set = torch.ones(1, dtype=torch.uint8)
    for ids in (torch.randint(70, (50,)), torch.randint(70, (50,), dtype=torch.int32), torch.empty(0).long()):
        got = lookup_codes(table, is_set, ids, "table 't'")
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert got.tolist() == [table[i].tolist() for i in ids.tolist()]


def test_lookup_codes_keeps_bits_that_are_no_number():
    # as a double these bytes are a signalling NaN, which arithmetic would quieten
    table = torch.tensor([[0] * 16, [1, 0, 0, 0, 0, 0, 0xF0, 0x7F] * 2], dtype=torch.uint8)
    assert torch.equal(lookup_codes(table, FLAG, torch.tensor([1, 0, 1]), "table 't'"), table[[1, 0, 1]])
