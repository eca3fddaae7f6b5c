"""Training steps of what `choose.py` compares: the dense model, one setting for all tables, and what `choose` took.

Run: python benchmarks/choose.py --keep /tmp/choose && python benchmarks/choose_steps.py --keep /tmp/choose

The embedded generator's DeepFM on two gloo ranks of this machine, one thread each, planned and trained as
`torchrec-compress train` does: row-wise Adagrad in the backward of native tables, Adam for all else. All variants live
in the same processes and take turns, five steps at a time; ratios are of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from training import _make, _turn

from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.machine import prepare
from torchrec_compress.train.ranks import start, stop
from torchrec_compress.train.stages import open_checked


def work(arguments: argparse.Namespace) -> None:
    """Measure all variants on this rank; rank 0 writes."""
    prepare(1)
    config = override(
        RunConfig(),
        {
            "model": {"embedding_dim": 32, "hidden": [128, 64]},
            "retrain.batch_size": arguments.batch,
            "parallel.device": "cpu",
        },
    )
    ranks = start(config.parallel)
    data = open_checked(config.data, ranks)
    ways = {"dense": {}, **json.loads((arguments.keep / "ways.json").read_text())}
    made = {name: _make(config, data, compression, ranks)[0] for name, compression in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(arguments.rounds + 1):
        for name, trainable in made.items():
            seconds = _turn(trainable, data, config, turn)
            if turn:  # the first builds kernels and buffers
                times[name].append(seconds)
    if ranks.is_first:
        arguments.result.write_text(json.dumps(times))
    stop(ranks)


def main() -> None:
    """Launch two ranks and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="folder of choose.py")
    parser.add_argument("--batch", type=int, default=4096, help="global")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--result", type=Path, help="where a rank writes; set by this program")
    given = parser.parse_args()
    if given.result is not None:
        work(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        subprocess.run(
            [*command, "2", __file__, *sys.argv[1:], "--result", str(path)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        times = json.loads(path.read_text())
    print(f"global batch {given.batch}, {given.rounds} turns of five steps, torch {torch.__version__}\n")
    print("| | step, ms | in times of the dense model (quartiles) |\n|---|---|---|")
    for name, mine in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, times["dense"], strict=True)], n=4)
        print(f"| {name} | {1e3 * statistics.median(mine):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
