"""The format of trained rows: its codes against float64, one number at a time, and what is refused."""

import math

import pytest
import torch

from torchrec_compress.ops import TrainedFormat, are_encoded, are_states, decode_trained, encode_trained, trained
from torchrec_compress.ops.trained import ROW_MOMENT, ROW_STATE, SCALE, SHARE

CODES = torch.arange(256)


def test_bytes_of_rows_and_states():
    assert [TrainedFormat(16, bits).row_bytes for bits in (8, 4)] == [17, 9]
    assert TrainedFormat(16, 8, "sgd").state_bytes == 0
    assert [TrainedFormat(16, 8, "rowwise_adagrad", bits).state_bytes for bits in (32, 8)] == [4, 1]
    assert [TrainedFormat(16, 8, "adagrad", bits).state_bytes for bits in (32, 8)] == [64, 18]
    assert [TrainedFormat(16, 8, "adam", bits).state_bytes for bits in (32, 8)] == [128, 36]
    assert [TrainedFormat(16, 8, "partial_rowwise_adam", bits).state_bytes for bits in (32, 8)] == [68, 19]


@pytest.mark.parametrize(
    ("small", "first", "mantissa", "largest"),
    [
        (SCALE, -25, 3, 120.0),
        (ROW_STATE, -40, 2, 1.75 * 2**23),
        (ROW_MOMENT, -52, 2, 1.75 * 2**11),
        (SHARE, -32, 3, 1.0),
    ],
)
def test_codes_are_floats_with_few_bits(small, first, mantissa, largest):
    floats = small.decode(CODES)
    assert floats[0] == 0
    steps = 2**mantissa
    offset = 1 if small is SHARE else 0  # its last code is 1.0, not the end of an octave
    expected = [2.0 ** (first + (c + offset) // steps) * (1 + (c + offset) % steps / steps) for c in range(1, 256)]
    assert floats[1:].tolist() == expected
    assert small.largest == largest and small.smallest == expected[0]


@pytest.mark.parametrize("place", [0, 3, 4, 9])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_wrong_row_is_found_in_any_block(place, state_bits, monkeypatch):
    form = TrainedFormat(4, 8, "adagrad", state_bits)
    rows, state = encode_trained(torch.randn(10, 4), form), torch.zeros(10, form.state_bytes, dtype=torch.uint8)
    monkeypatch.setattr(trained, "_BLOCK_ROWS", 4)
    assert are_encoded(rows, form).all() and are_states(state, form)
    rows[place, :-1], state[place] = 1, 255
    assert are_encoded(rows, form).tolist() == [number != place for number in range(10)]
    assert not are_states(state, form)
    assert len(are_encoded(rows[:0], form)) == 0 and are_states(state[:0], form)


@pytest.mark.parametrize("small", [SCALE, ROW_STATE, SHARE])
def test_rounding_up_finds_the_next_code(small):
    floats = small.decode(CODES[1:])
    assert small.round_up(floats).tolist() == CODES[1:].tolist()
    assert small.round_up(torch.nextafter(floats, torch.tensor(math.inf))).tolist() == (CODES[1:] + 1).tolist()
    assert small.round_up(torch.tensor([0.0, 1e-30])).tolist() == [1, 1]
    assert (small.round_up(torch.tensor([math.inf, math.nan, 1e30])) > 255).all()


@pytest.mark.parametrize("small", [SCALE, ROW_STATE, SHARE])
def test_rounding_by_chance_keeps_the_mean(small):
    spread = torch.randint(2**32, (1, 2**20))
    values = torch.tensor([0.0, 0.3, 0.77]) * small.smallest
    values = torch.cat([values, torch.tensor([1.01, 1.49, 1.9, 3.3]) * small.smallest * 2**20])
    rounded = small.decode(small.round_by(spread.expand(len(values), -1), values.unsqueeze(1)))
    torch.testing.assert_close(rounded.double().mean(1), values.double(), rtol=7e-3, atol=0)
    assert (small.round_by(spread, torch.tensor([[math.inf]])) > 255).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_rounded_to_the_nearest(bits):
    form = TrainedFormat(6, bits)
    values = torch.randn(500, 6) * torch.logspace(-9, 2, 500).unsqueeze(1)
    values[7] = 0
    rows = encode_trained(values, form)
    assert rows.dtype == torch.uint8 and rows.shape == (500, form.row_bytes)
    scales = SCALE.decode(rows[:, -1])
    # the scale is the smallest that holds the row, and a number is its nearest multiple
    needed = values.abs().amax(1) / form.largest
    assert (scales >= needed).all()
    assert ((scales <= needed * 1.125) | (scales == SCALE.smallest)).all()
    error = (decode_trained(rows, form) - values).abs()
    assert (error <= 0.501 * scales.unsqueeze(1)).all()
    assert torch.equal(decode_trained(rows[7:8], form), torch.zeros(1, 6))


@pytest.mark.parametrize("bits", [8, 4])
def test_encoding_inverts_decoding(bits):
    form = TrainedFormat(8, bits)
    values = decode_trained(encode_trained(torch.randn(100, 8), form), form)
    values[:, 0] = form.largest * SCALE.decode(torch.randint(1, 256, (100,)))
    values[:, 1:] = 0
    assert torch.equal(decode_trained(encode_trained(values, form), form), values)


def test_halves_of_a_byte():
    rows = torch.tensor([[0x9F, 0x70, 200]], dtype=torch.uint8)  # a scale of 1
    assert decode_trained(rows, TrainedFormat(4, 4)).tolist() == [[-1.0, -7.0, 0.0, 7.0]]
    assert encode_trained(torch.tensor([[-1.0, -7.0, 0.0, 7.0]]), TrainedFormat(4, 4)).tolist() == rows.tolist()


def test_no_rows_and_other_types():
    form = TrainedFormat(4, 8)
    assert encode_trained(torch.zeros(0, 4), form).shape == (0, 5)
    assert decode_trained(torch.zeros(0, 5, dtype=torch.uint8), form).shape == (0, 4)
    values = torch.randn(3, 4)
    assert torch.equal(encode_trained(values.double(), form), encode_trained(values, form))
    assert torch.equal(encode_trained(values.t().contiguous().t(), form), encode_trained(values, form))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 15_300.0, -15_300.0])
