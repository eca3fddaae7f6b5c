"""Time of unpooled look-ups of codes: a call of the kernels for each look-up, against shared calls.

Run: python benchmarks/unpooled.py        (CPU, one thread; prints a table)

Eight tables of 200,000 rows x 64 with 8 codes each, uniform ids, 10 per example. All variants live in one process, are
the same collection, and take turns batch by batch; times are CPU time, the least over the rounds and the median. A step
is forward and backward, with a gradient of its own for every look-up. "One call" is never split; what is shipped splits
where the outputs of a call pass 8 MiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch import Tensor
from torchrec import EmbeddingConfig, KeyedJaggedTensor

from torchrec_compress import CompressedEmbeddingCollection
from torchrec_compress.methods import RandomCodesConfig
from torchrec_compress.modules import codes

NUM_TABLES, NUM_ROWS, WIDTH, POOLING = 8, 200_000, 64, 10
NAMES = [f"t{i}" for i in range(NUM_TABLES)]
# values that look-ups may share a call for
VARIANTS = {"a call each": 1, "shared calls": codes._CALL_VALUES, "one call": 2**62}


def draw(batch_size: int, step: int) -> KeyedJaggedTensor:
    ids = torch.randint(
        0, NUM_ROWS, (NUM_TABLES * batch_size * POOLING,), generator=torch.Generator().manual_seed(step)
    )
    return KeyedJaggedTensor.from_lengths_sync(NAMES, ids, torch.full((NUM_TABLES * batch_size,), POOLING))


def milliseconds(
    collection: CompressedEmbeddingCollection, batch: KeyedJaggedTensor, upstream: list[Tensor]
) -> tuple[float, float]:
    """Return the CPU time of a forward, and of a forward and a backward."""
    start = time.process_time()
    found = collection(batch)
    middle = time.process_time()
    torch.autograd.backward([found[name].values() for name in NAMES], upstream)
    end = time.process_time()
    for parameter in collection.parameters():
        parameter.grad = None
    return 1000 * (middle - start), 1000 * (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256, 2048])
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tables = [
        EmbeddingConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=WIDTH, feature_names=[name]) for name in NAMES
    ]
    collection = CompressedEmbeddingCollection(tables, compression=RandomCodesConfig(num_codes=8))
    print(f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}.\n")
    print("| batch size | calls | forward ms, least / median | step ms, least / median |\n|---|---|---|---|")
    for batch_size in given.batch_sizes:
        upstream = [torch.randn(batch_size * POOLING, WIDTH) for _ in NAMES]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
        for step in range(given.rounds + 1):
            batch = draw(batch_size, step)
            for name, values in VARIANTS.items():
                codes._CALL_VALUES = values
                spent = milliseconds(collection, batch, upstream)
                if step:  # the first round sets things up
                    times[name].append(spent)
        for name, spent in times.items():
            cells = [f"{min(column):.2f} / {statistics.median(column):.2f}" for column in zip(*spent, strict=True)]
            print(f"| {batch_size} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
