"""Time look-ups of packed codes beside one code per byte: K = 16, one table of a million rows, one thread.

CPU time, the least of interleaved rounds, of a forward and of a forward with its gradient of codebooks, with codes read
in their table and gathered before (as rows that came from another rank are).

    python benchmarks/packed.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from torchrec_compress.ops import BagLookup, IdBags, Span, codebook_bags, pack_codes

NUM_ROWS, NUM_CODES, SIZE, DIM = 1_000_000, 16, 16, 128


def steps(codes: Tensor, num_packed: int, books: Tensor, length: int, num_bags: int) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed: look-ups of bags of `length` ids, in the table and in gathered codes."""
    seeded = torch.Generator().manual_seed(length)
    ids = torch.randint(0, NUM_ROWS, (num_bags * length,), generator=seeded)
    batch = IdBags(ids, torch.arange(0, len(ids) + 1, length))
    lookups = [BagLookup(0, "item", "table 'item'", num_packed=num_packed)]
    span = Span(0, num_bags, 0, len(ids))
    gathered = codes[ids]
    return {
        "table": lambda: codebook_bags(lookups, [span], [codes], [books], [None], batch),
        "gathered": lambda: codebook_bags(
            lookups, [span._replace(is_gathered=True)], [gathered], [books], [None], batch
        ),
    }


def least(pool: dict[str, Callable[[], Tensor]], books: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the milliseconds of a forward alone and with its gradient, by name."""
    found = dict.fromkeys(pool, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, forward in pool.items():
            with torch.no_grad():
                start = time.process_time()
                out = forward()
                alone = time.process_time() - start
            upstream = torch.ones_like(out)
            start = time.process_time()
            torch.autograd.grad(forward(), books, upstream)
            both = time.process_time() - start
            found[name] = (min(found[name][0], 1e3 * alone), min(found[name][1], 1e3 * both))
    return found


def main() -> None:
    """Print bytes and times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codes = torch.randint(0, SIZE, (NUM_ROWS, NUM_CODES), dtype=torch.uint8)
    packed = pack_codes(codes)
    books = torch.randn(NUM_CODES * SIZE, DIM // NUM_CODES, requires_grad=True)
    print(f"code table: {codes.numel():,} bytes, packed {packed.numel():,}")
    for length, num_bags in ((1, 4096), (10, 4096), (50, 1024)):
        pool = steps(codes, 0, books, length, num_bags)
        pool |= {f"{name}, packed": step for name, step in steps(packed, NUM_CODES, books, length, num_bags).items()}
        for name, (alone, both) in sorted(least(pool, books, rounds).items()):
            print(f"L = {length}, {num_bags} bags, {name}: forward {alone:.3f} ms, with gradient {both:.3f} ms")


if __name__ == "__main__":
    main()
