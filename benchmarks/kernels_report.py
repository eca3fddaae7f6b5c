"""What benchmarks/kernels.py found, as Markdown."""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

BASELINE = "SplitTBE fp32"
# what the project set itself, against the baseline, for Zipf ids and D = 128: by (phase, M), for L = 1, 10, 50
GOALS = {
    ("forward", 8): (1.5, 2.2, 2.6),
    ("forward", 16): (1.05, 1.7, 2.0),
    ("step", 8): (3.2, 6.0, 9.0),
    ("step", 16): (2.1, 5.0, 7.0),
}


class Setting(NamedTuple):
    """What all variants are timed in."""

    threads: int
    ids: str
    dim: int
    length: int


class Spent(NamedTuple):
    """Seconds of a run."""

    cpu: float
    wall: float


# by (name, phase)
Times = dict[tuple[str, str], list[Spent]]
# by (name, phase, L)
Scaling = dict[tuple[str, str, int], list[float]]


def seconds(times: Times, name: str, phase: str, threads: int) -> list[float]:
    """Return the CPU time of one thread, or the wall time of several."""
    return [spent.cpu if threads == 1 else spent.wall for spent in times[name, phase]]


def ratios(times: Times, name: str, phase: str, threads: int) -> list[float]:
    """Return how many times faster than the baseline a variant is, round by round."""
    full, own = (seconds(times, of, phase, threads) for of in (BASELINE, name))
    return [a / b for a, b in zip(full, own, strict=True)]


def spread(values: list[float]) -> str:
    """Return the cells of the median and of the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} | {low:.2f} to {high:.2f}"


def table_of(results: dict[Setting, Times], phase: str, threads: int, options: argparse.Namespace) -> list[str]:
    """Return one line per setting: the baseline's time, and the others' speed beside it."""
    mine = {setting: times for setting, times in results.items() if setting.threads == threads}
    names = list(dict.fromkeys(name for times in mine.values() for name, of in times if of == phase))
    names.remove(BASELINE)
    lines = [f"| ids | D | L | {BASELINE}, ns | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for setting, times in mine.items():
        base = statistics.median(seconds(times, BASELINE, phase, threads))
        nanoseconds = 1e9 * base / (options.tables * options.batch * setting.length)
        cells = [
            f"{statistics.median(ratios(times, name, phase, threads)):.2f}" if (name, phase) in times else ""
            for name in names
        ]
        lines.append(
            f"| {setting.ids} | {setting.dim} | {setting.length} | {nanoseconds:.1f} | " + " | ".join(cells) + " |"
        )
    return lines


def summary(results: dict[Setting, Times], threads: int) -> list[str]:
    """Return our speed beside the goals: Zipf ids, D = 128."""
    lines = ["| phase | M | L | times as fast | quartiles | goal |", "|---|---|---|---|---|---|"]
    for (phase, num_codes), goals in GOALS.items():
        for length, goal in zip((1, 10, 50), goals, strict=True):
            times, name = results.get(Setting(threads, "zipf", 128, length), {}), f"codes M={num_codes}"
            if (name, phase) in times:
                speed = spread(ratios(times, name, phase, threads))
                lines.append(f"| {phase} | {num_codes} | {length} | {speed} | {goal} |")
    return lines


def scaling_table(scaling: Scaling, threads: int) -> list[str]:
    """Return how many times faster several threads are than one: Zipf ids, D = 128, wall time."""
    lines = [f"| variant | phase | L | {threads} threads against 1 | quartiles |", "|---|---|---|---|---|"]
    return lines + [f"| {name} | {phase} | {length} | {spread(v)} |" for (name, phase, length), v in scaling.items()]


def section(results: dict[Setting, Times], scaling: Scaling, options: argparse.Namespace, threads: int) -> list[str]:
    """Return the lines of one number of threads."""
    clock = "CPU time" if threads == 1 else "wall time"
    lines = [f"## {threads} thread{'s' * (threads > 1)}, {clock}", "", *summary(results, threads), ""]
    if scaling and threads == max(options.threads):
        lines += [*scaling_table(scaling, threads), ""]
    for phase in ("forward", "step"):
        table = table_of(results, phase, threads, options)
        lines += [f"Times as fast as {BASELINE}, {phase} (ns per look-up):", "", *table, ""]
    return lines
