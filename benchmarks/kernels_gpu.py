"""Time of `codebook_bags` on a GPU beside the uncompressed and low-bit tables it replaces. It has not been run yet.

Run: python benchmarks/kernels_gpu.py      (needs an NVIDIA GPU and FBGEMM's CUDA build; writes kernels_gpu.md)
     python benchmarks/kernels_gpu.py --rows 100000 --lengths 10 --rounds 5 --out /tmp/try.md

All variants of a setting run in turns, each round on another batch; times are from CUDA events, median and quartiles
over the rounds. "Bytes" are those that must move: each id, each row of codes or of the table once per look-up, each
output once; their rate stands beside that of a large copy on the same machine. Codes and ids are uniform, the worst
case for every cache. A step adds the backward: FBGEMM's with its fused row-wise Adagrad, ours with dense Adagrad on the
codebooks.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchrec_compress.ops import BagLookup, IdBags, Span, codebook_bags

CODEBOOK_SIZE = 256
BASELINE = "FBGEMM SplitTBE fp32"


@dataclass
class Batch:
    """Ids of all tables, table after table."""

    ids: Tensor  # (T * B * L,) int64
    offsets: Tensor  # (T * B + 1,) int64
    short: tuple[Tensor, Tensor]  # the same two as int32
    grads: dict[torch.dtype, Tensor]  # (B, T * D) by dtype


@dataclass
class Variant:
    """Something to time, and the bytes that its forward must move."""

    run: Callable[[Batch], object]
    num_bytes: int
    milliseconds: list[float] = field(default_factory=list)


def batches(options: argparse.Namespace, length: int) -> list[Batch]:
    """Return the batches that the rounds take turns with."""
    count, made = options.tables * options.batch * length, []
    for _ in range(options.batches):
        ids = torch.randint(options.rows, (count,), device="cuda")
        offsets = torch.arange(0, count + 1, length, device="cuda")
        grad = torch.randn(options.batch, options.tables * options.dim, device="cuda")
        grads = {torch.float32: grad, torch.bfloat16: grad.bfloat16()}
        made.append(Batch(ids, offsets, (ids.int(), offsets.int()), grads))
    return made


def moved(
    options: argparse.Namespace, length: int, row_bytes: float, index_bytes: int = 8, value_bytes: int = 4
) -> int:
    """Return the bytes that a forward must move; indices and values of the output have the sizes given."""
    bags = options.tables * options.batch
    return int(bags * length * (row_bytes + index_bytes) + bags * (value_bytes * options.dim + index_bytes))


def add_full_tables(found: dict[str, Variant], options: argparse.Namespace, length: int) -> None:
    """Add FBGEMM's trained tables, fp32 and fp16."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    for precision, size in ((SparseType.FP32, 4), (SparseType.FP16, 2)):
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(options.rows, options.dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)] * options.tables,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.01,
            weights_precision=precision,
        )
        tables.init_embedding_weights_uniform(-0.1, 0.1)

        def forward(batch: Batch, tables: torch.nn.Module = tables) -> Tensor:
            return tables(batch.ids, batch.offsets)

        def step(batch: Batch, tables: torch.nn.Module = tables) -> None:
            tables(batch.ids, batch.offsets).backward(batch.grads[torch.float32])

        num_bytes = moved(options, length, size * options.dim)
        found[f"FBGEMM SplitTBE fp{8 * size}, forward"] = Variant(torch.no_grad()(forward), num_bytes)
        found[f"FBGEMM SplitTBE fp{8 * size}, step"] = Variant(step, num_bytes)


