"""The file that kernels_gpu.py writes: times, ratios to FBGEMM's uncompressed tables, and goals."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from torchrec_compress.train.journal import versions

BASELINE = "FBGEMM SplitTBE fp32"
# how many times faster than the baseline, by phase and pooling factor, and the share of the copy's rate
GOALS = {"forward": {1: 1.5, 10: 4.0, 50: 6.0}, "step": {1: 3.0, 10: 3.0, 50: 3.0}}
GOAL_RATE = 0.7


@dataclass
class Variant:
    """Something to time, and the bytes that its forward must move."""

    run: Callable[[Any], object]  # with a batch
    num_bytes: int
    gpu: list[float] = field(default_factory=list)  # milliseconds of every round
    call: list[float] = field(default_factory=list)
    peak: int = 0  # bytes allocated during a call beyond those before it


@dataclass
class Found:
    """What one pooling factor gave: variants by name and phase, and why others are missing."""

    variants: dict[tuple[str, str], Variant] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def speedups(found: Found, name: str, phase: str) -> list[float]:
    """Return how many times faster than the baseline a variant was in each round; empty without a baseline."""
    full = found.variants.get((BASELINE, phase))
    own = found.variants[name, phase].gpu
    return [] if full is None else [a / b for a, b in zip(full.gpu, own, strict=True)]


def rate(variant: Variant) -> float:
    """Return the bytes per second of a forward."""
    return variant.num_bytes / (statistics.median(variant.gpu) / 1000)


def rows(found: Found, length: int, peak: float) -> list[str]:
    """Return the table's lines of a pooling factor."""
    lines = []
    for (name, phase), variant in found.variants.items():
        ratios, ratio = speedups(found, name, phase), ""
        if len(ratios) > 1:
            low, _, high = statistics.quantiles(ratios, n=4)
            ratio = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        share = f"{rate(variant) / peak:.0%}" if phase == "forward" else ""
        gpu, call = (1000 * statistics.median(times) for times in (variant.gpu, variant.call))
        lines.append(
            f"| {length} | {phase} | {name} | {gpu:.0f} | {1000 * min(variant.gpu):.0f} | {call:.0f} | {ratio} | "
            f"{share} | {variant.peak / 2**20:.0f} |"
        )
    return lines + [f"| {length} | | {name} | not measured: {why} | | | | | |" for name, why in found.missing.items()]


def goals(results: dict[int, Found], peak: float) -> list[str]:
    """Return the lines that compare the fastest tier with the goals."""
    lines = []

    def add(length: int, what: str, goal: str, found: str, name: str, is_met: bool) -> None:
        lines.append(f"| {length} | {what} | {goal} | {found}, {name} | {'met' if is_met else 'missed'} |")

    for length, found in results.items():
        ours = [key for key in found.variants if key[0].startswith("codebook_bags")]
        for phase, by_length in GOALS.items():
            ratios = {name: speedups(found, name, phase) for name, its_phase in ours if its_phase == phase}
            medians = {name: statistics.median(values) for name, values in ratios.items() if values}
            if medians and length in by_length:
                best, goal = max(medians, key=lambda name: medians[name]), by_length[length]
                add(length, phase, f"{goal}x", f"{medians[best]:.2f}x", best, medians[best] >= goal)
        shares = {name: rate(found.variants[name, phase]) / peak for name, phase in ours if phase == "forward"}
        if shares:
            best = max(shares, key=lambda name: shares[name])
            add(length, "copy's rate", f"{GOAL_RATE:.0%}", f"{shares[best]:.0%}", best, shares[best] >= GOAL_RATE)
    return lines


def report(options: argparse.Namespace, results: dict[int, Found], peak: float) -> str:
    """Return the whole text."""
    names = versions()
    for name in ("triton", "cuda-bindings", "nvidia-cuda-nvrtc"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            names[name] = metadata.version(name)
    commit = names.pop("commit")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU, a dry run: the figures mean nothing"
    late = [length for length in options.lengths if length not in results]
    text = [
        "# Time of codebook_bags on a GPU",
        "",
        f"`{options.command}` on {device}, {datetime.date.today()},",
        f"commit {options.commit or commit}: {options.tables} tables of {options.rows:,} rows, D = {options.dim},",
        f"M = {options.codes}, K = {options.size}, batch {options.batch}, uniform ids, {options.rounds} rounds;",
        f"a copy moves {peak / 1e12:.3f} TB/s. CUDA {torch.version.cuda},",
        f"{', '.join(f'{name} {version}' for name, version in names.items())}.",
        "The script's docstring says what is timed. Microseconds; ratios are medians (quartiles).",
        *([f"Not measured, for want of time: L = {', '.join(map(str, late))}."] if late else []),
        "",
        "| L | phase | goal | found | |",
        "|---|---|---|---|---|",
        *goals(results, peak),
        "",
        "| L | phase | variant | GPU, median | GPU, least | call | times as fast as fp32 | copy's rate | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for length, found_ in results.items() for line in rows(found_, length, peak)),
    ]
    return "\n".join(text) + "\n"
