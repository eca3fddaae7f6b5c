"""Time and memory of trained rows of few bits beside FBGEMM's float32 tables.

Run: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python benchmarks/trained_rows.py   (writes trained_rows.md)
     python benchmarks/trained_rows.py --rows 20000 --rounds 3 --lengths 1 10 --out /tmp/try.md

One thread, one table. All variants run in turns in one process, each round on another batch, so that a busy machine
slows all of them; a ratio is taken within a round, against FBGEMM's table of the same optimizer, and its median and
quartiles over the rounds are reported. The clock is the thread's CPU time. A step is the look-up, the backward and the
update; FBGEMM's is EXACT_ROWWISE_ADAGRAD or EXACT_ADAGRAD, D numbers wide. FBGEMM has no Adam on a CPU, so Adam's steps
stand beside those of its element-wise Adagrad, which keeps half of Adam's state. Ids are zipf(1.05), scattered.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from kernels import draw, page_mode, resident
from torch import Tensor

from torchrec_compress.ops import TrainedFormat, TrainedOptimizer, TrainedStep, encode_trained, tiers, trained_bag

DIM = 64
_HEAP = 4 << 30  # bytes
Batch = tuple[Tensor, Tensor, Tensor]  # ids, offsets and the gradient, (B, D)
Run = Callable[[Batch, bool], object]
Times = dict[tuple[str, str], list[float]]


def full(rows: int, optimizer: str) -> Run:
    """Return FBGEMM's float32 table."""
    kind = EmbOptimType["EXACT_" + optimizer.replace("row_wise", "rowwise").upper()]
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=kind,
        learning_rate=0.01,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    table.split_embedding_weights()[0].uniform_(-0.1, 0.1)

    def run(batch: Batch, is_step: bool) -> Tensor:
        with torch.set_grad_enabled(is_step):
            out = table(batch[0], batch[1])
        if is_step:
            out.backward(batch[2])
        return out

    return run


def trained(num_rows: int, form: TrainedFormat) -> Run:
    """Return trained rows."""
    rows = torch.empty(num_rows, form.row_bytes, dtype=torch.uint8)
    for piece in rows.split(4096):
        piece.copy_(encode_trained(torch.empty(len(piece), form.width).uniform_(-0.1, 0.1), form))
    state = torch.zeros(num_rows, form.state_bytes, dtype=torch.uint8)
    count = iter(range(1 << 62))

    def next_step() -> AbstractContextManager[TrainedStep]:
        return nullcontext(TrainedStep(learning_rate=0.01, eps=1e-8, seed=1, step=next(count)))

    def run(batch: Batch, is_step: bool) -> Tensor:
        with torch.set_grad_enabled(is_step):
            out = trained_bag(rows, state, batch[0], batch[1], form, step=next_step, where="table 't'")
        if is_step:
            out.backward(batch[2][:, : form.width])
        return out

    return run


