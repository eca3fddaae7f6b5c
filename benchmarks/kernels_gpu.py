"""Time of `codebook_bags` on a GPU beside the uncompressed and low-bit tables it replaces. Not yet run on one.

Run: python benchmarks/kernels_gpu.py      (needs an NVIDIA GPU and FBGEMM's CUDA build; writes kernels_gpu.md)
     python benchmarks/kernels_gpu.py --rows 100000 --lengths 10 --rounds 5 --out /tmp/try.md
     python benchmarks/kernels_gpu.py --device cpu --rows 100 --tables 2 --batch 8 --rounds 3    (tries the script)

All variants of a setting run in turns, each round on another batch. "GPU" is the time between two CUDA events around
one call, with the GPU kept busy before so that the host is ahead: the kernels alone, as in a training whose GPU is the
bottleneck. "Call" is the time from an idle GPU to the end of the work, with the host's part. Medians over the rounds.
"Bytes" are those that must move: each id, each row of codes or of the table once per look-up, each output once; their
rate stands beside that of a large copy on the same machine. Codes and ids are uniform, the worst case for every cache.
A step adds the backward: FBGEMM's with its fused row-wise Adagrad, ours with dense Adagrad on the codebooks. "staged"
and "direct" force what codebooks are read from, shared memory or the caches, where the choice is otherwise a model's.

Results of the tiers are compared with plain PyTorch before anything is timed. Every pooling factor is written when it
is done; those that would start after --minutes are left out, and the file says so.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from kernels_gpu_report import Found, Variant, report
from torch import Tensor

from torchrec_compress.ops import BagLookup, IdBags, Span, codebook_bags
from torchrec_compress.ops.gpu import plan
from torchrec_compress.ops.gpu.program import CannotCompile

CODEBOOK_SIZE = 256
# cycles that the GPU waits before a timed call, some 6 ms: longer than the host takes to prepare any of them
_HEAD_START = 10_000_000


@dataclass
class Batch:
    """Ids of all tables, table after table."""

    ids: Tensor  # (T * B * L,) int64
    offsets: Tensor  # (T * B + 1,) int64
    short: tuple[Tensor, Tensor]  # the same two as int32
    grads: dict[torch.dtype, Tensor]  # (B, T * D) by dtype


def batches(options: argparse.Namespace, length: int) -> list[Batch]:
    """Return the batches that the rounds take turns with."""
    count, made = options.tables * options.batch * length, []
    for _ in range(options.batches):
        ids = torch.randint(options.rows, (count,), device=options.device)
        offsets = torch.arange(0, count + 1, length, device=options.device)
        grad = torch.randn(options.batch, options.tables * options.dim, device=options.device)
        grads = {torch.float32: grad, torch.bfloat16: grad.bfloat16()}
        made.append(Batch(ids, offsets, (ids.int(), offsets.int()), grads))
    return made


def moved(
    options: argparse.Namespace, length: int, row_bytes: float, index_bytes: int = 8, value_bytes: int = 4
) -> int:
    """Return the bytes that a forward must move; indices and values of the output have the sizes given."""
    bags = options.tables * options.batch
    return int(bags * length * (row_bytes + index_bytes) + bags * (value_bytes * options.dim + index_bytes))


def add_full_tables(found: Found, options: argparse.Namespace, length: int, bits: int) -> None:
    """Add FBGEMM's trained tables, fp32 or fp16."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    is_gpu = options.device == "cuda"
    place = EmbeddingLocation.DEVICE if is_gpu else EmbeddingLocation.HOST
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(options.rows, options.dim, place, ComputeDevice.CUDA if is_gpu else ComputeDevice.CPU)] * options.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        weights_precision=SparseType.FP32 if bits == 32 else SparseType.FP16,
        device=torch.device(options.device),
    )
    tables.init_embedding_weights_uniform(-0.1, 0.1)

    def forward(batch: Batch) -> Tensor:
        return tables(batch.ids, batch.offsets)

    def step(batch: Batch) -> None:
        forward(batch).backward(batch.grads[torch.float32])

    num_bytes = moved(options, length, bits / 8 * options.dim)
    found.variants[f"FBGEMM SplitTBE fp{bits}", "forward"] = Variant(torch.no_grad()(forward), num_bytes)
    found.variants[f"FBGEMM SplitTBE fp{bits}", "step"] = Variant(step, num_bytes)


