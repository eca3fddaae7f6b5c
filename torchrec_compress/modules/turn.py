"""The look-ups between two ends of a step, of tables that change at such an end other than by gradient."""

from __future__ import annotations

# what a loop that accumulates gradients may do before it must have stepped
MOST_BACKWARDS = 64


class Turn:
    """The look-ups of one table between two ends of a step.

    Attributes:
        backwards: that came.
        is_over: whether the step has ended, and rows may have moved.
        is_discarded: whether its batch was left out.
    """

    def __init__(self) -> None:
        self.backwards, self.is_over, self.is_discarded = 0, False, False

    def check_told(self, table: str, of_batch: int) -> None:
        """Raise RuntimeError where a loop, of so many look-ups a batch, forgets to tell the end of its steps."""
        if self.backwards >= MOST_BACKWARDS * of_batch:
            raise RuntimeError(
                f"table {table!r}: the end of a step must be told before {MOST_BACKWARDS} backwards, got none; call "
                "torchrec_compress.after_step(model, step) after every optimizer.step()"
            )

    def check_open(self, table: str) -> None:
        """Raise RuntimeError where gradients come for rows that may have moved since they were looked up."""
        if self.is_over:
            raise RuntimeError(
                f"table {table!r}: the backward of a look-up must come before the end of its step, got it after "
                "torchrec_compress.after_step; look up after it, and use no pipeline that looks up ahead of the last "
                "step (TrainPipelineSemiSync)"
            )
