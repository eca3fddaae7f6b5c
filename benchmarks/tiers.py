"""Time of `codebook_bags` on each of a CPU's tiers: C++ kernels, FBGEMM, plain PyTorch.

Run: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python benchmarks/tiers.py

All tiers run in one process and on one thread, in another order and on another batch each round. The clock is the
process's CPU time, and the least of all rounds is printed, in ns per look-up. "step" is forward and backward, without
an optimizer.
"""

from __future__ import annotations

import argparse
import os
import random
import time

import torch
from kernels import Batch, Coded, batches

TIERS = ("cpp", "fbgemm", "torch")


def seconds(coded: Coded, batch: Batch, tier: str, phase: str) -> float:
    """Return the CPU time of one call."""
    os.environ["TORCHREC_COMPRESS_BACKEND"] = tier
    start = time.process_time()
    if phase == "step":
        coded.forward(batch).backward(batch.grad)
    else:
        with torch.no_grad():
            coded.forward(batch)
    spent = time.process_time() - start
    for books in coded.books:
        books.grad = None
    return spent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--codes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ids", choices=["zipf", "uniform"], default="zipf")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--batches", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    generator = random.Random(0)
    print("| phase | M | L | " + " | ".join(TIERS) + " |", "|---" * (3 + len(TIERS)) + "|", sep="\n")
    for num_codes in options.codes:
        coded = Coded.of(options, options.dim, num_codes)
        for length in options.lengths:
            work = batches(options, options.ids, options.dim, length)
            keys = [(phase, tier) for phase in ("forward", "step") for tier in TIERS]
            least = dict.fromkeys(keys, float("inf"))
            for number in range(-1, options.rounds):
                # in another order each round: what ran before leaves its data in the caches
                for phase, tier in generator.sample(keys, len(keys)):
                    spent = seconds(coded, work[number % len(work)], tier, phase)
                    if number >= 0:  # the first round builds, allocates and warms up
                        least[phase, tier] = min(least[phase, tier], spent)
            lookups = options.tables * options.batch * length
            for phase in ("forward", "step"):
                cells = [f"{1e9 * least[phase, tier] / lookups:.1f}" for tier in TIERS]
                print(f"| {phase} | {num_codes} | {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
