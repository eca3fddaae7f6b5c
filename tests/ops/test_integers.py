"""Checksums of integers: additive over shards, blind to nothing, computed once."""

import copy
import itertools

import pytest
import torch

from torchrec_compress.ops import check_intact, checksum, flag_of, integers, known, mark_of, total_of

SHAPES = [((7, 1), torch.uint8), ((5000, 3), torch.uint8), ((3000, 8), torch.uint8), ((900, 68), torch.uint8)]
SHAPES += [((40_000, 4), torch.int16), ((3, 2), torch.int32), ((70_000, 2), torch.uint8)]
every = pytest.mark.parametrize(("shape", "dtype"), SHAPES)


def random(shape, dtype):
    return torch.randint(0, 200, shape).to(dtype)


@every
@pytest.mark.parametrize("cuts", [[1], [2, 3], [0, 6]])
def test_shards_add_up_to_the_table(shape, dtype, cuts):
    rows = random(shape, dtype)
    bounds = [0, *cuts, shape[0]] if shape[0] > 6 else [0, 1, shape[0]]
    parts = [checksum(rows[a:b], a) for a, b in itertools.pairwise(bounds)]
    assert sum(parts) % 2**64 == checksum(rows)


@every
def test_every_change_shows(shape, dtype):
    rows = random(shape, dtype)
    whole = checksum(rows)
    for _ in range(20):
        other = rows.clone()
        at = int(torch.randint(0, rows.numel(), ()))
        other.view(-1)[at] += 1
        assert checksum(other) != whole
    turned = rows.flip(0)
    assert torch.equal(turned, rows) or checksum(turned) != whole
    assert checksum(torch.zeros_like(rows)) == 0


def test_it_does_not_depend_on_the_layout_in_memory():
    rows = random((500, 8), torch.uint8)
    odd = torch.empty(500 * 8 + 3, dtype=torch.uint8)[3:].view(500, 8).copy_(rows)
    assert checksum(rows.t().contiguous().t()) == checksum(odd) == checksum(rows)
    assert checksum(rows[:0]) == 0


def test_marks_survive_rounded_averages_and_never_read_as_another_state():
    marks = torch.tensor([mark_of(int(total)) for total in torch.randint(0, 2**62, (2000,))])
    assert int(marks.min()) >= 2**19 and int(marks.max()) < 2**20
    assert len(marks.unique()) > 1900
    for decay in (0.1, 0.9, 0.9999):
        blended = (marks.float() * decay + marks.float() * (1 - decay)).round().int()
        assert torch.equal(blended, marks.int())


def test_a_value_is_computed_once_until_something_writes():
    calls, rows = [], random((100, 4), torch.uint8)

    def count(tensor):
        calls.append(1)
        return int(tensor.sum())

    assert known(rows, count) == known(rows, count) == int(rows.sum())
    assert len(calls) == 1
    rows.add_(1)
    assert known(rows, count) == int(rows.sum())
    rows.data.copy_(rows.data // 2)  # torch counts no write
    assert known(rows, count) == int(rows.sum())
    rows.data = random((100, 4), torch.uint8)
    assert known(rows, count) == int(rows.sum())
    assert known(rows.clone(), count) == int(rows.sum())
    assert len(calls) == 5
    with torch.inference_mode():
        assert known(rows + 0, count) == int(rows.sum())  # such tensors have no count


def test_what_is_known_is_forgotten_with_the_tensor():
    before = len(integers._SEEN), len(integers._INTACT)
    rows, flag = random((100, 4), torch.uint8), torch.ones(1, dtype=torch.int32)
    check_intact([rows], flag, "t")
    assert len(integers._SEEN) == before[0] + 2
    del rows, flag
    assert (len(integers._SEEN), len(integers._INTACT)) == before


@pytest.mark.parametrize("is_sampled", [False, True])
def test_only_intact_integers_pass(is_sampled):
    rows, low_bit = random((100, 4), torch.uint8), random((9, 12), torch.uint8)
    flag = torch.ones(1, dtype=torch.int32)  # filled, not summed
    check_intact([rows, low_bit], flag, "t", is_sampled)
    assert int(flag) == mark_of(total_of([rows, low_bit])) == flag_of(flag)
    rows.copy_(rows.clone())  # written, but the same
    check_intact([rows, low_bit], flag, "t", is_sampled)
    other_rows, other_flag = copy.deepcopy(rows), copy.deepcopy(flag)
    check_intact([other_rows, low_bit], other_flag, "t", is_sampled)
    for tensor in (rows, low_bit, flag):
        kept = tensor.clone()
        tensor.view(-1)[0] += 1
        with pytest.raises(ValueError, match="table 't': codes and low-bit rows must be those"):
            check_intact([rows, low_bit], flag, "t", is_sampled)
        tensor.copy_(kept)
        check_intact([rows, low_bit], flag, "t", is_sampled)
    check_intact([rows + 1], torch.zeros(1, dtype=torch.int32), "t")  # never filled: another error's business
