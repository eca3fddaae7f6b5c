"""What ids occur with: pairs, or what is kept of a stream of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

from torch import Tensor

from torchrec_compress.fit.checks import check_contexts

NEVER = 2**31 - 1  # stands where there is no hash; those of contexts are below it
_PAIRS_AT_ONCE = 2**16


class ContextSketch(ABC):
    """What is kept of any number of pairs (id, context id), the same to the bit whatever their order and batches.

    Attributes:
        num_rows: N, ids.
        salt: of the hashes of contexts.
        where: names it in errors; sketches of a method name their table.
    """

    num_rows: int
    salt: int
    where: str

    def _check_sizes(self, *names: str) -> None:
        """Raise ValueError for sizes that are none."""
        for name in names:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{self.where}: {name} must be an int of at least 1, got {size!r}")

    def add(self, ids: Tensor, contexts: Tensor) -> None:
        """Take pairs that occurred together; a batch without any changes nothing.

        Args:
            ids: (P,) integer in [0, N).
            contexts: (P,) integer >= 0: of the user, the session, the example ...; those of several features must be
                in ranges of their own.

        Raises:
            ValueError: they are no two vectors of integers of one length, or one is out of range.
        """
        if all(isinstance(part, Tensor) and part.shape == (0,) for part in (ids, contexts)):
            return
        ids, contexts = check_contexts(self.where, (ids, contexts), self.num_rows)
        for some, others in zip(ids.split(_PAIRS_AT_ONCE), contexts.split(_PAIRS_AT_ONCE), strict=True):
            self._take(some, others)

    def _check_joined(self, name: str, other: object) -> Tensor:
        """Return what another sketch kept, under this name, or raise ValueError unless it is as what this one keeps."""
        mine: Tensor = getattr(self, name)
        if not isinstance(other, Tensor):
            raise ValueError(f"{self.where}: {name} must be a tensor, got {type(other).__name__}; join sketch.{name}")
        if other.shape != mine.shape or other.dtype != mine.dtype:
            raise ValueError(
                f"{self.where}: {name} must be {tuple(mine.shape)} of {mine.dtype}, got {tuple(other.shape)} of "
                f"{other.dtype}; join sketches of one table"
            )
        return other.to(mine.device)

    @abstractmethod
    def _take(self, ids: Tensor, contexts: Tensor) -> None:
        """Take some pairs, which are checked: (P,) int64 each."""

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no pair was added yet."""


# what ids occurred with: ((P,), (P,)) int64 pairs (id, context id), or what a method keeps of a stream of them
Contexts: TypeAlias = tuple[Tensor, Tensor] | ContextSketch
