"""Time of `codebook_bags` beside the uncompressed tables it replaces.

Run: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python benchmarks/kernels.py     (writes kernels.md)
     python benchmarks/kernels.py --rows 20000 --rounds 3 --lengths 1 10 --dims 64 --threads 1 --out /tmp/try.md

All variants of a setting run in turns in one process, each round on another batch, so that a busy machine slows all of
them; a ratio is taken within a round, and its median and quartiles over the rounds are reported. On one thread the
clock is the thread's CPU time, on more it is the wall. How much faster several threads are is measured apart, on runs
of one variant in a row. Codes are random, the worst case for a codebook's locality.

The two variables keep glibc from giving large outputs back to the kernel after every call; without them page faults
hide the look-ups, whichever they are.

Ours is the whole look-up: the check of ids, the gather of their codes and the pooling; "step" adds the backward and
Adagrad on the codebooks. FBGEMM's step has its fused row-wise Adagrad; `F.embedding_bag`'s makes the sparse gradient,
with no optimizer. Low-bit tables are served, not trained.
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
from dataclasses import dataclass
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (registers the operators)
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from kernels_report import BASELINE, Scaling, Setting, Spent, Times, section
from torch import Tensor

from torchrec_compress.ops import BagLookup, IdBags, Span, codebook_bags, lookup_codes, tiers

CODEBOOK_SIZE = 256


@dataclass
class Batch:
    """Ids of all tables, table after table, and offsets, as FBGEMM takes them."""

    ids: Tensor  # (T * B * L,) int64
    offsets: Tensor  # (T * B + 1,) int64
    bag_offsets: Tensor  # (B + 1,) int64, of one table
    grad: Tensor  # (B, T * D)
    short: tuple[Tensor, Tensor]  # ids and offsets as int32

    def table(self, t: int) -> Tensor:
        """Return the ids of table t."""
        num_ids = int(self.bag_offsets[-1])
        return self.ids[t * num_ids : (t + 1) * num_ids]


_HEAP = 8 << 30  # bytes

# by (name, phase)
Pools = dict[tuple[str, str], Callable[[Batch], object]]


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
        made.append(Batch(ids, offsets, offsets[: bags + 1].clone(), grad, (ids.int(), offsets.int())))
    return made


def split_tables(options: argparse.Namespace, dim: int, precision: SparseType) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Return FBGEMM's tables, trained by its fused row-wise Adagrad."""
    spec = (options.rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * options.tables,
        weights_precision=precision,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    for table in tables.split_embedding_weights():
        table.uniform_(-0.1, 0.1)
    return tables


def add_full_tables(found: Pools, options: argparse.Namespace, dim: int) -> None:
    """Add FBGEMM, trained and low-bit, and `F.embedding_bag` over the same rows."""
    for precision, label in ((SparseType.FP32, BASELINE), (SparseType.FP16, "SplitTBE fp16")):
        full = split_tables(options, dim, precision)
        found[label, "forward"] = no_grad(lambda batch, full=full: full(batch.ids, batch.offsets))
        found[label, "step"] = lambda batch, full=full: full(batch.ids, batch.offsets).backward(batch.grad)
        if precision is SparseType.FP32:
            add_embedding_bags(found, full.split_embedding_weights())
    for precision, label in ((SparseType.INT8, "IntNBit int8"), (SparseType.INT4, "IntNBit int4")):
        served = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", options.rows, dim, precision, EmbeddingLocation.HOST)] * options.tables,
            device="cpu",
            output_dtype=SparseType.FP32,
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        served.fill_random_weights()
        found[label, "forward"] = no_grad(lambda batch, served=served: served(*batch.short))


def add_embedding_bags(found: Pools, tables: list[Tensor]) -> None:
    """Add PyTorch's own bags."""

    def bags(batch: Batch, weights: list[Tensor], sparse: bool) -> Tensor:
        parts = [
            F.embedding_bag(
                batch.table(t), weight, batch.bag_offsets, mode="sum", sparse=sparse, include_last_offset=True
            )
            for t, weight in enumerate(weights)
        ]
        return torch.cat(parts, dim=1)

    def step(batch: Batch) -> None:
        weights = [table.detach().requires_grad_() for table in tables]
        bags(batch, weights, True).backward(batch.grad)

    found["F.embedding_bag", "forward"] = no_grad(lambda batch: bags(batch, tables, False))
    found["F.embedding_bag", "step"] = step


@dataclass
class Coded:
    """Tables of codes and their codebooks."""

    codes: list[Tensor]
    books: list[Tensor]
    lookups: list[BagLookup]

    @classmethod
    def of(cls, options: argparse.Namespace, dim: int, num_codes: int) -> Coded:
        """Draw tables."""
        shape = (num_codes * CODEBOOK_SIZE, dim // num_codes)
        tables = range(options.tables)
        codes = [torch.randint(CODEBOOK_SIZE, (options.rows, num_codes), dtype=torch.uint8) for _ in tables]
        books = [(0.1 * torch.randn(shape)).requires_grad_() for _ in tables]
        return cls(codes, books, [BagLookup(t, f"f{t}", f"table 't{t}', feature 'f{t}'") for t in tables])

    def forward(self, batch: Batch) -> Tensor:
        """Pool all tables in one call, as a collection does."""
        num_bags, num_ids = len(batch.bag_offsets) - 1, len(batch.ids) // len(self.codes)
        spans = [Span(t * num_bags, num_bags, t * num_ids, num_ids) for t in range(len(self.codes))]
        none = [None] * len(self.codes)
        return codebook_bags(self.lookups, spans, self.codes, self.books, none, IdBags(batch.ids, batch.offsets))


def add_codebooks(found: Pools, options: argparse.Namespace, dim: int, num_codes: int) -> None:
    """Add the compressed look-up, the gather of codes alone, and what torch.compile makes of plain indexing."""
    coded = Coded.of(options, dim, num_codes)
    optimizer = torch.optim.Adagrad(coded.books, lr=0.01, fused=True)
    is_set = torch.ones(1, dtype=torch.uint8)

    def gather(batch: Batch) -> list[Tensor]:
        return [lookup_codes(table, is_set, batch.table(t), "table") for t, table in enumerate(coded.codes)]

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        coded.forward(batch).backward(batch.grad)
        optimizer.step()

    found[f"codes M={num_codes}", "forward"] = no_grad(coded.forward)
    found[f"codes M={num_codes}", "step"] = step
    found[f"bare gather M={num_codes}", "forward"] = gather
    if not options.inductor:
        return

    def index(codes: list[Tensor], books: list[Tensor], ids: list[Tensor]) -> Tensor:
        starts = torch.arange(num_codes) * CODEBOOK_SIZE
        return torch.cat([b[c[i].long() + starts].flatten(1) for c, b, i in zip(codes, books, ids, strict=True)], dim=1)

    inductor_config.compile_threads = 1  # workers would take a core from what is timed
    compiled = torch.compile(index, dynamic=False)
    tables = range(options.tables)
    found[f"inductor M={num_codes}", "forward"] = no_grad(
        lambda batch: compiled(coded.codes, coded.books, [batch.table(t) for t in tables])
    )


def no_grad(function: Callable[[Batch], object]) -> Callable[[Batch], object]:
    def run(batch: Batch) -> object:
        with torch.no_grad():
            return function(batch)

    return run


def measure(options: argparse.Namespace, dim: int) -> tuple[dict[Setting, Times], Scaling]:
    """Time all settings of one width, whose tables are made once, and what threads gain where D = 128."""
    pools: Pools = {}
    add_full_tables(pools, options, dim)
    for num_codes in options.codes:
        add_codebooks(pools, options, dim, num_codes)
    found = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for distribution in options.ids:
            for length in options.lengths:
                # what inductor makes pools nothing
                used = {key: pool for key, pool in pools.items() if length == 1 or not key[0].startswith("inductor")}
                setting = Setting(threads, distribution, dim, length)
                found[setting] = take_turns(options, used, batches(options, distribution, dim, length))
    return found, gains(options, pools) if dim == 128 and len(options.threads) > 1 else {}


def gains(options: argparse.Namespace, pools: Pools) -> Scaling:
    """Time runs in a row, on one thread and on most threads in turn: how many times faster the latter are."""
    found: Scaling = {}
    for length in options.lengths:
        work = batches(options, "zipf", 128, length)
        for key in (key for key in pools if key[0] == BASELINE or key[0].startswith("codes")):
            for _ in range(5):
                one, most = (_row(pools[key], work, threads) for threads in (1, max(options.threads)))
                found.setdefault((*key, length), []).append(one / most)
    return found


def _row(pool: Callable[[Batch], object], work: list[Batch], threads: int) -> float:
    """Return the seconds of a run, the median of nine after three."""
    torch.set_num_threads(threads)
    walls = []
    for number in range(12):
        start = time.perf_counter()
        made = pool(work[number % len(work)])
        walls.append(time.perf_counter() - start)
        del made
    return statistics.median(walls[3:])


def take_turns(options: argparse.Namespace, pools: Pools, work: list[Batch]) -> Times:
    """Run everything in every round."""
    found: Times = {key: [] for key in pools}
    for number in range(-1, options.rounds):
        for key, pool in pools.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            made = pool(work[number % len(work)])
            spent = Spent(time.thread_time() - cpu, time.perf_counter() - wall)
            if number >= 0:  # the first round builds, allocates and warms up
                found[key].append(spent)
            del made
    return found


def peak(options: argparse.Namespace) -> None:
    """Print the bytes that tables and two training steps take at their peak, for a parent process."""
    before = resident()
    batch = batches(options, "zipf", 128, 10)[0]
    if options.memory == "full":
        full = split_tables(options, 128, SparseType.FP32)
        for _ in range(2):
            full(batch.ids, batch.offsets).backward(batch.grad)
    else:
        coded = Coded.of(options, 128, 16)
        optimizer = torch.optim.Adagrad(coded.books, lr=0.01, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            coded.forward(batch).backward(batch.grad)
            optimizer.step()
    print(resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Return the bytes of memory that this process holds, or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(field + ":")[1].split()[0])


def memory(options: argparse.Namespace) -> str:
    """Return a sentence on the memory of a training step, each measured in a process of its own."""
    sizes = {}
    for kind in ("full", "compressed"):
        command = [sys.executable, __file__, "--memory", kind, "--rows", str(options.rows), "--batch"]
        command += [str(options.batch), "--tables", str(options.tables), "--batches", "1"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sizes[kind] = int(done.stdout.split()[-1]) / 2**20
    return (
        f"Peak memory of tables, batch and training step (D = 128, L = 10): {sizes['full']:,.0f} MiB with {BASELINE}, "
        f"{sizes['compressed']:,.0f} MiB with codes, M = 16."
    )


def page_mode() -> str:
    """Return how the kernel hands out huge pages: always, madvise or never."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else "[unknown]"
    return text[text.index("[") + 1 : text.index("]")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--codes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ids", nargs="+", default=["zipf", "uniform"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inductor", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", choices=["full", "compressed"], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.memory:
        return peak(options)
    load = os.getloadavg()[0]
    # with the two variables set, the first setting would pay for the heap that all others find in place
    torch.zeros(_HEAP, dtype=torch.uint8)
    results: dict[Setting, Times] = {}
    scaling: Scaling = {}
    for dim in options.dims:
        times, gained = measure(options, dim)
        results |= times
        scaling |= gained
    sections = [line for threads in options.threads for line in section(results, scaling, options, threads)]
    serving = next(tier for tier in tiers() if not tier.passed_over)
    text = [
        "# Time of codebook_bags",
        "",
        f"`python benchmarks/kernels.py {' '.join(sys.argv[1:])}`: {options.tables} tables of {options.rows:,} rows,"
        f" batch {options.batch},",
        f"K = {CODEBOOK_SIZE}; medians of {options.rounds} rounds; {serving.detail.split(',')[0]},",
        f"torch {torch.__version__}, {platform.machine()}, huge pages {page_mode()}, "
        + ", ".join(
            f"{name}={os.environ.get(name, 'unset')}" for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
        )
        + f"; load {load:.1f} before,",
        f"{os.getloadavg()[0]:.1f} after. A bare gather takes codes out of the table and does nothing with them.",
        "",
        memory(options),
        "",
        *sections,
    ]
    options.out.write_text("\n".join(text).rstrip() + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
