"""Time of a serving forward with projections, and without: folded into the first layer, or into the codebooks.

Run: python benchmarks/fold.py     (writes fold.md; about two minutes)
     python benchmarks/fold.py --rounds 3 --batches 64 --lengths 1 --out /tmp/try.md

One thread, thread CPU time, no gradients. All variants live in one process and take turns within every round, each on
a batch that is made anew; a ratio is taken within a round, and its median and quartiles over the rounds are told. The
model is a collection of 26 tables, embeddings side by side, and a net of 512, 256 and 1 numbers, the first of which
folds. Tables are untrained, ids zipf(1.05), scattered.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from kernels import draw
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_compress import CompressedEmbeddingBagCollection, fold_into_linear, fold_projections
from torchrec_compress.methods import MethodConfig, NarrowConfig, RandomCodesConfig
from torchrec_compress.ops import tiers

DIM, WIDTH, HIDDEN = 128, 16, (512, 256)
# untrained codes are random ones, whose look-ups take as long as those of any other
STORED: dict[str, MethodConfig] = {
    "narrow, float32": NarrowConfig(width=WIDTH),
    "narrow, int8": NarrowConfig(width=WIDTH, bits=8),
    "2 residual codes": RandomCodesConfig(num_codes=2, structure="residual", width=WIDTH),
    "4 product codes": RandomCodesConfig(num_codes=4, width=WIDTH),
}
FOLDS = ("into the layer", "into codebooks")


class Model(nn.Module):
    """Embeddings side by side, and a net."""

    def __init__(self, embeddings: nn.Module, first: nn.Linear) -> None:
        super().__init__()
        self.embeddings, self.first = embeddings, first
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(*HIDDEN), nn.ReLU(), nn.Linear(HIDDEN[1], 1))

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        """Return logits, (B, 1)."""
        return self.rest(self.first(self.embeddings(batch).values()))


def variants(options: argparse.Namespace, method: MethodConfig) -> dict[str, Model]:
    """Return the models of one kind of tables: projected, and folded in the ways that there are."""
    tables = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=options.rows, embedding_dim=DIM, feature_names=[f"f{i}"])
        for i in range(options.tables)
    ]
    source = CompressedEmbeddingBagCollection(tables, compression=method)
    first = nn.Linear(options.tables * DIM, HIDDEN[0])
    found = {"": Model(source, first), FOLDS[0]: Model(*fold_into_linear(source, first))}
    if method.codewords:
        found[FOLDS[1]] = Model(fold_projections(source), first)
    for model in found.values():
        model.rest = found[""].rest
    return {name: model.eval() for name, model in found.items()}


@torch.no_grad()
def measure(
    options: argparse.Namespace, models: dict[str, Model], batch_size: int, length: int
) -> dict[str, list[float]]:
    """Return the seconds of every round by variant."""
    generator = torch.Generator().manual_seed(batch_size + length)
    keys, bags = [f"f{i}" for i in range(options.tables)], options.tables * batch_size
    ids = [draw("zipf", options.rows, bags * length, generator) for _ in range(4)]
    found: dict[str, list[float]] = {name: [] for name in models}
    expected: Tensor | None = None
    for number in range(-2, options.rounds):
        for name, model in models.items():
            batch = KeyedJaggedTensor.from_lengths_sync(keys, ids[number % 4], torch.full((bags,), length))
            start = time.thread_time()
            out = model(batch)
            spent = time.thread_time() - start
            if number >= 0:  # the first rounds allocate and warm up
                found[name].append(spent)
            elif name == "":
                expected = out
            else:  # what is timed is the same model
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    return found


def cells(times: dict[str, list[float]]) -> list[str]:
    """Return milliseconds with projections, and how many times as fast each fold is."""
    made = [f"{statistics.median(times['']) * 1e3:.1f}"]
    for name in FOLDS:
        if name not in times:
            made.append("")
            continue
        ratios = [one / other for one, other in zip(times[""], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        made.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
    return made


def report(options: argparse.Namespace, lines: list[str], load: float) -> str:
    """Return the table in Markdown; `lines` are its rows."""
    serving = next(tier for tier in tiers() if not tier.passed_over)
    return "\n".join(
        [
            "# Folded projections",
            "",
            f"`python benchmarks/fold.py`: {options.tables} tables of {options.rows:,} rows, D = {DIM}, r = {WIDTH}, "
            "K = 256, one thread;",
            f"medians of {options.rounds} rounds, quartiles in brackets; {serving.detail.split(',')[0]}, "
            f"torch {torch.__version__}; load {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
            f"The whole forward of a model whose first layer reads {options.tables} x {DIM} numbers and gives "
            f"{HIDDEN[0]}: milliseconds with projections,",
            "and how many times as fast it is with them folded.",
            "",
            "| tables | batch | ids a bag | ms | " + " | ".join(FOLDS) + " |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, lines = os.getloadavg()[0], []
    for stored, method in STORED.items():
        models = variants(options, method)
        for batch_size in options.batches:
            for length in options.lengths:
                found = cells(measure(options, models, batch_size, length))
                lines.append("| " + " | ".join([stored, str(batch_size), str(length), *found]) + " |")
    options.out.write_text(report(options, lines, load))


if __name__ == "__main__":
    main()
