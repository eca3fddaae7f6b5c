"""Bytes on the wire and time of a training step: TorchRec's sharded tables against compressed ones.

Run: python benchmarks/wire.py        (gloo processes on this machine; writes wire.md beside this file)

A DLRM with 26 tables of 20,000 rows x 128, trained by SGD. All variants live in the same processes and take turns step
by step, so that a busy machine slows all of them. Bytes are counted where they are handed to a collective, without what
a rank sends to itself, and averaged over ranks; the all-reduce of dense parameters happens inside
DistributedDataParallel and is added by its formula, 2 (W - 1) / W bytes per byte of replicated parameters. Where their
gradients go in few bits (`compress_gradients`) those bytes are counted, too.

Where compressed tables lose: the all-reduce of codebooks (128 KiB per table here) does not shrink with the batch, so at
128 examples per rank and one id per bag they send as much as row-wise tables, unless their gradients go in few bits.
Over loopback, de-duplicating ids and rounding gradients take longer than sending them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_compress import CompressedEmbeddingBagCollection, compress_gradients, native_parameters
from torchrec_compress.methods import MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.sharding import CodeTableCollectionSharder, DecoderSharder, TrainedBagsSharder

NUM_TABLES, NUM_ROWS, WIDTH, NUM_DENSE = 26, 20_000, 128, 13
HEAD = (
    "| ranks | pooling factor | variant | forward KiB | backward KiB | all-reduce KiB | sum KiB | sum, row-wise | "
    "step ms (10th..90th percentile) | examples/s | time, row-wise = 1 |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


class RowWiseBags(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which does not offer row-wise tables on a CPU though they work."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]


@dataclass
class Variant:
    """A way to shard the tables, by a method or, without one, TorchRec's own."""

    name: str
    kind: str
    method: MethodConfig | None = None
    deduplicate: bool = True
    gradients: str = "float32"

    def build(self, batch_size: int, pooling_factor: int) -> tuple[DistributedModelParallel, CombinedOptimizer]:
        torch.manual_seed(0)
        names = [f"t{i}" for i in range(NUM_TABLES)]
        tables = [
            EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=WIDTH, feature_names=[name])
            for name in names
        ]
        if self.method is None:
            collection: nn.Module = EmbeddingBagCollection(tables=tables)
            sharders: list[Any] = [RowWiseBags()]
        else:
            collection = CompressedEmbeddingBagCollection(tables, compression=self.method)
            sharders = [CodeTableCollectionSharder(self.deduplicate), TrainedBagsSharder(), DecoderSharder()]
        dlrm = DLRM(collection, NUM_DENSE, [64, WIDTH], [64, 1])  # type: ignore[arg-type]
        model = DLRMTrain(dlrm)
        apply_optimizer_in_backward(torch.optim.SGD, native_parameters(model), {"lr": 0.01})
        wish = ParameterConstraints(sharding_types=[self.kind], pooling_factors=[float(pooling_factor)])
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
            batch_size=batch_size,
            constraints=dict.fromkeys(names, wish),
        )
        plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
        sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
        if self.gradients != "float32":
            compress_gradients(sharded, self.gradients)  # type: ignore[arg-type]
        rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
        dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


VARIANTS = [
    Variant("EBC row-wise", "row_wise"),
    Variant("EBC table-wise", "table_wise"),
    Variant("8 codes row-wise", "row_wise", PQConfig(num_codes=8)),
    Variant("8 codes row-wise, ids repeated", "row_wise", PQConfig(num_codes=8), deduplicate=False),
    Variant("8 codes replicated", "data_parallel", PQConfig(num_codes=8)),
    Variant("8 codes row-wise, gradients in int8", "row_wise", PQConfig(num_codes=8), gradients="int8"),
    Variant("8 codes row-wise, gradients in int4", "row_wise", PQConfig(num_codes=8), gradients="int4"),
    Variant("8 codes replicated, gradients in int4", "data_parallel", PQConfig(num_codes=8), gradients="int4"),
    Variant("16 codes row-wise", "row_wise", PQConfig(num_codes=16)),
    Variant("16 int8 numbers row-wise", "row_wise", NarrowConfig(width=16, bits=8)),
    Variant("16 int8 numbers table-wise", "table_wise", NarrowConfig(width=16, bits=8)),
    Variant(
        "16 int8 numbers table-wise, gradients in int8", "table_wise", NarrowConfig(width=16, bits=8), gradients="int8"
    ),
]


class Counter:
    """Count the bytes that this rank hands to collectives; single bytes are gradients in few bits, and none else."""

    def __init__(self) -> None:
        self.sent, self.reduced = 0.0, 0.0
        rank, world = dist.get_rank(), dist.get_world_size()

        def exchange(output: Tensor, input: Tensor, output_sizes: Any = None, input_sizes: Any = None) -> float:
            kept = 1 / world if input_sizes is None else input_sizes[rank] / max(sum(input_sizes), 1)
            return _num_bytes(input) * (1 - kept)

        self._wrap("all_to_all_single", exchange)
        for name in ("reduce_scatter_tensor", "reduce_scatter"):
            self._wrap(name, lambda output, input, *_: _num_bytes(input) * (world - 1) / world)
        for name in ("all_gather_into_tensor", "all_gather"):
            self._wrap(name, lambda output, input, *_: _num_bytes(input) * (world - 1))

    def _wrap(self, name: str, num_bytes: Callable[..., float]) -> None:
        collective = getattr(dist, name)

        def counted(output: Any, input: Any, *arguments: Any, **keywords: Any) -> Any:
            sizes = [keywords[k] for k in ("output_split_sizes", "input_split_sizes") if k in keywords]
            size = num_bytes(output, input, *(arguments or sizes))
            if isinstance(input, Tensor) and input.dtype == torch.uint8:
                self.reduced += size
            else:
                self.sent += size
            return collective(output, input, *arguments, **keywords)

        setattr(dist, name, counted)

    def take(self) -> float:
        sent, self.sent = self.sent, 0.0
        return sent

    def take_reduced(self) -> float:
        reduced, self.reduced = self.reduced, 0.0
        return reduced


