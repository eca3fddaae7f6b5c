"""Time of learning codes for a table of 1M rows x 64, beside faiss's quantisers.

Run: python benchmarks/fit_time.py        (needs faiss-cpu: pip install 'torchrec-compress[benchmark]')

Each fit is timed whole: training the codebooks and coding every row. Our product codes and faiss's run in turns, so
that a busy machine slows both; the best of the rounds is reported, with the load at the time. Both train on the same
number of rows (256 per codeword) for 25 iterations. Writes fit_time.md beside this file.
"""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import torch
from torch import Tensor

from torchrec_compress.fit.codes import weighted_error
from torchrec_compress.fit.mec import MECFit, fit_mec
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.residual import fit_residual


@dataclass
class Result:
    """Times and error of one fit."""

    name: str
    run: Callable[[Tensor, Tensor], Tensor]  # rows, weights -> reconstruction
    bytes_per_row: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    plain_error: float = float("nan")
    lookup_error: float = float("nan")


def table(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows like a trained table's (clusters, columns of falling scale) and Zipf counts, in random order."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).pow(-0.3)
    centres = torch.randn(2000, width, generator=generator)
    choice = torch.randint(2000, (num_rows,), generator=generator)
    rows = (0.7 * centres[choice] + 0.7 * torch.randn(num_rows, width, generator=generator)) * scale
    counts = (num_rows / torch.arange(1, num_rows + 1)).floor()
    return 0.1 * rows, counts[torch.randperm(num_rows, generator=generator)]


def faiss_product(rows: Tensor, weights: Tensor) -> Tensor:
    """Fit faiss's product quantiser (M=8, K=256, its defaults), without weights: it takes none."""
    quantiser = faiss.ProductQuantizer(rows.shape[1], 8, 8)
    quantiser.train(rows.numpy())
    return torch.from_numpy(quantiser.decode(quantiser.compute_codes(rows.numpy())))


def faiss_residual(rows: Tensor, weights: Tensor) -> Tensor:
    """Fit faiss's residual quantiser (M=4, K=256, its defaults: five best partial codes are kept), without weights."""
    quantiser = faiss.ResidualQuantizer(rows.shape[1], 4, 8)
    quantiser.train(rows.numpy())
    return torch.from_numpy(quantiser.decode(quantiser.compute_codes(rows.numpy())))


def residual_of_more_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Fit residual codes to a sample four times as large as usual."""
    return fit_residual(rows, 4, 256, max_points_per_centroid=1024).reconstruct()


def measure(result: Result, rows: Tensor, weights: Tensor) -> None:
    """Run one fit once and note its time, load and errors."""
    start, cpu_start = time.perf_counter(), time.process_time()
    reconstruction = result.run(rows, weights)
    result.seconds.append(time.perf_counter() - start)
    result.cpu_seconds.append(time.process_time() - cpu_start)
    result.loads.append(os.getloadavg()[0])
    result.plain_error = weighted_error(rows, reconstruction)
    result.lookup_error = weighted_error(rows, reconstruction, weights)
    cpu = f"{result.cpu_seconds[-1]:.1f} s of CPU"
    print(f"{result.name}: {result.seconds[-1]:.1f} s, {cpu}, load {result.loads[-1]:.1f}", flush=True)


def current_commit() -> str:
    """Return the short hash of the checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def report(results: list[Result], arguments: argparse.Namespace, commit: str, variance: float) -> str:
    """Return the table and where it was measured, in Markdown."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((x.split(": ")[1] for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), cpu)
    lines = [
        "# Time to learn codes",
        "",
        f"{arguments.rows:,} rows x {arguments.width}, float32, Zipf counts; {arguments.threads} of {os.cpu_count()} "
        f"threads ({cpu}); "
        f"torch {torch.__version__}, faiss {faiss.__version__}; commit {commit}; "
        f"{time.strftime('%Y-%m-%d')}. Command: `python benchmarks/fit_time.py --threads {arguments.threads}`.",
        "Errors are mean squares, as a share of the table's; `lookups`: rows weighted by their counts. "
        "Seconds include coding all rows; CPU seconds (of all threads) tell more on a shared machine; "
        "load is its 1-minute average when the best run ended.",
        "",
        "| fit | code bytes a row | seconds (best) | runs | CPU seconds | load | error, rows alike | error, lookups |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        best = min(range(len(r.seconds)), key=r.seconds.__getitem__)
        runs = ", ".join(f"{s:.1f}" for s in r.seconds)
        lines.append(
            f"| {r.name} | {r.bytes_per_row} | {r.seconds[best]:.1f} | {runs} "
            f"| {min(r.cpu_seconds):.1f} | {r.loads[best]:.1f} "
            f"| {r.plain_error / variance:.4f} | {r.lookup_error / variance:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description="time of learning codes, beside faiss")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the product codes; the slow fits run once")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    commit = current_commit()  # now: the code is loaded, the checkout may move on while it runs
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    rows, weights = table(arguments.rows, arguments.width)
    ours = Result("product M=8 K=256", lambda x, w: fit_product(x, 8, 256).reconstruct(), 8)
    theirs = Result("faiss ProductQuantizer M=8 K=256", faiss_product, 8)
    once = [
        Result("product M=8 K=256, counts", lambda x, w: fit_product(x, 8, 256, weights=w).reconstruct(), 8),
        Result("residual M=4 K=256", lambda x, w: fit_residual(x, 4, 256).reconstruct(), 4),
        Result("faiss ResidualQuantizer M=4 K=256", faiss_residual, 4),
        Result("residual M=4 K=256, 1,024 rows a codeword", residual_of_more_rows, 4),
        Result("residual M=4 K=256, counts", lambda x, w: fit_residual(x, 4, 256, weights=w).reconstruct(), 4),
        Result("product M=4 K=256", lambda x, w: fit_product(x, 4, 256).reconstruct(), 4),
        Result("MEC M=8 K=256, counts", lambda x, w: fit_mec(x, 8, 256, weights=w).reconstruct(), 8),
        Result(
            "MEC M=8 K=256, counts, no usage term",
            lambda x, w: fit_mec(x, 8, 256, weights=w, options=MECFit(usage=0.0)).reconstruct(),
            8,
        ),
    ]
    for _ in range(arguments.rounds):
        measure(ours, rows, weights)
        measure(theirs, rows, weights)
    for result in once:
        measure(result, rows, weights)
    variance = weighted_error(rows, torch.zeros_like(rows))
    text = report([ours, theirs, *once], arguments, commit, variance)
    print(text)
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