def add_low_bit_tables(found: dict[str, Variant], options: argparse.Namespace, length: int) -> None:
    """Add FBGEMM's tables for inference, int8 and int4; their ids are 32 bits wide."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    for precision, bits in ((SparseType.INT8, 8), (SparseType.INT4, 4)):
        spec = ("", options.rows, options.dim, precision, EmbeddingLocation.DEVICE)
        tables = IntNBitTableBatchedEmbeddingBagsCodegen(
            [spec] * options.tables, output_dtype=SparseType.FP32, device=torch.device("cuda")
        )
        tables.fill_random_weights()

        def forward(batch: Batch, tables: torch.nn.Module = tables) -> Tensor:
            return tables(*batch.short)

        num_bytes = moved(options, length, bits / 8 * options.dim + 4, index_bytes=4)
        found[f"FBGEMM IntNBit int{bits}, forward"] = Variant(torch.no_grad()(forward), num_bytes)


def add_codebooks(
    found: dict[str, Variant], options: argparse.Namespace, length: int, tier: str, dtype: torch.dtype
) -> None:
    """Add `codebook_bags` served by one tier."""
    num_codes, shape = options.codes, (options.codes * CODEBOOK_SIZE, options.dim // options.codes)
    codes = [
        torch.randint(CODEBOOK_SIZE, (options.rows, num_codes), dtype=torch.uint8, device="cuda")
        for _ in range(options.tables)
    ]
    books = [(0.1 * torch.randn(shape, device="cuda")).to(dtype).requires_grad_() for _ in codes]
    optimizer = torch.optim.Adagrad(books, lr=0.01)
    lookups = [BagLookup(table, str(table), f"table {table}") for table in range(options.tables)]
    num_ids = options.batch * length
    spans = [Span(t * options.batch, options.batch, t * num_ids, num_ids) for t in range(options.tables)]

    def forward(batch: Batch) -> Tensor:
        os.environ["TORCHREC_COMPRESS_BACKEND"] = tier
        bags = IdBags(batch.ids, batch.offsets)
        return codebook_bags(lookups, spans, codes, books, [None] * options.tables, bags)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        forward(batch).backward(batch.grads[dtype])
        optimizer.step()

    num_bytes = moved(options, length, num_codes, value_bytes=dtype.itemsize)
    name = f"codebook_bags {tier} {str(dtype).removeprefix('torch.')}"
    found[f"{name}, forward"] = Variant(torch.no_grad()(forward), num_bytes)
    found[f"{name}, step"] = Variant(step, num_bytes)


def milliseconds(run: Callable[[], object]) -> float:
    """Return the time that a GPU takes for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    made = run()
    end.record()
    end.synchronize()
    del made
    return start.elapsed_time(end)


def copy_rate() -> float:
    """Return the bytes per second, read and written, of a copy of 2 GiB: the median of 11."""
    source = torch.empty(2**29, device="cuda").normal_()
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(12)][1:]
    return 2 * source.numel() * 4 / (statistics.median(times) / 1000)


def measure(options: argparse.Namespace, length: int, peak: float) -> list[str]:
    """Time one pooling factor and return its rows of the table."""
    found: dict[str, Variant] = {}
    add_full_tables(found, options, length)
    add_low_bit_tables(found, options, length)
    for tier in options.tiers:
        for dtype in (torch.float32, torch.bfloat16):
            add_codebooks(found, options, length, tier, dtype)
    work = batches(options, length)
    for number in range(-2, options.rounds):
        for variant in found.values():
            spent = milliseconds(partial(variant.run, work[number % len(work)]))
            if number >= 0:  # the first rounds compile, allocate and warm up
                variant.milliseconds.append(spent)
    return [row(name, found, length, peak) for name in found]


def row(name: str, found: dict[str, Variant], length: int, peak: float) -> str:
    """Return a variant's line: its time, how many times faster than FBGEMM it is, and its share of the copy rate."""
    label, phase = name.rsplit(", ", 1)
    times = found[name].milliseconds
    ratios = [full / own for full, own in zip(found[f"{BASELINE}, {phase}"].milliseconds, times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = statistics.median(times)
    share = f"{found[name].num_bytes / (middle / 1000) / peak:.0%}" if phase == "forward" else ""
    ratio = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
    return f"| {length} | {phase} | {label} | {1000 * middle:.0f} | {1000 * min(times):.0f} | {ratio} | {share} |"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--codes", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--tiers", nargs="+", default=["cuda", "triton"], choices=["cuda", "triton", "torch"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_gpu: there must be an NVIDIA GPU, got none; benchmarks/kernels.py measures the CPU")
    peak = copy_rate()
    rows = [line for length in options.lengths for line in measure(options, length, peak)]
    text = [
        "# Time of codebook_bags on a GPU",
        "",
        f"`python benchmarks/kernels_gpu.py`: {torch.cuda.get_device_name()}, {options.tables} tables,",
        f"{options.rows:,} rows each, D = {options.dim}, M = {options.codes}, K = {CODEBOOK_SIZE},",
        f"batch {options.batch}, uniform ids,",
        f"{options.rounds} rounds, torch {torch.__version__}; a copy moves {peak / 1e12:.2f} TB/s.",
        "Ratios are medians (quartiles).",
        "",
        "| L | phase | variant | microseconds, median | least | times faster than SplitTBE fp32 | of the copy's rate |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    options.out.write_text("\n".join(text) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