def add_low_bit_tables(found: Found, options: argparse.Namespace, length: int, bits: int) -> None:
    """Add FBGEMM's tables for inference, int8 or int4; their ids are 32 bits wide."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    place = EmbeddingLocation.DEVICE if options.device == "cuda" else EmbeddingLocation.HOST
    precision = SparseType.INT8 if bits == 8 else SparseType.INT4
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("", options.rows, options.dim, precision, place)] * options.tables,
        output_dtype=SparseType.FP32,
        device=torch.device(options.device),
    )
    tables.fill_random_weights()

    def forward(batch: Batch) -> Tensor:
        return tables(*batch.short)

    num_bytes = moved(options, length, bits / 8 * options.dim + 4, index_bytes=4)
    found.variants[f"FBGEMM IntNBit int{bits}", "forward"] = Variant(torch.no_grad()(forward), num_bytes)


@contextlib.contextmanager
def served_by(tier: str) -> Iterator[None]:
    """Have `codebook_bags` served by "cuda", "triton" or "torch", or by "staged" or "direct" kernels of "cuda"."""
    visits = {"staged": 0.0, "direct": math.inf}.get(tier)
    before = plan.STAGING_VISITS, os.environ.get("TORCHREC_COMPRESS_BACKEND", "auto")
    plan.STAGING_VISITS = before[0] if visits is None else visits
    os.environ["TORCHREC_COMPRESS_BACKEND"] = tier if visits is None else "cuda"
    try:
        yield
    finally:
        plan.STAGING_VISITS, os.environ["TORCHREC_COMPRESS_BACKEND"] = before


class Codes:
    """Code tables and codebooks of all tables, and their look-up."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        self.options = options
        shape = options.codes * CODEBOOK_SIZE, options.dim // options.codes
        self.codes = [
            torch.randint(CODEBOOK_SIZE, (options.rows, options.codes), dtype=torch.uint8, device=options.device)
            for _ in range(options.tables)
        ]
        self.books = [(0.1 * torch.randn(shape, device=options.device)).to(dtype).requires_grad_() for _ in self.codes]
        self.optimizer = torch.optim.Adagrad(self.books, lr=0.01)
        self.lookups = [BagLookup(table, str(table), f"table {table}") for table in range(options.tables)]

    def forward(self, batch: Batch, length: int, tier: str) -> Tensor:
        size = self.options.batch
        spans = [Span(t * size, size, t * size * length, size * length) for t in range(self.options.tables)]
        with served_by(tier):
            bags = IdBags(batch.ids, batch.offsets)
            return codebook_bags(self.lookups, spans, self.codes, self.books, [None] * len(spans), bags)

    def step(self, batch: Batch, length: int, tier: str) -> None:
        self.optimizer.zero_grad()
        self.forward(batch, length, tier).backward(batch.grads[self.books[0].dtype])
        self.optimizer.step()


def add_codebooks(found: Found, codes: Codes, length: int, tier: str, batch: Batch) -> None:
    """Add `codebook_bags` served by one tier, once its results are right."""
    verify(codes, batch, length, tier)
    dtype = codes.books[0].dtype
    num_bytes = moved(codes.options, length, codes.options.codes, value_bytes=dtype.itemsize)
    name = f"codebook_bags {tier} {str(dtype).removeprefix('torch.')}"
    forward = torch.no_grad()(partial(codes.forward, length=length, tier=tier))
    found.variants[name, "forward"] = Variant(forward, num_bytes)
    if tier not in ("staged", "direct"):  # the forward alone differs
        found.variants[name, "step"] = Variant(partial(codes.step, length=length, tier=tier), num_bytes)


def verify(codes: Codes, batch: Batch, length: int, tier: str) -> None:
    """Raise RuntimeError where a tier's values or gradients are not those of plain PyTorch in float32."""
    own, results = codes.books, []
    dtype = own[0].dtype
    try:
        for each in ("torch", tier):
            codes.books = [
                (books.detach().float() if each == "torch" else books.detach().clone()).requires_grad_()
                for books in own
            ]
            out = codes.forward(batch, length, each)
            out.backward(batch.grads[dtype].to(out.dtype))
            results.append([out.detach(), *(books.grad for books in codes.books)])
    finally:
        codes.books = own
    tolerance = 1e-3 if dtype == torch.float32 else 0.02
    for number, (expected, got) in enumerate(zip(*results, strict=True)):
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        if not error < tolerance:
            what = f"the gradient of table {number - 1}" if number else "the output"
            raise RuntimeError(f"wrong result: {what} must be within {tolerance} of plain PyTorch's, got {error:.1e}")


def synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def gpu_milliseconds(options: argparse.Namespace, run: Callable[[], object]) -> float:
    """Return the time that a GPU takes for it, without waiting for the host."""
    if options.device != "cuda":
        return call_milliseconds(options, run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    made = run()
    end.record()
    end.synchronize()
    del made
    return start.elapsed_time(end)


def call_milliseconds(options: argparse.Namespace, run: Callable[[], object]) -> float:
    """Return the time from an idle device to the end of the work."""
    synchronize(options)
    start = time.perf_counter()
    made = run()
    synchronize(options)
    spent = 1000 * (time.perf_counter() - start)
    del made
    return spent


def peak_bytes(options: argparse.Namespace, run: Callable[[], object]) -> int:
    """Return the most bytes that it allocates beyond those before."""
    if options.device != "cuda":
        run()
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(options: argparse.Namespace) -> float:
    """Return the bytes per second, read and written, of a copy of 2 GiB (of 1 MiB on a CPU): the median of 11."""
    source = torch.ones(2**29 if options.device == "cuda" else 2**18, device=options.device)
    target = torch.empty_like(source)
    times = [gpu_milliseconds(options, lambda: target.copy_(source)) for _ in range(12)][1:]
    return 2 * source.numel() * 4 / (statistics.median(times) / 1000)


def failures() -> tuple[type[Exception], ...]:
    """Return what may keep one variant, but no other, from being measured."""
    found: tuple[type[Exception], ...] = (ImportError, RuntimeError, OSError, ValueError, CannotCompile)
    with contextlib.suppress(ImportError):
        from triton.errors import TritonError  # pyright: ignore

        found += (TritonError,)
    return found


def prepare(options: argparse.Namespace, length: int, work: list[Batch]) -> Found:
    """Return the variants of a pooling factor, run once; what fails is left out with its reason."""
    found = Found()
    adding: dict[str, Callable[[], None]] = {}
    for bits in (32, 16):
        adding[f"FBGEMM SplitTBE fp{bits}"] = partial(add_full_tables, found, options, length, bits)
    for bits in (8, 4):
        adding[f"FBGEMM IntNBit int{bits}"] = partial(add_low_bit_tables, found, options, length, bits)
    for dtype in (torch.float32, torch.bfloat16):
        codes = Codes(options, dtype)
        for tier in options.tiers:
            adding[f"codebook_bags {tier} {str(dtype).removeprefix('torch.')}"] = partial(
                add_codebooks, found, codes, length, tier, work[0]
            )
    for name, add in adding.items():
        try:
            add()
            for phase in ("forward", "step"):
                if (name, phase) in found.variants:
                    found.variants[name, phase].run(work[0])  # compiles
                    variant = found.variants[name, phase]
                    variant.peak = peak_bytes(options, partial(variant.run, work[0]))
        except failures() as error:
            found.missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for phase in ("forward", "step"):
                found.variants.pop((name, phase), None)
    return found


def measure(options: argparse.Namespace, length: int) -> Found:
    """Time one pooling factor."""
    work = batches(options, length)
    found = prepare(options, length, work)
    for number in range(options.rounds):
        batch = work[number % len(work)]
        for variant in found.variants.values():
            variant.gpu.append(gpu_milliseconds(options, partial(variant.run, batch)))
        for variant in found.variants.values():
            variant.call.append(call_milliseconds(options, partial(variant.run, batch)))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: try the script, write nothing")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--codes", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    names = ["cuda", "staged", "direct", "triton", "torch"]
    parser.add_argument("--tiers", nargs="+", default=names[:-1], choices=names)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further pooling factor after this time")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--out", type=Path, help="default: kernels_gpu.md beside the script; on a CPU none")
    options = parser.parse_args(arguments)
    options.size = CODEBOOK_SIZE
    options.command = " ".join(
        ["python benchmarks/kernels_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    if options.out is None and options.device == "cuda":
        options.out = Path(__file__).with_suffix(".md")
    return options


def main() -> None:
    began, options = time.monotonic(), parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("kernels_gpu: there must be an NVIDIA GPU, got none; benchmarks/kernels.py measures the CPU")
    peak, results, text = copy_rate(options), {}, ""
    for length in options.lengths:
        if results and time.monotonic() - began > 60 * options.minutes:
            break
        results[length] = measure(options, length)
        text = report(options, results, peak)
        if options.out is not None:
            options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
