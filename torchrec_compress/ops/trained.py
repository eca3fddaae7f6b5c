"""Rows of few bits that are trained where they lie: their format, and the codes that their bytes stand for.

A row is `width` whole numbers of 8 or 4 bits, two's complement, number 2k of 4 bits in the low half of its byte, and
behind them one byte, the row's scale; the value of a number is number * scale. Scales, and optimizer states of 8 bits,
are small floats: the upper bits of a float32, counted from an exponent on, with 0 for zero. All codes follow from the
bits of float32 alone, and so are the same on every device and in every implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

TrainedOptimizer = Literal["sgd", "rowwise_adagrad", "adagrad", "adam", "partial_rowwise_adam"]
_SIGN = 0x7FFFFFFF  # all bits but the sign
_INFINITY = 0x7F800000
_BLOCK_ROWS = 8192  # rows that are integers of 64 bits at once


@dataclass(frozen=True)
class TrainedFormat:
    """What the bytes of a trained table mean.

    Args:
        width: numbers per row, r; with 4 bits a multiple of 2.
        bits: of a number, 8 or 4.
        optimizer: what trains the rows: "sgd"; "rowwise_adagrad" with one sum of squares per row; "adagrad" with
            one per number; "adam" with two moments per number; "partial_rowwise_adam" with a first moment per number
            and a second per row.
        state_bits: of a sum of squares or a moment, 32 (a float32) or 8 (a small float, rounded stochastically).

    Raises:
        ValueError: no such format.

    Example:
        >>> TrainedFormat(16, 4).row_bytes, TrainedFormat(16, 8, "adagrad", 8).state_bytes
        (9, 18)
    """

    width: int
    bits: Literal[8, 4]
    optimizer: TrainedOptimizer = "rowwise_adagrad"
    state_bits: Literal[32, 8] = 32

    def __post_init__(self) -> None:
        allowed = {"bits": (8, 4), "optimizer": get_args(TrainedOptimizer), "state_bits": (32, 8)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"trained rows: {name} must be one of {', '.join(map(str, values))}, got {getattr(self, name)!r}"
                )
        if self.width < 1:
            raise ValueError(f"trained rows: width must be at least 1, got {self.width}")
        if self.bits == 4 and self.width % 2:
            raise ValueError(
                f"trained rows: width must be a multiple of 2 with 4 bits, got {self.width}; take {self.width + 1}, "
                "or 8 bits"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: its numbers and its scale."""
        return self.width * self.bits // 8 + 1

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's optimizer state."""
        of_row, of_numbers = self.state_bits // 8, self.bytes_of_numbers
        return {
            "sgd": 0,
            "rowwise_adagrad": of_row,
            "adagrad": of_numbers,
            "adam": 2 * of_numbers,
            "partial_rowwise_adam": of_numbers + of_row,
        }[self.optimizer]

    @property
    def bytes_of_numbers(self) -> int:
        """Bytes of one value of state per number of a row; with 8 bits two of them are of their largest."""
        return 4 * self.width if self.state_bits == 32 else self.width + 2

    @property
    def has_moments(self) -> bool:
        """Whether the state begins with a first moment of every number."""
        return self.optimizer in ("adam", "partial_rowwise_adam")

    @property
    def largest(self) -> int:
        """The largest number of a row, 127 or 7; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1


class TrainedStep(NamedTuple):
    """What one update of trained rows needs to know.

    Args:
        learning_rate: finite, at least 0.
        eps: added to the square root of a sum of squares; finite, at least 0.
        seed: of the dither, in [0, 2**63): numbers are rounded by a hash of (seed, global id, step, number).
        step: number of the step, in [0, 2**63): what is rounded twice is rounded anew.
        first_id: the global id of row 0, where the table is a shard.
        beta1: of Adam's first moment, in [0, 1).
        beta2: of its second, in [0, 1).
    """

    learning_rate: float
    eps: float
    seed: int
    step: int
    first_id: int = 0
    beta1: float = 0.9
    beta2: float = 0.999

    def corrected(self) -> tuple[float, float]:
        """Return Adam's learning rate and the factor of its second moment that make up for moments that began at zero.

        Steps of the table are counted, as by FBGEMM, not those of a row.
        """
        number = self.step + 1
        return self.learning_rate / (1 - self.beta1**number), 1 / (1 - self.beta2**number)


class SmallFloat(NamedTuple):
    """A float in a byte: code 0 is 0.0, code c is the float32 of bits (c + base) << shift.

    Args:
        shift: bits of a float32 that are cut off.
        base: the code of 0, which is no float, counted in such codes from a float32's bits 0.

    Example:
        >>> [float(SCALE.decode(torch.tensor(code))) for code in (0, 200, 255)]
        [0.0, 1.0, 120.0]
    """

    shift: int
    base: int

    @property
    def smallest(self) -> float:
        """The smallest float but 0."""
        return float(self.decode(torch.ones((), dtype=torch.int64)))

    @property
    def largest(self) -> float:
        """The largest float."""
        return float(self.decode(torch.full((), 255)))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the floats of codes, of any integer type and shape."""
        wide = codes.long()
        floats = ((wide + self.base) << self.shift).int().view(torch.float32)
        return torch.where(wide == 0, 0.0, floats)

    def round_up(self, values: Tensor) -> Tensor:
        """Return the code of the next float, int64, at least 1; one above 255 where there is none.

        Args:
            values: float32, not negative.
        """
        return (((bits_of(values) + (1 << self.shift) - 1) >> self.shift) - self.base).clamp(min=1)

    def round_by(self, random: Tensor, values: Tensor) -> Tensor:
        """Return the code of one of the two next floats, int64, so that its mean is the value; above 255 as above.

        Args:
            random: 32 bits for each value, int64.
            values: float32, not negative.
        """
        cut = (1 << self.shift) - 1
        wide = ((bits_of(values) + (random & cut)) >> self.shift) - self.base
        narrow = (random >> 8).float() * (self.smallest * 2.0**-24) < values
        return torch.where(values >= self.smallest, wide, narrow.long())


