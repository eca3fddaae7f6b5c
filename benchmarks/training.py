"""Examples per second of launched trainings on 1, 2 and 4 ranks, and what planning, saving and resuming take.

Run: python benchmarks/training.py        (torchrun processes on this machine; writes training.md beside this file)

A DLRM over Criteo's shape (26 tables, 13 dense columns) from the embedded generator, trained by the trainer that
`torchrec-compress train` uses: TorchRec's planner, DistributedModelParallel, its pipelines, row-wise Adagrad in the
backward, Adam for the rest. All variants live in the same processes and take turns, five steps at a time, so that a
busy machine slows all of them; the ratios are of neighbouring turns. The global batch is the same for any number of
ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchrec import EmbeddingBagCollection

from torchrec_compress import CompressedEmbeddingBagCollection, optimizer_bytes
from torchrec_compress.compression import parse
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.data.batch import Batch, Share
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.journal import versions
from torchrec_compress.train.machine import prepare
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import Ranks, gather, start, stop
from torchrec_compress.train.stages import open_checked

_VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    # codes as MEC and PQ have them; which codes does not matter for speed
    "codes, M = 8 (MEC, PQ)": {"*": {"method": "random", "num_codes": 8, "codebook_size": 256}},
    "MEmCom, 20x fewer rows": {"*": {"method": "memcom", "num_buckets": 5000}},
}
_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=100_000, help="most rows of a table")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096, help="global")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--result", type=Path, help="where a rank writes; set by this program")
    arguments = parser.parse_args()
    if arguments.result is not None:
        work(arguments)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.worlds:
            path = Path(folder) / f"{world}.json"
            command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(world), __file__, *sys.argv[1:], "--result", str(path)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[world] = json.loads(path.read_text())
    text = report(arguments, found)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


def work(arguments: argparse.Namespace) -> None:
    """Measure all variants on this rank; rank 0 writes."""
    prepare(1)
    config = override(
        RunConfig(),
        {
            "data.generator": {"num_rows": 40 * arguments.batch, "criteo_rows": arguments.rows},
            "model": {"name": "dlrm", "embedding_dim": arguments.width, "hidden": [256, 128]},
            "retrain.batch_size": arguments.batch,
            "parallel.device": "cpu",
        },
    )
    ranks = start(config.parallel)
    data = open_checked(config.data, ranks)
    made = {name: _make(config, data, compression, ranks) for name, compression in _VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(arguments.rounds + 1):
        for name, (trainable, _) in made.items():
            seconds = _turn(trainable, data, config, turn)
            if turn:  # the first builds kernels and buffers
                times[name].append(seconds)
    result = {}
    for name, (trainable, planning) in made.items():
        result[name] = {"times": times[name], "plan": planning, **_checkpoint(trainable, ranks)}
        result[name]["optimizer_bytes"] = sum(gather(optimizer_bytes(trainable.optimizer), ranks))
    if ranks.is_first:
        arguments.result.write_text(json.dumps(result))
    stop(ranks)


def _make(config: RunConfig, data: Any, compression: dict[str, Any], ranks: Ranks) -> tuple[Trainable, float]:
    """Return a sharded model with its optimizers, and the seconds that planning and sharding took."""
    tables = make_tables(config.model, data)
    torch.manual_seed(0)
    collection = (
        CompressedEmbeddingBagCollection(tables, compression=parse(compression))
        if compression
        else EmbeddingBagCollection(tables=tables)
    )
    model = make_model(collection, data.num_dense, config.model)
    started = time.perf_counter()
    return Trainable(model, config.retrain, ranks, config.parallel), time.perf_counter() - started


def _turn(trainable: Trainable, data: Any, config: RunConfig, turn: int) -> float:
    """Return the seconds of a step, the mean of five."""
    share = Share(trainable.ranks.rank, trainable.ranks.world)
    batches = data.batches("train", config.retrain.batch_size, 0, share)
    ready = list(_take(batches.epoch(turn), _STEPS))
    pipeline, feed = trainable.pipeline(), iter(ready)
    trainable.module.train()
    gather(None, trainable.ranks)
    started = time.perf_counter()
    for _ in ready:
        pipeline.progress(feed)
    gather(None, trainable.ranks)
    return (time.perf_counter() - started) / len(ready)


def _take(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    for _, batch in zip(range(number), batches, strict=False):
        yield batch


def _checkpoint(trainable: Trainable, ranks: Ranks) -> dict[str, float]:
    """Return what a checkpoint takes: seconds that the training waits, until it is whole, to resume, and its bytes."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"torchrec_compress_benchmark_{os.environ['MASTER_PORT']}"
    store = Checkpoints(folder, {}, ranks)
    waits, wholes = [], []
    for step in range(4):
        started = time.perf_counter()
        store.save(step, trainable.state(), {})
        waits.append(time.perf_counter() - started)
        store.wait()
        wholes.append(time.perf_counter() - started)
    waited, whole = (statistics.median(times[1:]) for times in (waits, wholes))
    started = time.perf_counter()
    saved = store.newest()
    assert saved is not None
    trainable.load(store, saved)
    resumed = time.perf_counter() - started
    size = sum(path.stat().st_size for path in saved.path.iterdir())
    gather(None, ranks)
    if ranks.is_first:
        shutil.rmtree(folder)
    first = {"first_waits": waits[0]}  # its pages are new to the process
    return {**first, "save_waits": waited, "save_whole": whole, "resume": resumed, "bytes": size}


def report(arguments: argparse.Namespace, found: dict[int, dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "# Time of launched trainings",
        "",
        f"`python benchmarks/training.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
        + f" at {versions()['commit']}: DLRM, 26 tables of at most {arguments.rows:,} rows x {arguments.width}, global "
        f"batch {arguments.batch}, {arguments.rounds} turns of {_STEPS} steps; {os.cpu_count()} cores for all ranks "
        f"together, one thread each, gloo over loopback, {platform.machine()}, torch {torch.__version__}. Medians "
        "(quartiles).",
        "",
        "| ranks | variant | examples/s | against dense | against one rank | plan and shard s | optimizer state MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for world, variants in found.items():
        for name, values in variants.items():
            rate = arguments.batch / statistics.median(values["times"])
            ratio = [a / b for a, b in zip(variants["dense"]["times"], values["times"], strict=True)]
            low, _, high = statistics.quantiles(ratio, n=4)
            first = next(iter(found.values()))[name]
            alone = statistics.median(first["times"]) / statistics.median(values["times"])
            lines.append(
                f"| {world} | {name} | {rate:,.0f} | {statistics.median(ratio):.2f}x ({low:.2f} to {high:.2f}) | "
                f"{alone:.2f}x | {values['plan']:.2f} | {values['optimizer_bytes'] / 1e6:.1f} |"
            )
    lines += [
        "",
        "A checkpoint holds model, optimizers and position. The training waits while its tensors are copied; the files",
        "are written and synced in the background. Resuming verifies checksums, reads and reshards.",
        "Medians of three after the first of the process.",
        "",
        "| ranks | variant | checkpoint MB | training waits s | the first time s | whole after s | resume s |",
        "|---|---|---|---|---|---|---|",
    ]
    for world, variants in found.items():
        lines += [
            f"| {world} | {name} | {v['bytes'] / 1e6:.1f} | {v['save_waits']:.2f} | "
            f"{v['first_waits']:.2f} | {v['save_whole']:.2f} | "
            f"{v['resume']:.2f} |"
            for name, v in variants.items()
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
