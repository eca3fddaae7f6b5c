"""The plot of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrec_compress.canvas import figure

if TYPE_CHECKING:
    from torchrec_compress.planner.report import PlanReport

_GIB = 2**30
_MOST_TABLES = 30
_LAYERS = {
    "codes": "code_bytes",
    "native tables": "native_bytes",
    "managed tables": "managed_bytes",
    "decoders": "decoder_bytes",
    "optimizer state": "optimizer_bytes",
    "gradients": "gradient_bytes",
    "activations": "activation_bytes",
}


def draw(report: PlanReport, path: Path) -> None:
    """Draw the bytes of every rank by kind, and of every table dense beside stored, into a PNG file."""
    num_tables = min(_MOST_TABLES, len(report.tables))
    with figure(path, 14, 3.5 + 0.16 * num_tables, dpi=120) as drawn:
        left, right = drawn.subplots(1, 2)
        _draw_ranks(left, report)
        _draw_tables(right, report)


def _draw_ranks(axes: Any, report: PlanReport) -> None:
    below = [0.0] * len(report.ranks)
    for label, name in _LAYERS.items():
        heights = [getattr(rank, name) / _GIB for rank in report.ranks]
        axes.bar(range(len(below)), heights, bottom=below, width=1.0, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    capacity = [rank.capacity_bytes / _GIB for rank in report.ranks]
    if max(capacity) < 5 * max(below):  # a line far above would flatten the bars
        axes.step(range(len(capacity)), capacity, where="mid", color="black", linestyle=":", label="capacity")
    axes.set_title(f"{report.compute_device}: {max(capacity):.1f} GiB per rank after reservations", fontsize=9)
    axes.set_xlabel("rank")
    axes.set_ylabel("GiB")
    axes.legend(fontsize=7)


def _draw_tables(axes: Any, report: PlanReport) -> None:
    names = sorted(report.tables, key=lambda name: -report.tables[name].dense_bytes)[:_MOST_TABLES]
    tables = [report.tables[name] for name in names]
    positions = range(len(names))
    axes.barh([p - 0.2 for p in positions], [table.dense_bytes / _GIB for table in tables], 0.4, label="dense")
    axes.barh([p + 0.2 for p in positions], [table.stored_bytes / _GIB for table in tables], 0.4, label="stored")
    labels = [f"{name} ({table.method}, {table.ratio:.0f}x)" for name, table in zip(names, tables, strict=True)]
    axes.set_yticks(list(positions), labels, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_title(f"all {len(report.tables)} tables: {report.ratio:.1f}x", fontsize=9)
    axes.set_xlabel("GiB, one copy")
    axes.legend(fontsize=7)
