"""A profiler trace of a few training steps, on request."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile, schedule

WARM_UP = 10  # steps before those that are traced


class Profile:
    """Trace some steps of a stage, or nothing.

    Args:
        folder: of the stage; a trace is `trace_rank0.json` there, to be opened in chrome://tracing or Perfetto.
        steps: to be traced, after ten others; 0 for none.
        rank: of this process.
    """

    def __init__(self, folder: Path, steps: int, rank: int) -> None:
        self._profile = None
        if steps > 0:
            path = folder / f"trace_rank{rank}.json"
            self._profile = profile(
                schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=lambda found: found.export_chrome_trace(str(path)),
            )

    def __enter__(self) -> Profile:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.stop()

    def step(self) -> None:
        """Note that a training step is over."""
        if self._profile is not None:
            self._profile.step()
