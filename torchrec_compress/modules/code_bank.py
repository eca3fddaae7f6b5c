"""The integers of one code table, and how they stay what a fit or a checkpoint made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_compress.methods.storage import CodePart
from torchrec_compress.ops import (
    NOT_FILLED,
    can_check,
    check_intact,
    coded_rows,
    flag_of,
    keep_integers,
    mark_of,
    total_of,
)

_BLOCK_ROWS = 65536  # rows whose start codes are int64 at once


@dataclass(frozen=True)
class CodeTableConfig:
    """One code table.

    Args:
        name: of the user's table.
        num_ids: ids that look it up are in [0, num_ids).
        part: width, dtype and start codes.
        feature_names: features that look it up.
        output_names: the key of each feature's codes in the output.
    """

    name: str
    num_ids: int
    part: CodePart
    feature_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.part.num_rows(self.num_ids)


class CodeRows(nn.Module):
    """The codes of one table, all of them or those of a rank.

    Attributes:
        codes: buffer, (rows, row_size) integer.
        is_set: buffer, (1,) int32; zero until start codes, a fit or a checkpoint has filled the table, then the mark of
            the whole table's codes and low-bit hot rows (`ops.mark_of`), or 1 where a checkpoint of an earlier version
            has none.
        start_flag: what `is_set` holds while nothing but start codes has filled the table, else None.
    """

    def __init__(self, name: str, codes: Tensor, is_set: Tensor) -> None:
        super().__init__()
        self._name = name
        self.decoders: tuple[nn.Module, ...] = ()  # in a tuple, as they are no part of this module
        self.register_buffer("codes", codes)
        self.register_buffer("is_set", is_set)
        self.codes: Tensor
        self.is_set: Tensor
        self.start_flag: int | None = None

    @property
    def is_start(self) -> bool:
        """Whether nothing but start codes has filled the table."""
        return self.start_flag is not None and can_check(self.is_set) and flag_of(self.is_set) == self.start_flag

    def stand_beside(self, *decoders: nn.Module) -> None:
        """Name the decoders whose integers, low-bit rows and the like, the mark covers as well."""
        self.decoders = decoders

    def low_bit_rows(self) -> list[Tensor]:
        """Return the low-bit rows, and other integers of decoders, that the mark covers as well."""
        buffers = [buffer for decoder in self.decoders for buffer in decoder._buffers.values()]
        return [buffer for buffer in buffers if buffer is not None and not buffer.dtype.is_floating_point]

    def row_numbers(self, ids: Tensor) -> Tensor:
        """Return the rows that ids have: (L,) integer -> (L,) integer; of the whole table, sharded too."""
        for decoder in self.decoders:
            index = decoder._buffers.get("coded_ids")
            if index is not None:
                return coded_rows(index, ids)
        return ids

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeRows:
        return super()._apply(keep_integers(fn, f"table {self._name!r}"), recurse)  # type: ignore[return-value]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "codes" in state_dict:
            self.start_flag = None
        self.is_set = self.is_set.to(torch.int32)  # assigned as it is by load_state_dict(assign=True)


def fill_with_start(part: CodePart, codes: Tensor, first_row: int) -> bool:
    """Write start codes over rows of a code table, (n, row_size), the first of which is `first_row`, block by block.

    Returns:
        Whether there are any; where a fit alone fills the table, nothing is written.
    """
    if part.start is None:
        return False
    for first in range(0, len(codes), _BLOCK_ROWS):
        block, number = codes[first : first + _BLOCK_ROWS], first_row + first
        block.copy_(part.start(torch.arange(number, number + len(block), device=codes.device)))
    return True


class CodeBank(CodeRows):
    """One whole code table; the attributes are those of `CodeRows`."""

    def __init__(self, config: CodeTableConfig, device: torch.device | None) -> None:
        part = config.part
        shape = (config.num_rows, part.row_size)
        codes = torch.zeros(shape, dtype=part.dtype, device=device)
        super().__init__(config.name, codes, torch.zeros(1, dtype=torch.int32, device=device))
        self.config = config
        self.awaits_reset = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table with its start codes, where the method has any."""
        codes, is_set = self._buffers["codes"], self._buffers["is_set"]  # past the attributes that fx records
        assert codes is not None and is_set is not None
        if codes.is_meta or not fill_with_start(self.config.part, codes, 0):
            return
        self.awaits_reset = False
        self.seal()
        self.start_flag = flag_of(is_set)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeBank:
        was_meta = self.codes.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.codes.is_meta:
            self.is_set.zero_()  # to_empty() leaves garbage, which might read as "filled"
            self.awaits_reset = True  # and leaves it in the codebooks too, so that start codes alone would not do
        return self

    @torch.no_grad()
    def load(self, codes: Tensor) -> None:
        """Replace the codes: (N, row_size) integer, values as the method made them.

        Raises:
            ValueError: the codes have another shape, are floating-point numbers, or are too large for the table.
        """
        if codes.shape != self.codes.shape or codes.dtype.is_floating_point:
            raise ValueError(
                f"table {self._name!r}: codes must have shape {tuple(self.codes.shape)} and be integers, "
                f"got {tuple(codes.shape)} of {codes.dtype}"
            )
        kept = torch.iinfo(self.codes.dtype)
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if low < kept.min or high > kept.max:
            raise ValueError(
                f"table {self._name!r}: codes must be integers in the range of {self.codes.dtype}, got "
                f"{low if low < kept.min else high}"
            )
        self.codes.copy_(codes)
        self.start_flag = None
        self.seal()

    def stand_beside(self, *decoders: nn.Module) -> None:
        """Name the decoders whose integers the mark covers as well, and note it anew where there are codes."""
        super().stand_beside(*decoders)
        if self.is_filled:
            self.seal()

    def seal(self) -> None:
        """Note the mark of the integers as they are; whatever writes them calls this."""
        codes, is_set, is_start = self._buffers["codes"], self._buffers["is_set"], self.is_start
        assert codes is not None and is_set is not None
        is_set.fill_(mark_of(total_of([codes, *self.low_bit_rows()])))
        self.start_flag = flag_of(is_set) if is_start else None

    def take_changed(self) -> None:
        """Take codes and decoders' integers as they are: their manager has changed them."""
        self.start_flag = None
        self.seal()

    def check(self) -> None:
        """Raise ValueError where something else than a fit or a checkpoint has changed the integers."""
        check_intact([self.codes, *self.low_bit_rows()], self.is_set, self._name)

    @property
    def is_filled(self) -> bool:
        """Whether there are codes; unknown, and so False, on the meta device."""
        return can_check(self.is_set) and flag_of(self.is_set) != NOT_FILLED

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.check()
        super()._save_to_state_dict(destination, prefix, keep_vars)
