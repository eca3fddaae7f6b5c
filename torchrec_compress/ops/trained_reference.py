"""The plain meaning of `trained_bag` and `update_trained` in PyTorch: what kernels are tested against.

It runs on any device, and serves where there are no kernels: neither C++ ones on a CPU nor CUDA ones on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_compress.ops.pooling import pool_rows, scale_rows
from torchrec_compress.ops.trained import (
    ROW_MOMENT,
    ROW_STATE,
    SHARE,
    SIGNED_SHARE,
    SmallFloat,
    TrainedFormat,
    TrainedStep,
    bits_of,
    decode_trained,
    round_rows,
    too_large,
)

# The splitmix64 finaliser (Steele, Lea, Flood 2014) and a 32-bit one (Wellons, "lowbias32"), as signed integers.
_GOLDEN = -7046029254386353131
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685
_GOLDEN_32, _MIX_3, _MIX_4 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF
# row-wise sums of squares are added in as many lanes, which are then halved: what vectors of any width can do
_LANES = 16
_INFINITY = 0x7F800000


def look_up(
    rows: Tensor, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, format: TrainedFormat, is_mean: bool
) -> Tensor:
    """Return the pooled rows, (B, r) float32; arguments as in `trained_bag`, checked."""
    found = decode_trained(rows.index_select(0, ids), format)
    if offsets is None:
        return found if weights is None else scale_rows(found, weights)
    pooled = pool_rows(found, offsets, weights)
    return pooled * _shares(offsets).unsqueeze(1) if is_mean else pooled


def weight_gradients(
    rows: Tensor, ids: Tensor, offsets: Tensor | None, grads: Tensor, format: TrainedFormat, is_mean: bool
) -> Tensor:
    """Return the gradient of every id's weight, (L,) float32."""
    bags = _bags(offsets, ids)
    found = (decode_trained(rows.index_select(0, ids), format) * grads.index_select(0, bags)).sum(1)
    return found * _shares(offsets)[bags] if is_mean and offsets is not None else found


def update(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grads: Tensor,
    format: TrainedFormat,
    is_mean: bool,
    step: TrainedStep,
    where: str,
) -> None:
    """Update rows and state in place; arguments as in `update_trained`, checked but for the gradients.

    Raises:
        ValueError: a gradient is not finite, or a row or a state larger than the format holds; nothing is written.
    """
    if ids.shape[0] == 0:
        return
    distinct, gradients = _summed(ids, offsets, weights, grads, is_mean)
    _refuse(
        bits_of(gradients).amax(1) >= _INFINITY, distinct + step.first_id, lambda row: wrong_gradient(where, row, step)
    )
    moves = bits_of(gradients).amax(1) > 0  # others, rounded anew, would move all the same
    distinct, gradients = distinct[moves], gradients[moves]
    random = _Random.of(distinct + step.first_id, step)
    updated = _UPDATES[format.optimizer](state.index_select(0, distinct), gradients, format, step, random)
    _refuse(updated.is_wrong, distinct + step.first_id, lambda row: wrong_state(where, row, format, step))
    values = decode_trained(rows.index_select(0, distinct), format) - updated.change
    dither = ((random.numbers(format.width) >> 16) * 2 + 1).float() * 2.0**-17
    new_rows, is_wrong = round_rows(values, dither, format)
    _refuse(is_wrong, distinct + step.first_id, lambda row: wrong_values(where, row, format, step))
    rows.index_copy_(0, distinct, new_rows)
    state.index_copy_(0, distinct, updated.state)


def wrong_gradient(where: str, row: int, step: TrainedStep) -> str:
    """Return what is said of an id whose gradient is not finite."""
    return (
        f"{where}: the gradient of id {row} must be finite at step {step.step}, got NaN or infinity; "
        "nothing has been updated"
    )


def wrong_state(where: str, row: int, format: TrainedFormat, step: TrainedStep) -> str:
    """Return what is said of an id whose optimizer state its bits do not hold."""
    return (
        f"{where}: the optimizer state of id {row} must be at most what {format.state_bits} bits hold at "
        f"step {step.step}, got more; nothing has been updated"
    )


def wrong_values(where: str, row: int, format: TrainedFormat, step: TrainedStep) -> str:
    """Return what is said of an id whose values its bits do not hold."""
    return too_large(where, row, format, f" at step {step.step}")


def _refuse(is_wrong: Tensor, ids: Tensor, message: Callable[[int], str]) -> None:
    if bool(is_wrong.any()):
        raise ValueError(message(int(ids[is_wrong.nonzero()[0, 0]])))


def _shares(offsets: Tensor) -> Tensor:
    """Return one over the ids of every bag, (B,) float32."""
    return 1.0 / (offsets[1:] - offsets[:-1]).clamp(min=1).float()


