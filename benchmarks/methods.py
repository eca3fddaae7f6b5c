"""Time of a look-up and of a training step, method by method, against TorchRec's own tables.

Run: python benchmarks/methods.py        (CPU, one thread; writes methods.md beside this file)

Four tables of 200,000 rows x 64, batches of 2,048 bags, Zipf(1.05) ids. All methods live in one process and take turns
batch by batch, so that a busy machine slows all of them; ratios are medians of the ratios of neighbours, with the 10th
and the 90th percentile. A step is forward, backward and SGD: fused in FBGEMM's kernel for the dense tables (TorchRec's
FusedEmbeddingBagCollection, and narrow rows in one like it), plain for codebooks, projections, shared rows and the
queries of dpq; frozen codes and rows take none. A step of cafe and of cce ends with `after_step`, here without a
clustering.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from torchrec_compress import CompressedEmbeddingBagCollection, after_step, compress
from torchrec_compress.methods import (
    BlocksConfig,
    CafeConfig,
    CceConfig,
    DPQConfig,
    HashConfig,
    HashEmbeddingsConfig,
    Int4Config,
    Int8Config,
    MEmComConfig,
    MemRecConfig,
    MethodConfig,
    NarrowConfig,
    PQConfig,
    QRConfig,
    RandomCodesConfig,
    RobeConfig,
)

NUM_TABLES, NUM_ROWS, WIDTH, BATCH = 4, 200_000, 64, 2048
METHODS: dict[str, MethodConfig] = {
    "codes, M = 8 (mec, pq, quantile, random)": RandomCodesConfig(num_codes=8),
    "codes, M = 16": RandomCodesConfig(num_codes=16),
    "dpq in training, M = 8": DPQConfig(num_codes=8),
    "residual codes, M = 4": RandomCodesConfig(num_codes=4, structure="residual"),
    "tiers, M = 4, 10,000 int4 rows": PQConfig(num_codes=4, num_hot_rows=10_000, hot_dtype="int4", popularity="count"),
    "memcom, 4,000 buckets": MEmComConfig(num_buckets=4000),
    "hash, 4,000 buckets": HashConfig(num_buckets=4000),
    "qr, sums of two": QRConfig(num_buckets=2000, partition="remainders"),
    "qr, two side by side": QRConfig(num_buckets=4000, partition="remainders", op="concat"),
    "qr, products of two": QRConfig(num_buckets=2000, partition="remainders", op="mult"),
    "hash embeddings, 4,000 vectors, two hashes": HashEmbeddingsConfig(num_buckets=4000),
    "memrec, 4,000 tokens, two hashes": MemRecConfig(num_tokens=4000),
    "robe, blocks of 32": RobeConfig(num_blocks=32_000, block_size=32),
    "robe, signed blocks of 32": RobeConfig(num_blocks=32_000, block_size=32, signs=True),
    "cafe, 2,000 hot rows, 1,600 cold": CafeConfig(num_hot_rows=2000, num_cold_rows=1600),
    "cce, M = 4": CceConfig(num_codes=4),
    "narrow, 16 numbers": NarrowConfig(width=16),
    "blocks of 64, 32 and 16 numbers, ids sorted": BlocksConfig(order="ids"),
    "blocks of 64, 32 and 16 numbers": BlocksConfig(),
    "int8": Int8Config(),
    "int4": Int4Config(),
}


def tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=NUM_ROWS, embedding_dim=WIDTH, feature_names=[f"t{i}"])
        for i in range(NUM_TABLES)
    ]


def collections(steps: list[KeyedJaggedTensor]) -> dict[str, nn.Module]:
    """Return every collection; those that need a pre-trained table are fitted to the dense one."""
    dense = EmbeddingBagCollection(tables=tables())
    counts = {
        f"t{i}": sum(torch.bincount(batch[f"t{i}"].values(), minlength=NUM_ROWS) for batch in steps)
        for i in range(NUM_TABLES)
    }
    fused = FusedEmbeddingBagCollection(tables(), torch.optim.SGD, {"lr": 0.01})
    made: dict[str, nn.Module] = {"dense, fused": fused}
    for name, config in METHODS.items():
        fitted = config.method in ("pq", "int8", "int4")
        made[name] = (
            compress(dense, config, counts=counts)
            if fitted
            else CompressedEmbeddingBagCollection(tables(), compression=config)
        )
        if config.method in ("blocks", "narrow"):
            _fuse(made[name])
    return made


def _fuse(module: Any) -> None:
    """Put TorchRec's fused tables in the place of the stock ones, as sharding does."""
    stock = module.bags.native
    fused = FusedEmbeddingBagCollection(stock.embedding_bag_configs(), torch.optim.SGD, {"lr": 0.01})
    fused.load_state_dict(stock.state_dict())
    module.bags.native = fused


