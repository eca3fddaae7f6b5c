"""Time of `codebook_bag` beside the uncompressed tables it replaces.

Run: MALLOC_MMAP_MAX_=0 python benchmarks/kernels.py      (many minutes; writes kernels.md)
     python benchmarks/kernels.py --rows 20000 --rounds 3 --lengths 1 10 --dims 64 --out /tmp/try.md

All variants of a setting run in turns in one process, each round on another batch, so that a busy machine slows all of
them; a ratio is taken within a round, and its median and quartiles over the rounds are reported. On one thread the
clock is the process's CPU time, on more it is the wall. Codes are random, the worst case for a codebook's locality.

MALLOC_MMAP_MAX_=0 keeps glibc from giving large outputs back to the kernel after every call; without it page faults
hide the look-ups, whichever they are.

Ours is the whole look-up: the check of ids and the gather of their codes, the pooling, the concatenation of the tables'
outputs; "step" adds the backward and dense Adagrad on the codebooks. FBGEMM's step has its fused row-wise Adagrad;
`F.embedding_bag`'s makes the sparse gradient, with no optimizer.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (registers the operators)
import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_compress.ops import codebook_bag, lookup_codes, tiers

BASELINE = "FBGEMM SplitTBE fp32"
CODEBOOK_SIZE = 256


@dataclass
class Batch:
    """Ids of all tables, table after table, and offsets, as FBGEMM takes them."""

    ids: Tensor  # (T * B * L,) int64
    offsets: Tensor  # (T * B + 1,) int64
    bag_offsets: Tensor  # (B + 1,) int64, of one table
    grad: Tensor  # (B, T * D)

    def table(self, t: int) -> Tensor:
        """Return the ids of table t."""
        num_ids = int(self.bag_offsets[-1])
        return self.ids[t * num_ids : (t + 1) * num_ids]


@dataclass
class Variant:
    """Something to time."""

    run: Callable[[Batch], object]
    seconds: list[float] = field(default_factory=list)


def draw(distribution: str, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ids: "uniform", or "zipf" with exponent 1.05, scattered over the table."""
    if distribution == "uniform":
        return torch.randint(rows, (count,), generator=generator)
    mass = torch.arange(1, rows + 1, dtype=torch.float64).pow(-1.05).cumsum(0)
    ranks = torch.searchsorted(mass / mass[-1], torch.rand(count, dtype=torch.float64, generator=generator))
    scatter = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    return scatter[ranks.clamp(max=rows - 1)]