def _num_bytes(tensors: Any) -> int:
    many = tensors if isinstance(tensors, list | tuple) else [tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in many)


@dataclass
class Batch:
    """A batch as DLRMTrain takes it."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor


def draw(batch_size: int, pooling_factor: int, step: int) -> Batch:
    """Return a batch with Zipf(1.05) ids, other ones on every rank and at every step."""
    seeded = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    shares = torch.arange(1, NUM_ROWS + 1, dtype=torch.float64).pow(-1.05)
    shuffled = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    count = NUM_TABLES * batch_size * pooling_factor
    ids = shuffled[torch.multinomial(shares, count, replacement=True, generator=seeded)]
    lengths = torch.full((NUM_TABLES * batch_size,), pooling_factor)
    features = KeyedJaggedTensor.from_lengths_sync([f"t{i}" for i in range(NUM_TABLES)], ids, lengths)
    dense = torch.rand(batch_size, NUM_DENSE, generator=seeded)
    return Batch(dense, features, torch.randint(0, 2, (batch_size,), generator=seeded))


def replicated_bytes(model: DistributedModelParallel) -> float:
    """Return what the all-reduce of replicated parameters sends per rank and step."""
    world = dist.get_world_size()
    sharded = set(DistributedModelParallel._sharded_parameter_names(model.module))
    size = sum(p.numel() * p.element_size() for name, p in model.module.named_parameters() if name not in sharded)
    return 2 * (world - 1) / world * size


def measure(rank: int, world: int, rendezvous: str, batch_size: int, pooling_factors: list[int], steps: int, out: str):
    """Run on one rank: every variant takes its step before the first takes its second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    lines = []
    for pooling_factor in pooling_factors:
        models = {variant.name: variant.build(batch_size, pooling_factor) for variant in VARIANTS}
        if "counter" not in globals():
            globals()["counter"] = Counter()
        counter: Counter = globals()["counter"]
        sent: dict[str, tuple[float, float, float]] = {}
        times: dict[str, list[float]] = {name: [] for name in models}
        for step in range(steps + 1):
            batch = draw(batch_size, pooling_factor, step)
            for name, (model, optimizer) in models.items():
                dist.barrier()
                counter.take()
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = model(batch)[0]
                forward = counter.take()
                loss.backward()
                backward, few = counter.take(), counter.take_reduced()
                optimizer.step()
                if step:  # the first step sets things up
                    times[name].append(1000 * (time.perf_counter() - start))
                    sent[name] = (forward, backward, few)
        everyone: list[Any] = [None] * world
        full = [variant.name for variant in VARIANTS if variant.gradients == "float32"]
        reduced = {name: replicated_bytes(models[name][0]) if name in full else sent[name][2] for name in models}
        dist.all_gather_object(everyone, sent)
        lines += rows(world, batch_size, pooling_factor, everyone, reduced, times)
        del models
    if rank == 0:
        Path(out).write_text("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def rows(
    world: int, batch_size: int, pooling_factor: int, sent: list[Any], reduced: dict, times: dict[str, list[float]]
) -> list[str]:
    """Return the table's lines of one setting; ratios of times are medians of ratios step by step."""
    lines = []
    first = VARIANTS[0].name
    sums = {}
    for variant in VARIANTS:
        name = variant.name
        forward, backward = (statistics.mean(mine[name][part] for mine in sent) / 1024 for part in (0, 1))
        sums[name] = forward + backward + reduced[name] / 1024
        spread = statistics.quantiles(times[name], n=10, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
        lines.append(
            f"| {world} | {pooling_factor} | {name} | {forward:,.0f} | {backward:,.0f} | {reduced[name] / 1024:,.0f} | "
            f"{sums[name]:,.0f} | {sums[first] / sums[name]:.1f}x less | {statistics.median(times[name]):.1f} "
            f"({spread[0]:.1f}..{spread[-1]:.1f}) | "
            f"{1000 * world * batch_size / statistics.median(times[name]):,.0f} | {ratio:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pooling-factors", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--batch-size", type=int, default=512, help="per rank")
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    found = []
    for world in given.worlds:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, f"{folder}/meet", given.batch_size, given.pooling_factors, given.steps, f"{folder}/out")
            mp.spawn(measure, arguments, nprocs=world)
            found.append(Path(folder, "out").read_text().rstrip())
    paragraphs = (__doc__ or "").strip().split("\n\n")[2:]  # without the title and the command
    head = (
        "# Bytes on the wire and step time\n\n`python benchmarks/wire.py`: " + "\n\n".join(paragraphs) + "\n\n"
        f"Batch {given.batch_size} per rank, Zipf(1.05) ids, {given.steps} steps, one thread per rank, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}.\n"
    )
    text = "\n".join([head, HEAD, *found]) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
