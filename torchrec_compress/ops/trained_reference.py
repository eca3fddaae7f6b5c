"""The plain meaning of `trained_bag` and `update_trained` in PyTorch: what kernels are tested against.

It runs on any device; without the C++ kernels, and on a GPU, it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_compress.ops.pooling import pool_rows, scale_rows
from torchrec_compress.ops.trained import (
    ROW_STATE,
    SHARE,
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
        bits_of(gradients).amax(1) >= _INFINITY,
        distinct + step.first_id,
        lambda row: (
            f"{where}: the gradient of id {row} must be finite at step {step.step}, got NaN or infinity; "
            "nothing has been updated"
        ),
    )
    moves = bits_of(gradients).amax(1) > 0  # others, rounded anew, would move all the same
    distinct, gradients = distinct[moves], gradients[moves]
    random = _Random.of(distinct + step.first_id, step)
    updated = _UPDATES[format.optimizer](state.index_select(0, distinct), gradients, format, step, random)
    _refuse(
        updated.is_wrong,
        distinct + step.first_id,
        lambda row: (
            f"{where}: the optimizer state of id {row} must be at most what {format.state_bits} bits hold at "
            f"step {step.step}, got more; nothing has been updated"
        ),
    )
    values = decode_trained(rows.index_select(0, distinct), format) - updated.change
    dither = ((random.numbers(format.width) >> 16) * 2 + 1).float() * 2.0**-17
    new_rows, is_wrong = round_rows(values, dither, format)
    _refuse(is_wrong, distinct + step.first_id, lambda row: too_large(where, row, format, f" at step {step.step}"))
    rows.index_copy_(0, distinct, new_rows)
    state.index_copy_(0, distinct, updated.state)


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


def _summed(
    ids: Tensor, offsets: Tensor | None, weights: Tensor | None, grads: Tensor, is_mean: bool
) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, (U,) int64 ascending, and their gradients summed in the order of the batch, (U, r)."""
    sorted_ids, order = torch.sort(ids.long(), stable=True)
    distinct, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    bags = _bags(offsets, ids)[order]
    factors = None if weights is None else weights[order]
    if is_mean and offsets is not None:
        shares = _shares(offsets)[bags]
        factors = shares if factors is None else factors * shares
    found = grads.index_select(0, bags)
    found = found if factors is None else found * factors.unsqueeze(1)
    # one addition after another within a segment, on a GPU too
    return distinct, torch.segment_reduce(found, "sum", lengths=counts, axis=0, initial=0.0, unsafe=True)


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

    def states(self, width: int) -> Tensor:
        """Return (U, width) int64 of 32 bits for the numbers of a state."""
        return _spread(self.of_state, width)


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


def _spread(start: Tensor, width: int) -> Tensor:
    numbers = torch.arange(1, width + 1, dtype=torch.int64, device=start.device)
    x = (start + numbers * _GOLDEN_32) & _WORD
    x = ((x ^ (x >> 16)) * _MIX_3) & _WORD
    x = ((x ^ (x >> 15)) * _MIX_4) & _WORD
    return x ^ (x >> 16)


class _Updated(NamedTuple):
    """What an optimizer makes of gradients."""

    change: Tensor  # (U, r) float32, to be subtracted from the values
    state: Tensor  # (U, bytes per state) uint8
    is_wrong: Tensor  # (U,) bool: the state is more than its bits hold


def _rate(step: TrainedStep) -> Tensor:
    return torch.tensor(step.learning_rate, dtype=torch.float32)


def _factor(sums: Tensor, step: TrainedStep) -> Tensor:
    return _rate(step) / (sums.sqrt() + torch.tensor(step.eps, dtype=torch.float32))


def _sgd(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    return _Updated(_rate(step) * grads, state, torch.zeros(grads.shape[0], dtype=torch.bool, device=grads.device))


def _row_wise(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    before = state.view(torch.float32) if format.state_bits == 32 else ROW_STATE.decode(state)
    squares = _sum_of_squares(grads)
    sums = before + (squares / torch.full_like(squares, format.width)).unsqueeze(1)
    change = _factor(sums, step) * grads
    if format.state_bits == 32:
        return _Updated(change, sums.view(torch.uint8), bits_of(sums)[:, 0] >= _INFINITY)
    codes = ROW_STATE.round_by(random.states(1), sums)
    return _Updated(change, codes.to(torch.uint8), (codes > 255)[:, 0])


def _sum_of_squares(grads: Tensor) -> Tensor:
    squares = grads * grads
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % _LANES))
    lanes = torch.zeros_like(squares[:, :_LANES])
    for first in range(0, squares.shape[1], _LANES):
        lanes = lanes + squares[:, first : first + _LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _each_number(state: Tensor, grads: Tensor, format: TrainedFormat, step: TrainedStep, random: _Random) -> _Updated:
    is_float = format.state_bits == 32
    before = state.view(torch.float32) if is_float else SHARE.decode(state[:, 2:]) * _read_largest(state)
    sums = before + grads * grads
    change = _factor(sums, step) * grads
    largest = bits_of(sums).amax(1, keepdim=True)
    if is_float:
        return _Updated(change, sums.view(torch.uint8), largest[:, 0] >= _INFINITY)
    upper = (largest + 0xFFFF) >> 16
    scale = (upper << 16).int().view(torch.float32)
    codes = SHARE.round_by(random.states(format.width), sums / torch.where(upper == 0, 1.0, scale))
    new_state = torch.cat([upper & 255, upper >> 8, codes], dim=1).to(torch.uint8)
    return _Updated(change, new_state, upper[:, 0] >= _INFINITY >> 16)


def _read_largest(state: Tensor) -> Tensor:
    """Return the largest sum of every row, (U, 1) float32: the upper half of a float32 is stored."""
    upper = state[:, 0:1].int() | state[:, 1:2].int() << 8
    return (upper << 16).view(torch.float32)


_UPDATES = {"sgd": _sgd, "rowwise_adagrad": _row_wise, "adagrad": _each_number}
