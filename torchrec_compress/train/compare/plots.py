"""Plots of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrec_compress.canvas import figure
from torchrec_compress.train.evaluate.metrics import QUALITY


def draw(report: dict[str, Any], folder: Path) -> list[str]:
    """Draw quality against bytes, and code usage where there are codes.

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
        names.append(f"{metric}_against_bytes.png")
        with figure(folder / names[-1], 8, 5, dpi=130) as drawn:
            _quality(drawn.subplots(), report, metric, f"test {title}")
    bars = [
        (f"{name}: {table}", use) for name, row in report["variants"].items() for table, use in row["usage"].items()
    ]
    if bars:
        names.append("code_usage.png")
        with figure(folder / names[-1], 8, 1 + 0.32 * len(bars), dpi=130) as drawn:
            _usage(drawn.subplots(), bars)
    return names


def _quality(axes: Any, report: dict[str, Any], metric: str, title: str) -> None:
    for number, (name, row) in enumerate(report["variants"].items()):
        value = row["test"][metric]
        colour, marker = f"C{number % 10}", "osD^vPX*"[number // 10 % 8]
        axes.errorbar(row["bytes"], value["mean"], value["spread"], fmt=marker, color=colour, capsize=3)
        place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 7, "parse_math": False}
        axes.annotate(name, (row["bytes"], value["mean"]), **place)
    if report["bayes"]:
        best = report["bayes"][f"bayes_{metric}"]
        axes.axhline(best, color="grey", linestyle=":", linewidth=1)
        axes.annotate("best possible", (0.01, best), xycoords=("axes fraction", "data"), fontsize=7, color="grey")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of all tables, everything counted")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)


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