SCALE = SmallFloat(20, (127 - 25) * 8)  # 5 bits of exponent and 3 of mantissa, from 2^-25 to 2^6
ROW_STATE = SmallFloat(21, (127 - 40) * 4)  # 6 and 2 bits, from 2^-40 to 2^23
SHARE = SmallFloat(20, 127 * 8 - 255)  # of a row's largest state: 5 and 3 bits, from 2^-32 to 1
# of a row's largest first moment, beside its sign: 4 and 3 bits, from 2^-16 to 1, as wide as the root of a SHARE
SIGNED_SHARE = SmallFloat(20, 127 * 8 - 127)
ROW_MOMENT = SmallFloat(21, (127 - 52) * 4)  # 6 and 2 bits, from 2^-52, whose root is about eps, to 2^11


def bits_of(values: Tensor) -> Tensor:
    """Return the bits of float32 values without their sign, int64; in the order of their sizes, NaN above all."""
    return values.contiguous().view(torch.int32).long() & _SIGN


def encode_trained(
    values: Tensor, format: TrainedFormat, where: str = "encode_trained", ids: Tensor | None = None
) -> Tensor:
    """Round rows to the nearest that the format holds.

    Args:
        values: (N, r) floating point.
        format: of the rows.
        where: names the table in errors.
        ids: (N,) int64 of the rows, for errors; None: they are counted from 0.

    Returns:
        (N, bytes per row) uint8.

    Raises:
        ValueError: values are of another type or shape, not finite, or larger than a row holds (about 15,000 with 8
            bits, 840 with 4).

    Example:
        >>> form = TrainedFormat(2, 8)
        >>> decode_trained(encode_trained(torch.tensor([[127.0, -5.0]]), form), form).tolist()
        [[127.0, -5.0]]
    """
    if not values.is_floating_point() or values.dim() != 2 or values.shape[1] != format.width:
        raise ValueError(
            f"{where}: values must be floating point of shape (rows, {format.width}), got {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    rows, is_wrong = round_rows(values.float(), torch.full_like(values, 0.5, dtype=torch.float32), format)
    if values.device.type != "meta" and bool(is_wrong.any()):
        first = int(is_wrong.nonzero()[0])
        raise ValueError(too_large(where, first if ids is None else int(ids[first]), format))
    return rows


def too_large(where: str, row: int, format: TrainedFormat, when: str = "") -> str:
    """Return what is said of a row that its format does not hold.

    Args:
        where: names the table.
        row: its id.
        format: of the rows.
        when: " at step 3", or nothing.
    """
    return (
        f"{where}: the values of id {row} must be finite and at most {SCALE.largest * format.largest:g}{when}, got "
        "larger ones or NaN; nothing has been written"
    )


def round_rows(values: Tensor, dither: Tensor, format: TrainedFormat) -> tuple[Tensor, Tensor]:
    """Round rows, each by its own scale, which is its largest value's rounded up.

    Args:
        values: (N, r) float32.
        dither: (N, r) float32 in [0, 1): 0.5 rounds to the nearest.
        format: of the rows.

    Returns:
        (N, bytes per row) uint8; and for every row whether no scale is large enough, (N,) bool.
    """
    largest = bits_of(values).amax(1).int().view(torch.float32)
    # by a tensor: a GPU divides by a number as it multiplies by one over it, rounded twice
    codes = SCALE.round_up(largest / torch.full_like(largest, format.largest))
    inverse = 1.0 / SCALE.decode(codes.clamp(max=255))
    numbers = torch.floor(values * inverse.unsqueeze(1) + dither).clamp(-format.largest, format.largest)
    # what has no scale is not written; its numbers, which may be NaN, need only be numbers
    numbers = numbers.nan_to_num().to(torch.int64) & (2**format.bits - 1)
    if format.bits == 4:
        numbers = numbers[:, ::2] | (numbers[:, 1::2] << 4)
    rows = torch.cat([numbers, codes.clamp(max=255).unsqueeze(1)], dim=1)
    return rows.to(torch.uint8), codes > 255


def decode_trained(rows: Tensor, format: TrainedFormat) -> Tensor:
    """Return the values of rows.

    Args:
        rows: (N, bytes per row) uint8.
        format: of the rows.

    Returns:
        (N, r) float32.

    Raises:
        ValueError: rows are of another type or shape.

    Example:
        >>> decode_trained(torch.tensor([[1, 255, 200]], dtype=torch.uint8), TrainedFormat(2, 8)).tolist()
        [[1.0, -1.0]]
    """
    check_rows("rows", rows, format.row_bytes, "decode_trained")
    return _numbers(rows, format).float() * SCALE.decode(rows[:, -1]).unsqueeze(1)


def are_states(state: Tensor, format: TrainedFormat) -> bool:
    """Return whether these could be states of an optimizer: finite, and no negative square.

    Args:
        state: (N, bytes per state) uint8.
        format: of the rows.

    Example:
        >>> state = torch.tensor([[-1.0, 2.0]]).view(torch.uint8)
        >>> are_states(state, TrainedFormat(2, 8, "adagrad")), are_states(state, TrainedFormat(1, 8, "adam"))
        (False, True)
    """
    return all(_are_states(block, format) for block in state.split(_BLOCK_ROWS))


def _are_states(state: Tensor, format: TrainedFormat) -> bool:
    if format.state_bits == 8:
        # shares are of any bytes, but the upper half of a float32 that they are of is not
        places = [0] * (format.optimizer not in ("sgd", "rowwise_adagrad")) + [format.bytes_of_numbers] * (
            format.optimizer == "adam"
        )
        largest = [state[:, place].int() | state[:, place + 1].int() << 8 for place in places]
        return all(bool((upper < _INFINITY >> 16).all()) for upper in largest)
    if not state.shape[1]:
        return True
    floats = state.view(torch.float32)
    squares = floats[:, format.width :] if format.has_moments else floats
    return bool(torch.isfinite(floats).all()) and not bool((squares < 0).any())


def _numbers(rows: Tensor, format: TrainedFormat) -> Tensor:
    """Return the numbers of rows, (N, r) int32."""
    numbers = rows[:, :-1].to(torch.int32)
    if format.bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)
    half = 2 ** (format.bits - 1)
    return (numbers ^ half) - half


