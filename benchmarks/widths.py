"""Time of `codebook_bags` of rows of few numbers beside rows of 64: what a `width` of codes gains.

Run: python benchmarks/widths.py     (writes widths.md; some minutes)
     python benchmarks/widths.py --rounds 3 --codes 2 --lengths 10 --out /tmp/try.md

One thread, thread CPU time. All widths of a setting take turns in one process, on the same codes, ids and bags; the
least of the rounds is told. "step" adds the backward to the codebooks, without an optimizer. Codes are random, ids
zipf.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from kernels import draw

from torchrec_compress.ops import BagLookup, IdBags, Span, codebook_bags, tiers
from torchrec_compress.ops.types import Structure

WIDTHS = (8, 16, 32, 64)
CODEBOOK_SIZE = 256


def pools(
    options: argparse.Namespace, structure: Structure, num_codes: int, length: int
) -> dict[tuple[int, str], float]:
    """Return nanoseconds per look-up by width and phase, "forward" or "step"."""
    generator, tables = torch.Generator().manual_seed(0), range(options.tables)
    shape = (options.rows, num_codes)
    codes = [torch.randint(CODEBOOK_SIZE, shape, dtype=torch.uint8, generator=generator) for _ in tables]
    num_ids = options.tables * options.batch * length
    batches = [draw("zipf", options.rows, num_ids, generator) for _ in range(2)]
    offsets = torch.arange(0, num_ids + 1, length)
    spans = [Span(t * options.batch, options.batch, t * options.batch * length, options.batch * length) for t in tables]
    lookups = [BagLookup(t, f"f{t}", f"table 't{t}', feature 'f{t}'", structure) for t in tables]
    books = {
        width: [
            torch.randn(
                num_codes * CODEBOOK_SIZE, width // num_codes if structure == "product" else width, generator=generator
            ).requires_grad_()
            for _ in tables
        ]
        for width in WIDTHS
    }
    grads = {width: torch.randn(options.batch, options.tables * width, generator=generator) for width in WIDTHS}
    found = {(width, phase): float("inf") for width in WIDTHS for phase in ("forward", "step")}
    for number in range(options.rounds):
        batch = IdBags(batches[number % 2], offsets)
        for width, phase in found:
            started = time.thread_time()
            with torch.set_grad_enabled(phase == "step"):
                out = codebook_bags(lookups, spans, codes, books[width], [None] * options.tables, batch)
                if phase == "step":
                    out.backward(grads[width])
            spent = (time.thread_time() - started) / num_ids * 1e9
            found[width, phase] = min(found[width, phase], spent)
    return found


def report(options: argparse.Namespace, found: dict[tuple[str, str], list[str]]) -> str:
    """Return the tables in Markdown; `found` are their lines."""
    serving = next(tier.name for tier in tiers() if not tier.passed_over)
    lines = [
        "# Codes of few numbers",
        "",
        f"`python benchmarks/widths.py`: ns a look-up, {options.tables} tables of {options.rows:,} rows, K = 256, "
        f"{options.batch} bags, one thread, least of {options.rounds} rounds. Serves: {serving}.",
    ]
    for structure in options.structures:
        for phase in ("forward", "step"):
            columns = " | ".join(str(width) for width in WIDTHS)
            lines += ["", f"## {structure}, {phase}", "", f"| M | ids a bag | {columns} | 64 over 16 |"]
            lines += ["|---|---|" + "---|" * (len(WIDTHS) + 1)]
            lines += found[structure, phase]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--codes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--structures", nargs="+", default=["residual", "product"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[str]] = {
        (structure, phase): [] for structure in options.structures for phase in ("forward", "step")
    }
    for structure in options.structures:
        for num_codes in options.codes:
            for length in options.lengths:
                times = pools(options, structure, num_codes, length)
                for phase in ("forward", "step"):
                    mine = [times[width, phase] for width in WIDTHS]
                    cells = [num_codes, length, *(f"{value:.1f}" for value in mine), f"{mine[3] / mine[1]:.2f}"]
                    found[structure, phase].append("| " + " | ".join(map(str, cells)) + " |")
    options.out.write_text(report(options, found))


if __name__ == "__main__":
    main()
