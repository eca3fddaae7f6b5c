"""The plot of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrec_compress.canvas import figure
from torchrec_compress.planner.records import RankPlan, TablePlan, ratio_of

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


def draw(tables: Mapping[str, TablePlan], ranks: Sequence[RankPlan], compute_device: str, path: Path) -> None:
    """Draw the bytes of every rank by kind, and of every table dense beside stored, into a PNG file."""
    num_tables = min(_MOST_TABLES, len(tables))
    with figure(path, 14, 3.5 + 0.16 * num_tables, dpi=120) as drawn:
        left, right = drawn.subplots(1, 2)
        _draw_ranks(left, ranks, compute_device)
        _draw_tables(right, tables)


def draw_choice(frontier: Sequence[tuple[int, float]], chosen: tuple[int, float], unit: str, path: Path) -> None:
    """Draw the error of the best choices against their bytes, and the one that was made, into a PNG file."""
    with figure(path, 7, 4.5, dpi=120) as drawn:
        axes = drawn.subplots()
        axes.plot([size / _GIB for size, _ in frontier], [error for _, error in frontier], drawstyle="steps-post")
        axes.plot(chosen[0] / _GIB, chosen[1], "o", label=f"{chosen[0] / _GIB:.3g} GiB, {chosen[1]:.2g}")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=max(min((e for _, e in frontier if e > 0), default=1.0), 1e-12))
        axes.set_xlabel("GiB over all ranks, as planned")
        axes.set_ylabel(f"{unit} of all tables")
        axes.legend(fontsize=8)


def _draw_ranks(axes: Any, ranks: Sequence[RankPlan], compute_device: str) -> None:
    below = [0.0] * len(ranks)
    for label, name in _LAYERS.items():
        heights = [getattr(rank, name) / _GIB for rank in ranks]
        axes.bar(range(len(below)), heights, bottom=below, width=1.0, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    capacity = [rank.capacity_bytes / _GIB for rank in ranks]
    if max(capacity) < 5 * max(below):  # a line far above would flatten the bars
        axes.step(range(len(capacity)), capacity, where="mid", color="black", linestyle=":", label="capacity")
    axes.set_title(f"{compute_device}: {max(capacity):.1f} GiB per rank after reservations", fontsize=9)
    axes.set_xlabel("rank")
    axes.set_ylabel("GiB")
    axes.legend(fontsize=7)


def _draw_tables(axes: Any, tables: Mapping[str, TablePlan]) -> None:
    names = sorted(tables, key=lambda name: -tables[name].dense_bytes)[:_MOST_TABLES]
    shown = [tables[name] for name in names]
    positions = range(len(names))
    axes.barh([p - 0.2 for p in positions], [table.dense_bytes / _GIB for table in shown], 0.4, label="dense")
    axes.barh([p + 0.2 for p in positions], [table.stored_bytes / _GIB for table in shown], 0.4, label="stored")
    labels = [f"{name} ({table.method}, {table.ratio:.0f}x)" for name, table in zip(names, shown, strict=True)]
    axes.set_yticks(list(positions), labels, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_title(f"all {len(tables)} tables: {ratio_of(tables.values()):.1f}x", fontsize=9)
    axes.set_xlabel("GiB, one copy")
    axes.legend(fontsize=7)