def formats() -> list[TrainedFormat]:
    """Return the formats that are timed."""
    bits: tuple[Literal[8, 4], ...] = (8, 4)
    states: tuple[tuple[TrainedOptimizer, Literal[32, 8]], ...] = (
        ("rowwise_adagrad", 32),
        ("rowwise_adagrad", 8),
        ("adagrad", 8),
        ("partial_rowwise_adam", 8),
        ("adam", 8),
    )
    return [TrainedFormat(width, each, *state) for width in (DIM, DIM // 4) for each in bits for state in states]


def baseline(optimizer: str) -> str:
    """Return the name of FBGEMM's table with an optimizer, or with Adagrad in Adam's place."""
    return f"SplitTBE fp32, {'adagrad' if 'adam' in optimizer else optimizer}"


def name_of(form: TrainedFormat) -> str:
    """Return what a format is called in the report."""
    return f"r = {form.width}, int{form.bits}, {form.optimizer} in {form.state_bits} bits"


def batches(options: argparse.Namespace, length: int) -> list[Batch]:
    """Return the batches that the rounds take turns with."""
    generator = torch.Generator().manual_seed(length)
    offsets = torch.arange(0, options.batch * length + 1, length)
    return [
        (
            draw("zipf", options.rows, options.batch * length, generator),
            offsets,
            torch.randn(options.batch, DIM, generator=generator),
        )
        for _ in range(4)
    ]


def measure(options: argparse.Namespace, runs: dict[str, Run], length: int) -> Times:
    """Run everything in every round, and return the seconds by variant and phase."""
    work, found = batches(options, length), {}
    for number in range(-2, options.rounds):
        for name, run in runs.items():
            for phase in ("step", "forward"):
                start = time.thread_time()
                made = run(work[number % len(work)], phase == "step")
                spent = time.thread_time() - start
                del made
                if number >= 0:  # the first rounds allocate and warm up
                    found.setdefault((name, phase), []).append(spent)
    return found


def table(options: argparse.Namespace, times: Times, length: int, base_of: dict[str, str]) -> list[str]:
    """Return the lines of one length of bags."""
    lines = [
        f"## L = {length}",
        "",
        "| variant | step, ns per id | faster | forward, ns per id | faster |",
        "|---|---|---|---|---|",
    ]
    for name, base in base_of.items():
        cells = []
        for phase in ("step", "forward"):
            mine = times[name, phase]
            cells.append(f"{statistics.median(mine) / options.batch / length * 1e9:,.0f}")
            ratios = [one / other for one, other in zip(times[base, phase], mine, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            cells.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})" if name != base else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def peak(options: argparse.Namespace) -> None:
    """Print the bytes that one variant, its batch and its steps take at their peak, for a parent process."""
    batch = batches(options, 10)[0]
    # code and the heap of a small table are there before
    small = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), torch.ones(1, DIM)
    for run in (full(1, "adagrad"), trained(1, TrainedFormat(DIM, 8))):
        run(small, True)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident()
    known = {name_of(form): form for form in formats()}
    of_full = {baseline(name): name for name in ("rowwise_adagrad", "adagrad")}
    name = options.memory
    run = trained(options.rows, known[name]) if name in known else full(options.rows, of_full[name])
    for _ in range(2):
        run(batch, True)
    print(resident("VmHWM") - before)


def memory(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Return the lines on memory, each variant measured in a process of its own."""
    lines = ["## Peak memory of rows, state and training steps, L = 10", "", "| variant | MiB |", "|---|---|"]
    for name in names:
        command = [sys.executable, __file__, "--memory", name, "--rows", str(options.rows)]
        command += ["--batch", str(options.batch)]
        # all but small pieces of memory go back to the system when they are freed
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        lines.append(f"| {name} | {int(done.stdout.split()[-1]) / 2**20:,.0f} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.memory:
        return peak(options)
    load = os.getloadavg()[0]
    torch.zeros(_HEAP, dtype=torch.uint8)  # the heap that later calls find in place
    base_of = {baseline(name): baseline(name) for name in ("rowwise_adagrad", "adagrad")}
    runs = {baseline(name): full(options.rows, name) for name in ("rowwise_adagrad", "adagrad")}
    for form in formats():
        base_of[name_of(form)] = baseline(form.optimizer)
        runs[name_of(form)] = trained(options.rows, form)
    sections = []
    for length in options.lengths:
        sections += table(options, measure(options, runs, length), length, base_of)
    serving = next(tier for tier in tiers() if not tier.passed_over)
    text = [
        "# Time and memory of trained rows",
        "",
        f"`python benchmarks/trained_rows.py {' '.join(sys.argv[1:])}`: one table of {options.rows:,} rows, D = {DIM}, "
        f"batch {options.batch}, one thread;",
        f"medians of {options.rounds} rounds, quartiles in brackets; {serving.detail.split(',')[0]}, "
        f"torch {torch.__version__}, {platform.machine()}, huge pages {page_mode()},",
        ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"))
        + f"; load {load:.1f} before, {os.getloadavg()[0]:.1f} after. Faster than FBGEMM's table of the same",
        "optimizer (of adagrad, for Adam: FBGEMM has none on a CPU), which is D wide, whatever r.",
        "",
        *sections,
        *memory(options, list(runs)),
    ]
    options.out.write_text("\n".join(text) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