def batches(options: argparse.Namespace, distribution: str, dim: int, length: int) -> list[Batch]:
    """Return the batches that the rounds take turns with."""
    generator = torch.Generator().manual_seed(0)
    bags, num_tables = options.batch, options.tables
    made = []
    for _ in range(options.batches):
        ids = draw(distribution, options.rows, num_tables * bags * length, generator)
        grad = torch.randn(bags, num_tables * dim, generator=generator)
        offsets = torch.arange(0, num_tables * bags * length + 1, length)
        made.append(Batch(ids, offsets, offsets[: bags + 1].clone(), grad))
    return made


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let `codebook_bag` run on one backend."""
    before = os.environ.get("TORCHREC_COMPRESS_BACKEND")
    os.environ["TORCHREC_COMPRESS_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["TORCHREC_COMPRESS_BACKEND"]
        if before is not None:
            os.environ["TORCHREC_COMPRESS_BACKEND"] = before


def add_full_tables(found: dict[str, Variant], options: argparse.Namespace, dim: int) -> None:
    """Add FBGEMM and `F.embedding_bag` over the same rows."""
    spec = (options.rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    full = SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * options.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    tables = full.split_embedding_weights()
    for table in tables:
        table.uniform_(-0.1, 0.1)

    def bags(batch: Batch, weights: list[Tensor], sparse: bool) -> Tensor:
        parts = [
            F.embedding_bag(
                batch.table(t), weight, batch.bag_offsets, mode="sum", sparse=sparse, include_last_offset=True
            )
            for t, weight in enumerate(weights)
        ]
        return torch.cat(parts, dim=1)

    def bags_step(batch: Batch) -> None:
        weights = [table.detach().requires_grad_() for table in tables]
        bags(batch, weights, True).backward(batch.grad)

    found[f"{BASELINE}, forward"] = Variant(no_grad(lambda batch: full(batch.ids, batch.offsets)))
    found[f"{BASELINE}, step"] = Variant(lambda batch: full(batch.ids, batch.offsets).backward(batch.grad))
    found["F.embedding_bag, forward"] = Variant(no_grad(lambda batch: bags(batch, tables, False)))
    found["F.embedding_bag, step"] = Variant(bags_step)


def add_codebooks(found: dict[str, Variant], options: argparse.Namespace, dim: int, num_codes: int) -> None:
    """Add the compressed look-up on the kernels and on the reference, and the gather of codes alone."""
    codes = [torch.randint(CODEBOOK_SIZE, (options.rows, num_codes), dtype=torch.uint8) for _ in range(options.tables)]
    shape = (num_codes * CODEBOOK_SIZE, dim // num_codes)
    books = [(0.1 * torch.randn(shape)).requires_grad_() for _ in range(options.tables)]
    optimizer = torch.optim.Adagrad(books, lr=0.01)
    is_set = torch.ones(1, dtype=torch.uint8)

    def gather(batch: Batch) -> list[Tensor]:
        return [lookup_codes(table, is_set, batch.table(t), "table") for t, table in enumerate(codes)]

    def forward(batch: Batch) -> Tensor:
        parts = [codebook_bag(rows, books[t], batch.bag_offsets) for t, rows in enumerate(gather(batch))]
        return torch.cat(parts, dim=1)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        forward(batch).backward(batch.grad)
        optimizer.step()

    for name, label in (("cpp", "codebook_bag C++"), ("torch", "codebook_bag reference")):
        found[f"{label} M={num_codes}, forward"] = Variant(on(name, no_grad(forward)))
        found[f"{label} M={num_codes}, step"] = Variant(on(name, step))
    found[f"gather of codes alone M={num_codes}, forward"] = Variant(gather)


def no_grad(function: Callable[[Batch], object]) -> Callable[[Batch], object]:
    def run(batch: Batch) -> object:
        with torch.no_grad():
            return function(batch)

    return run


def on(name: str, function: Callable[[Batch], object]) -> Callable[[Batch], object]:
    def run(batch: Batch) -> object:
        with backend(name):
            return function(batch)

    return run


def measure(options: argparse.Namespace, distribution: str, dim: int, length: int) -> list[str]:
    """Time one setting and return its rows of the table."""
    found: dict[str, Variant] = {}
    add_full_tables(found, options, dim)
    for num_codes in options.codes:
        add_codebooks(found, options, dim, num_codes)
    work = batches(options, distribution, dim, length)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for number in range(-1, options.rounds):
        for variant in found.values():
            start = clock()
            made = variant.run(work[number % len(work)])
            if number >= 0:  # the first round builds, allocates and warms up
                variant.seconds.append(clock() - start)
            del made
    lookups = options.tables * options.batch * length
    return [row(name, found, lookups, f"{distribution} | {dim} | {length}") for name in found]


def row(name: str, found: dict[str, Variant], lookups: int, setting: str) -> str:
    """Return a variant's line: time per look-up, and how many times faster than FBGEMM it is."""
    label, phase = name.rsplit(", ", 1)
    seconds = found[name].seconds
    ratios = [full / own for full, own in zip(found[f"{BASELINE}, {phase}"].seconds, seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    times = f"{1e9 * statistics.median(seconds) / lookups:.1f} | {1e9 * min(seconds) / lookups:.1f}"
    return f"| {setting} | {phase} | {label} | {times} | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"


def page_mode() -> str:
    """Return how the kernel hands out huge pages: always, madvise or never."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else "[unknown]"
    return text[text.index("[") + 1 : text.index("]")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--codes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ids", nargs="+", default=["zipf", "uniform"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    rows = [
        line
        for distribution in options.ids
        for dim in options.dims
        for length in options.lengths
        for line in measure(options, distribution, dim, length)
    ]
    serving = next(tier for tier in tiers() if not tier.passed_over)
    text = [
        "# Time of codebook_bag",
        "",
        f"`python benchmarks/kernels.py --threads {options.threads}`: {options.tables} tables,",
        f"{options.rows:,} rows each, batch {options.batch}, K = {CODEBOOK_SIZE},",
        f"{options.rounds} rounds; {serving.detail.split(',')[0]},",
        f"torch {torch.__version__}, {platform.machine()}, huge pages {page_mode()}, MALLOC_MMAP_MAX_="
        f"{os.environ.get('MALLOC_MMAP_MAX_', 'unset')},",
        f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after.",
        "Clock: " + ("CPU time." if options.threads == 1 else "wall time.") + " Ratios are medians (quartiles).",
        "",
        "| ids | D | L | phase | variant | ns per look-up, median | least | times faster than SplitTBE fp32 |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    options.out.write_text("\n".join(text) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