def test_values_that_no_row_holds(wrong):
    values = torch.zeros(3, 4)
    values[1, 2] = wrong
    with pytest.raises(ValueError, match=r"table 'u': the values of id 1 must be finite and at most 15240"):
        encode_trained(values, TrainedFormat(4, 8), "table 'u'")
    values[1, 2] = 15_240.0
    encode_trained(values, TrainedFormat(4, 8))


def test_formats_that_are_none():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        TrainedFormat(0, 8)
    with pytest.raises(ValueError, match="width must be a multiple of 2 with 4 bits, got 7; take 8, or 8 bits"):
        TrainedFormat(7, 4)
    with pytest.raises(ValueError, match="bits must be one of 8, 4, got 2"):
        TrainedFormat(8, 2)
    with pytest.raises(ValueError, match=r"optimizer must be one of sgd, .*, partial_rowwise_adam, got 'lamb'"):
        TrainedFormat(8, 8, "lamb")
    with pytest.raises(ValueError, match="state_bits must be one of 32, 8, got 16"):
        TrainedFormat(8, 8, "adagrad", 16)


def test_tensors_that_are_none():
    form = TrainedFormat(4, 8)
    with pytest.raises(
        ValueError, match=r"rows must be uint8 of shape \(rows, 5\), got torch.float32 of shape \[2, 4\]"
    ):
        decode_trained(torch.zeros(2, 4), form)
    with pytest.raises(ValueError, match=r"values must be floating point of shape \(rows, 4\), got torch.int64"):
        encode_trained(torch.zeros(2, 4, dtype=torch.int64), form)
    with pytest.raises(ValueError, match=r"of shape \(rows, 4\), got torch.float32 of shape \[2, 5\]"):
        encode_trained(torch.zeros(2, 5), form)
