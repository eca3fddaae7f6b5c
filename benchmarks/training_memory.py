"""Peak memory of whole training processes, planned and measured: full tables beside rows of few bits.

Run: python benchmarks/training_memory.py   (writes training_memory.md)

Each variant is a process of its own: tables made on the meta device, `DistributedModelParallel` of one rank, our
planner, some steps of a small net. The peak is the kernel's (VmHWM); from it that of a process with tables of 1,000
rows is taken, so that what is left is what the tables take: rows, optimizer state and whatever was needed to make and
to train them. It stands beside what the plan holds of the tables (rows, state, gradients), less that of the small one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_compress import CompressedEmbeddingBagCollection, get_default_sharders, native_parameters
from torchrec_compress.compression import parse
from torchrec_compress.planner import EmbeddingShardingPlanner

BATCH, DIM, STEPS, REPEATS = 4096, 64, 6, 3
OPTIMIZERS = {"adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}
# the optimizer of the tables, and how they are stored
VARIANTS = {
    "full, adagrad": ("adagrad", None),
    "full, rowwise_adagrad": ("rowwise_adagrad", None),
    "64 int8, adagrad in 8 bits": ("adagrad", {"method": "narrow", "width": 64, "bits": 8, "state_bits": 8}),
    "16 in float32, rowwise_adagrad": ("rowwise_adagrad", {"method": "narrow", "width": 16}),
    "16 int8, rowwise_adagrad": ("rowwise_adagrad", {"method": "narrow", "width": 16, "bits": 8}),
    "8 int8, rowwise_adagrad": ("rowwise_adagrad", {"method": "narrow", "width": 8, "bits": 8}),
    "8 int4, rowwise_adagrad in 8 bits": (
        "rowwise_adagrad",
        {"method": "narrow", "width": 8, "bits": 4, "state_bits": 8},
    ),
}


class Net(nn.Module):
    """Tables and one linear layer."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables, self.top = tables, nn.Linear(2 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Return the logits, (B,)."""
        return self.top(self.tables(features).values()).squeeze(1)


def train(name: str, rows: int) -> dict[str, int]:
    """Train a variant in this process; return its peak and what was planned, in bytes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    optimizer, stored = VARIANTS[name]
    tables = [
        EmbeddingBagConfig(name=key, num_embeddings=rows, embedding_dim=DIM, feature_names=[key])
        for key in ("user", "item")
    ]
    meta = torch.device("meta")
    collection: nn.Module = EmbeddingBagCollection(tables=tables, device=meta)
    if stored is not None:
        collection = CompressedEmbeddingBagCollection(tables, device=meta, compression=parse(stored))
    model = Net(collection)
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], native_parameters(model), {"lr": 0.05})
    topology = Topology(world_size=1, local_world_size=1, compute_device="cpu")
    planner, sharders = EmbeddingShardingPlanner(topology, batch_size=BATCH), get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda some: torch.optim.Adam(some, lr=1e-3))
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(rows, (2 * BATCH,), generator=draw)
        features = KeyedJaggedTensor(["user", "item"], ids, lengths=torch.ones(2 * BATCH, dtype=torch.int64))
        dense.zero_grad()
        sharded(features).square().mean().backward()
        dense.step()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    assert planner.report is not None
    planned = sum(table.held_bytes for table in planner.report.tables.values())
    return {"peak": peak, "planned": planned}


def measure(name: str, rows: int) -> dict[str, int]:
    """Return what processes of their own report, the least of several: a peak is only ever raised by chance."""
    command = [sys.executable, __file__, "--variant", name, "--rows", str(rows)]
    told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(REPEATS)]
    return min((json.loads(text.splitlines()[-1]) for text in told), key=lambda found: found["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000_000, help="of each of two tables")
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(train(options.variant, options.rows)))
        return
    lines = [
        "# Peak memory of a training process, planned and measured",
        "",
        f"`python benchmarks/training_memory.py`: two tables of {options.rows:,} rows, D = {DIM}, batch {BATCH:,}, one",
        f"rank and thread; torch {torch.__version__}, {platform.machine()}. Planned: what the plan holds of tables,",
        "state of optimizers and gradients; measured: the peak of the process less that of one of 1,000 rows",
        f"(the least of {REPEATS} runs each).",
        "",
        "| variant | planned, MiB | measured, MiB | measured / planned | less than full, planned | measured |",
        "|---|---|---|---|---|---|",
    ]
    first: tuple[float, float] | None = None
    for name in VARIANTS:
        big, small = measure(name, options.rows), measure(name, 1000)
        planned, peak = ((big[key] - small[key]) / 2**20 for key in ("planned", "peak"))
        first = first or (planned, peak)
        less = f"{first[0] / planned:.1f}x | {first[1] / peak:.1f}x"
        lines.append(f"| {name} | {planned:.0f} | {peak:.0f} | {peak / planned:.2f} | {less} |")
        print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