def draw(pooling_factor: int, step: int) -> KeyedJaggedTensor:
    seeded = torch.Generator().manual_seed(step)
    shares = torch.arange(1, NUM_ROWS + 1, dtype=torch.float64).pow(-1.05)
    shuffled = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    count = NUM_TABLES * BATCH * pooling_factor
    ids = shuffled[torch.multinomial(shares, count, replacement=True, generator=seeded)]
    lengths = torch.full((NUM_TABLES * BATCH,), pooling_factor)
    return KeyedJaggedTensor.from_lengths_sync([f"t{i}" for i in range(NUM_TABLES)], ids, lengths)


def look_up(module: nn.Module, batch: KeyedJaggedTensor) -> None:
    with torch.no_grad():
        module(batch).values()


def train(module: nn.Module, batch: KeyedJaggedTensor) -> None:
    out = module(batch).values()
    if out.requires_grad:
        out.sum().backward()
    parameters = [] if isinstance(module, FusedEmbeddingBagCollection) else list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    after_step(module, 0, optimizer)


def milliseconds(
    run: Callable[[nn.Module, KeyedJaggedTensor], None], module: nn.Module, batch: KeyedJaggedTensor
) -> float:
    start = time.perf_counter()
    run(module, batch)
    return 1000 * (time.perf_counter() - start)


def measure(pooling_factor: int, rounds: int) -> list[str]:
    """Return the table's lines for one pooling factor."""
    batches = [draw(pooling_factor, step) for step in range(rounds + 1)]
    made = collections(batches)
    times = {kind: {name: [] for name in made} for kind in ("look-up", "step")}
    for number, batch in enumerate(batches):
        for kind, run in (("look-up", look_up), ("step", train)):
            for name, module in made.items():
                spent = milliseconds(run, module, batch)
                if number:  # the first round sets things up
                    times[kind][name].append(spent)
    first = next(iter(made))
    lines = []
    for name, module in made.items():
        cells = []
        for kind in ("look-up", "step"):
            ratios = [ours / theirs for ours, theirs in zip(times[kind][name], times[kind][first], strict=True)]
            tenths = statistics.quantiles(ratios, n=10, method="inclusive")
            cells.append(f"{statistics.median(times[kind][name]):.2f}")
            cells.append(f"{statistics.median(ratios):.2f} ({tenths[0]:.2f}..{tenths[-1]:.2f})")
        size = module.footprint().ratio if isinstance(module, CompressedEmbeddingBagCollection) else 1.0
        lines.append(f"| {pooling_factor} | {name} | {size:.1f}x | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pooling-factors", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for factor in given.pooling_factors for line in measure(factor, given.rounds)]
    text = "\n".join(
        [
            "# Speed of the methods\n",
            f"`python benchmarks/methods.py`: {__doc__.split(chr(10) * 2)[2].strip()}\n",  # type: ignore[union-attr]
            f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}.\n",
            "| pooling factor | method | smaller | look-up ms | look-up, dense = 1 | step ms | step, dense = 1 |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ]
    )
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