def _bags(offsets: Tensor | None, ids: Tensor) -> Tensor:
    """Return the bag of every id, (L,) int64."""
    if offsets is None:
        return torch.arange(ids.shape[0], device=ids.device)
    numbers = torch.arange(offsets.shape[0] - 1, device=ids.device)
    return torch.repeat_interleave(numbers, (offsets[1:] - offsets[:-1]).long(), output_size=ids.shape[0])


class Groups(NamedTuple):
    """A batch by its distinct ids, ascending; equal ones are in the order of the batch."""

    ids: Tensor  # (U,) int64
    counts: Tensor  # (U,) int64
    bags: Tensor  # (L,) int64
    factors: Tensor | None  # (L,) float32 of the bags' gradients

    @classmethod
    def of(cls, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, is_mean: bool) -> Groups:
        """Group a batch; arguments as in `trained_bag`."""
        sorted_ids, order = torch.sort(ids.long(), stable=True)
        distinct, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        bags = order if offsets is None else _bags(offsets, ids)[order]
        factors = None if weights is None else weights[order]
        if is_mean and offsets is not None:
            shares = _shares(offsets)[bags]
            factors = shares if factors is None else factors * shares
        return cls(distinct, counts, bags, factors)


def _summed(
    ids: Tensor, offsets: Tensor | None, weights: Tensor | None, grads: Tensor, is_mean: bool
) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, (U,) int64 ascending, and their gradients summed in the order of the batch, (U, r)."""
    groups = Groups.of(ids, offsets, weights, is_mean)
    found = grads.index_select(0, groups.bags)
    found = found if groups.factors is None else found * groups.factors.unsqueeze(1)
    # one addition after another within a segment, on a GPU too
    sums = torch.segment_reduce(found, "sum", lengths=groups.counts, axis=0, initial=0.0, unsafe=True)
    return groups.ids, sums


class _Random(NamedTuple):
    """The dither of rows: 32 bits for every number, and as many for every number of a state."""

    of_numbers: Tensor  # (U, 1) int64, 32 bits
    of_state: Tensor  # the same

    @classmethod
    def of(cls, ids: Tensor, step: TrainedStep) -> _Random:
        """Draw for global ids, (U,) int64."""
        start = torch.zeros((), dtype=torch.int64, device=ids.device)
        rows = _draw(_draw(_draw(start, step.seed), step.step), ids)
        return cls((rows & _WORD).unsqueeze(1), (rows >> 32 & _WORD).unsqueeze(1))

    def numbers(self, width: int) -> Tensor:
        """Return (U, width) int64 of 32 bits for the numbers of a row."""
        return _spread(self.of_numbers, width)

    def states(self, width: int, first: int = 0) -> Tensor:
        """Return (U, width) int64 of 32 bits for the numbers of a state from one on."""
        return _spread(self.of_state, width, first)


def _draw(start: Tensor, number: int | Tensor) -> Tensor:
    """Return 64 well-mixed bits of a start and a number."""
    step = torch.as_tensor(number, dtype=torch.int64, device=start.device) + 1
    x = start + step * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift right, zeros in front."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _spread(start: Tensor, width: int, first: int = 0) -> Tensor:
    numbers = torch.arange(first + 1, first + width + 1, dtype=torch.int64, device=start.device)
    x = (start + numbers * _GOLDEN_32) & _WORD
    x = ((x ^ (x >> 16)) * _MIX_3) & _WORD
    x = ((x ^ (x >> 15)) * _MIX_4) & _WORD
    return x ^ (x >> 16)


class _Updated(NamedTuple):
    """What an optimizer makes of gradients."""

    change: Tensor  # (U, r) float32, to be subtracted from the values
    state: Tensor  # (U, bytes per state) uint8
    is_wrong: Tensor  # (U,) bool: the state is more than its bits hold


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _factor(sums: Tensor, rate: float, step: TrainedStep) -> Tensor:
    # PyTorch's root of float32 is a bit off on some CPUs; that of float64, rounded, is the nearest, as of kernels
    return _scalar(rate) / (sums.double().sqrt().float() + _scalar(step.eps))


def _sgd(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    is_wrong = torch.zeros(grads.shape[0], dtype=torch.bool, device=grads.device)
    return _Updated(_scalar(step.learning_rate) * grads, state, is_wrong)


def _row_wise(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    sums = _read_of_row(state, format, ROW_STATE) + _mean_of_squares(grads)
    new_state, is_wrong = _write_of_row(sums, format, ROW_STATE, random.states(1), 0)
    return _Updated(_factor(sums, step.learning_rate, step) * grads, new_state, is_wrong)


def _each_number(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    sums = _read_of_numbers(state, format) + grads * grads
    new_state, is_wrong = _write_of_numbers(sums, format, random.states(format.width), 0)
    return _Updated(_factor(sums, step.learning_rate, step) * grads, new_state, is_wrong)


def _adam(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    cut, width, is_by_row = format.bytes_of_numbers, format.width, format.optimizer == "partial_rowwise_adam"
    first, second = state[:, :cut].contiguous(), state[:, cut:].contiguous()
    moments = _scalar(step.beta1) * _read_moments(first, format) + _scalar(1 - step.beta1) * grads
    squares = _mean_of_squares(grads) if is_by_row else grads * grads
    before = _read_of_row(second, format, ROW_MOMENT) if is_by_row else _read_of_numbers(second, format)
    sums = _scalar(step.beta2) * before + _scalar(1 - step.beta2) * squares
    rate, correction = step.corrected()
    change = _factor(sums * _scalar(correction), rate, step) * moments
    new_first, is_wrong = _write_moments(moments, format, random.states(width))
    dither = random.states(1 if is_by_row else width, width)
    # a second moment that was rounded to zero below a first one that was not would be a step without bounds
    if is_by_row:
        new_second, is_too_large = _write_of_row(sums, format, ROW_MOMENT, dither, 1)
    else:
        new_second, is_too_large = _write_of_numbers(sums, format, dither, 1)
    return _Updated(change, torch.cat([new_first, new_second], dim=1), is_wrong | is_too_large)


def _mean_of_squares(grads: Tensor) -> Tensor:
    """Return the mean of the squares of every row, (U, 1) float32."""
    squares = grads * grads
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % _LANES))
    lanes = torch.zeros_like(squares[:, :_LANES])
    for first in range(0, squares.shape[1], _LANES):
        lanes = lanes + squares[:, first : first + _LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    # by a tensor: a GPU divides by a number as it multiplies by one over it, rounded twice
    return lanes / torch.full_like(lanes, grads.shape[1])


def _read_of_row(state: Tensor, format: TrainedFormat, small: SmallFloat) -> Tensor:
    """Return the one value of every row, (U, 1) float32."""
    return state.view(torch.float32) if format.state_bits == 32 else small.decode(state)


def _write_of_row(
    sums: Tensor, format: TrainedFormat, small: SmallFloat, random: Tensor, least: int
) -> tuple[Tensor, Tensor]:
    """Return the bytes of one value a row, of a code of at least `least`; and which are too large, (U,) bool."""
    if format.state_bits == 32:
        return sums.view(torch.uint8), bits_of(sums)[:, 0] >= _INFINITY
    codes = small.round_by(random, sums).clamp(min=least)
    return codes.to(torch.uint8), (codes > 255)[:, 0]


def _read_of_numbers(state: Tensor, format: TrainedFormat) -> Tensor:
    """Return a value of every number, (U, r) float32, none negative."""
    is_float = format.state_bits == 32
    return state.view(torch.float32) if is_float else SHARE.decode(state[:, 2:]) * _read_largest(state)


def _write_of_numbers(sums: Tensor, format: TrainedFormat, random: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return the bytes of a value of every number, as `_write_of_row`."""
    if format.state_bits == 32:
        return sums.view(torch.uint8), bits_of(sums).amax(1) >= _INFINITY
    upper, shares = _shares_of_largest(sums)
    return _with_largest(upper, SHARE.round_by(random, shares).clamp(min=least))