def check_rows(name: str, rows: Tensor, row_bytes: int, where: str) -> None:
    """Raise ValueError unless these are rows of so many bytes.

    Args:
        name: "rows" or "state".
        rows: of any type and shape.
        row_bytes: of a row.
        where: names the table.
    """
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes:
        remedy = "; encode_trained makes them of floats" if rows.is_floating_point() and name == "rows" else ""
        raise ValueError(
            f"{where}: {name} must be uint8 of shape (rows, {row_bytes}), got {rows.dtype} of shape "
            f"{list(rows.shape)}{remedy}"
        )


def are_encoded(rows: Tensor, format: TrainedFormat, where: str = "are_encoded") -> Tensor:
    """Return which of these rows `encode_trained` or an update could have made.

    Scales are rounded up to the next code, so a row's largest number is never much below the largest of its format.

    Args:
        rows: (N, bytes per row) uint8.
        format: of the rows.
        where: names the table in errors.

    Returns:
        (N,) bool.

    Raises:
        ValueError: rows are of another type or shape.

    Example:
        >>> form = TrainedFormat(2, 8)
        >>> are_encoded(torch.tensor([[127, 0, 100], [60, 0, 100]], dtype=torch.uint8), form).tolist()
        [True, False]
    """
    check_rows("rows", rows, format.row_bytes, where)
    return torch.cat([_are_encoded(block, format) for block in rows.split(_BLOCK_ROWS)])


def _are_encoded(rows: Tensor, format: TrainedFormat) -> Tensor:
    largest = _numbers(rows, format).abs().amax(1)
    at_least = int(format.largest * (1 - 2.0**-3))  # a code is up to an eighth above the last
    return (largest <= format.largest) & ((largest >= at_least) | (rows[:, -1] <= 1))
