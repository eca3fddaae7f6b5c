"""Plots of a report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torchrec_compress.canvas import figure
from torchrec_compress.train.compare.pareto import Variant, draw_pareto
from torchrec_compress.train.evaluate.metrics import LESS_IS_BETTER, QUALITY

_SIZES = {
    "bytes": "bytes of all tables, everything counted",
    "held_bytes": "bytes held in training: tables and their optimizer state",
}


def draw(report: dict[str, Any], folder: Path) -> list[str]:
    """Draw quality against bytes, served and held in training where known, and code usage where there are codes.

    Args:
        report: as `collect` returns it.
        folder: where the PNG files go.

    Returns:
        The names of the files.
    """
    names = []
    for metric, title in QUALITY.items():
        if not all(metric in row["test"] for row in report["variants"].values()):
            continue
        best_possible = report["bayes"][f"bayes_{metric}"] if report["bayes"] else None
        for size, label in _SIZES.items():
            variants = _variants(report, metric, size)
            if not variants:
                continue
            names.append(f"{metric}_against_{size}.png")
            with figure(folder / names[-1], 9, 6, dpi=130) as drawn:
                draw_pareto(
                    drawn,
                    variants,
                    sizes=label,
                    metric=f"test {title}",
                    less_is_better=metric in LESS_IS_BETTER,
                    best_possible=best_possible,
                )
    bars = [
        (f"{name}: {table}", use) for name, row in report["variants"].items() for table, use in row["usage"].items()
    ]
    if bars:
        names.append("code_usage.png")
        with figure(folder / names[-1], 8, 1 + 0.32 * len(bars), dpi=130) as drawn:
            _usage(drawn.subplots(), bars)
    return names


def _variants(report: dict[str, Any], metric: str, size: str) -> list[Variant]:
    """Return the variants whose bytes and quality are known."""
    found = [
        Variant(name, row[size], row["test"][metric]["mean"], row["test"][metric]["spread"])
        for name, row in report["variants"].items()
        if row.get(size)
    ]
    return [variant for variant in found if not math.isnan(variant.value)]


def _usage(axes: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    positions = range(len(bars))
    shares = [[use[key] / use["codebook_size"] for _, use in bars] for key in ("by_rows", "by_lookups")]
    axes.barh([p - 0.2 for p in positions], shares[0], 0.4, label="over rows")
    axes.barh([p + 0.2 for p in positions], shares[1], 0.4, label="over look-ups")
    axes.set_yticks(list(positions), [name for name, _ in bars], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("perplexity of codes / codewords")
    axes.legend(fontsize=7)