def _read_moments(state: Tensor, format: TrainedFormat) -> Tensor:
    """Return a value of every number, (U, r) float32, of either sign."""
    if format.state_bits == 32:
        return state.view(torch.float32)
    codes = state[:, 2:].long()
    sizes = SIGNED_SHARE.decode(codes & 127) * _read_largest(state)
    return torch.where(codes > 127, -sizes, sizes)


def _write_moments(moments: Tensor, format: TrainedFormat, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of a value of every number and either sign, as `_write_of_row`."""
    if format.state_bits == 32:
        return moments.view(torch.uint8), bits_of(moments).amax(1) >= _INFINITY
    upper, shares = _shares_of_largest(moments.abs())
    return _with_largest(upper, SIGNED_SHARE.round_by(random, shares) + 128 * (moments < 0))


def _shares_of_largest(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper half of every row's largest value, rounded up, (U, 1) int64, and shares of it, (U, r)."""
    upper = (bits_of(sizes).amax(1, keepdim=True) + 0xFFFF) >> 16
    scale = (upper << 16).int().view(torch.float32)
    return upper, sizes / torch.where(upper == 0, 1.0, scale)


def _with_largest(upper: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of shares and of their largest value, and of which rows it is none."""
    return torch.cat([upper & 255, upper >> 8, codes], dim=1).to(torch.uint8), upper[:, 0] >= _INFINITY >> 16


def _read_largest(state: Tensor) -> Tensor:
    """Return the largest value of every row, (U, 1) float32: the upper half of a float32 is stored."""
    upper = state[:, 0:1].int() | state[:, 1:2].int() << 8
    return (upper << 16).view(torch.float32)


_UPDATES = {
    "sgd": _sgd,
    "rowwise_adagrad": _row_wise,
    "adagrad": _each_number,
    "adam": _adam,
    "partial_rowwise_adam": _adam,
}
