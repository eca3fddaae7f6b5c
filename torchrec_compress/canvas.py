"""Plots as PNG files, drawn by Matplotlib's Agg alone, whatever the environment or the user's settings ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def figure(path: Path, width: float, height: float, dpi: int) -> Iterator[Figure]:
    """Yield a figure, which is written when the block ends.

    Args:
        path: of the PNG file.
        width, height: in inches.
        dpi: pixels per inch.
    """
    # Matplotlib refuses to be imported where MPLBACKEND names what is not installed, such as a notebook's backend
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    # a user's matplotlibrc may want LaTeX, which is slow or missing
    usual: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(usual):
        drawn = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        drawn.savefig(path, dpi=dpi, format="png")
