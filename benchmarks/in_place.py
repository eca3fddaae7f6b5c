"""A DLRM trained dense under DistributedModelParallel, compressed in place, trained on, saved, resumed on other ranks.

Run: python benchmarks/in_place.py   (writes in_place.md)

Clicks of Criteo's shape from the embedded generator, TorchRec's own DLRM, row-wise Adagrad in the backward. Test AUROC
and logloss of the full model, of the compressed one at once, after it trained on, and after a resume; beside them those
of the same model whose rows were gathered on one rank and compressed there by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import platform
import queue
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.models.dlrm import DLRM
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    compress,
    get_default_sharders,
    measure_curvature,
    native_parameters,
)
from torchrec_compress.methods import PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import local_shards
from torchrec_compress.train.config import GeneratorConfig
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.evaluate.metrics import auc, logloss

HERE, DIM = Path(__file__).resolve().parent, 32
METHOD = PQConfig(num_codes=4, structure="residual", codebook_size=64, codebook_dtype="int8", popularity="count")


class Sizes(NamedTuple):
    """How much is trained.

    Attributes:
        rows: clicks over all splits.
        table_rows: the most rows of a table.
        batch: of all ranks together.
        epochs: of the full model; the compressed one trains on for half of one.
    """

    rows: int
    table_rows: int
    batch: int
    epochs: int


def load(sizes: Sizes) -> ClickData:
    """Return the clicks, the same on every rank."""
    return generate(GeneratorConfig(num_rows=sizes.rows, criteo_rows=sizes.table_rows))


def batch_of(data: ClickData, split: Split, rows: Tensor) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """Return dense columns, ids and labels of some rows."""
    assert split.dense is not None
    ids = split.ids[rows].T.reshape(-1).long()
    features = KeyedJaggedTensor.from_lengths_sync(data.features, ids, torch.ones(len(ids), dtype=torch.int64))
    return split.dense[rows], features, split.labels[rows]


def make_model(data: ClickData) -> nn.Module:
    """Return TorchRec's DLRM over stock tables."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
        for name, rows in zip(data.features, data.vocab, strict=True)
    ]
    return DLRM(EmbeddingBagCollection(tables), data.num_dense, [64, DIM], [64, 1])


def wrap(model: nn.Module) -> DistributedModelParallel:
    """Return the model over all ranks, its native tables trained in the backward."""
    native = native_parameters(model)
    if native:
        apply_optimizer_in_backward(RowWiseAdagrad, native, {"lr": 0.05})
    # data-parallel tables would lose that optimizer, without a word of TorchRec's
    kinds = ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value])
    constraints = dict.fromkeys((f"cat_{number}" for number in range(26)), kinds)
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner, sharders = EmbeddingShardingPlanner(topology, constraints=constraints), get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)  # type: ignore[arg-type]
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def optimizer_of(model: DistributedModelParallel) -> CombinedOptimizer:
    """Return the optimizers of tables and of the rest."""
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.Adam(parameters, lr=0.001))
    return CombinedOptimizer([model.fused_optimizer, dense])


def train(model: DistributedModelParallel, data: ClickData, sizes: Sizes, steps: range) -> CombinedOptimizer:
    """Train for some steps, each rank on its share of a batch."""
    optimizer, world, rank = optimizer_of(model), dist.get_world_size(), dist.get_rank()
    model.train()
    for step in steps:
        rows = torch.randint(0, len(data.train), (sizes.batch,), generator=torch.Generator().manual_seed(step))
        dense, features, labels = batch_of(data, data.train, rows.tensor_split(world)[rank])
        optimizer.zero_grad()
        logits = model(dense, features).squeeze(1)
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
    return optimizer


@torch.no_grad()
def measure(model: nn.Module, data: ClickData) -> tuple[float, float]:
    """Return AUROC and logloss of the test split, every rank looking at all of it."""
    model.eval()
    found = []
    for rows in torch.arange(len(data.test)).split(8192):
        dense, features, _ = batch_of(data, data.test, rows)
        found.append(model(dense, features).squeeze(1))
    logits, labels = torch.cat(found).numpy(), data.test.labels.numpy()
    return auc(labels, logits), logloss(labels, logits)


def counts_of(data: ClickData) -> dict[str, Tensor]:
    """Return how often each id is in train."""
    columns = zip(data.features, data.vocab, data.train.ids.T, strict=True)
    return {name: torch.bincount(ids.long(), minlength=rows) for name, rows, ids in columns}


def gathered(model: DistributedModelParallel, data: ClickData) -> nn.Module:
    """Return the model with all rows of all ranks, as one would do it by hand."""
    whole = make_model(data)
    state = {}
    for name, value in model.state_dict().items():
        found = torch.zeros_like(whole.state_dict()[name])
        for local, offsets in local_shards(value):
            if offsets is None:
                found = local.detach().clone()
            else:
                found[offsets[0] : offsets[0] + len(local), offsets[1] : offsets[1] + local.shape[1]] = local
        if any(offsets is not None for _, offsets in local_shards(value)) or not local_shards(value):
            dist.all_reduce(found)
        state[name] = found
    whole.load_state_dict(state)
    return whole


def route(sizes: Sizes, folder: str) -> dict[str, Any]:
    """Go the whole way on these ranks and save the end of it in a folder; return what was measured."""
    data = load(sizes)
    epoch = len(data.train) // sizes.batch
    model = wrap(make_model(data))
    train(model, data, sizes, range(sizes.epochs * epoch))
    found: dict[str, Any] = {"full": measure(model, data)}
    counts, rank, world = counts_of(data), dist.get_rank(), dist.get_world_size()
    rows = [part.tensor_split(world)[rank] for part in torch.arange(min(len(data.valid), 65536)).split(4096)]
    batches = [batch_of(data, data.valid, part) for part in rows]
    curvature = measure_curvature(model, batches, lambda model, batch: model(batch[0], batch[1]).squeeze(1))
    # so small a table would take more bytes in codes, and stays as it is
    by_hand = compress(gathered(model, data), METHOD, counts=counts, curvature=curvature)
    found["by hand"] = measure(by_hand, data)
    footprint = by_hand.sparse_arch.embedding_bag_collection.footprint()  # type: ignore[union-attr, operator]
    found["bytes"], found["ratio"] = footprint.total_bytes, footprint.ratio
    model = compress(model, METHOD, counts=counts, curvature=curvature, inplace=True, wrap=wrap)
    found["in place"] = measure(model, data)
    first = sizes.epochs * epoch
    optimizer = train(model, data, sizes, range(first, first + epoch // 2))
    found["trained on"] = measure(model, data)
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return found


def resume(sizes: Sizes, folder: str) -> dict[str, Any]:
    """Load what `route` saved into a compressed model of these ranks; return what it does now, and after more steps."""
    data = load(sizes)
    with torch.device("meta"):
        shell = make_model(data)
    stock: Any = shell.sparse_arch.embedding_bag_collection  # type: ignore[union-attr]
    tables = stock.embedding_bag_configs()
    compressed = CompressedEmbeddingBagCollection(tables, torch.device("meta"), compression=METHOD, will_fit=True)
    model = wrap(DLRM(compressed, data.num_dense, [64, DIM], [64, 1]))  # type: ignore[arg-type]
    train_state = optimizer_of(model)
    train_state.init_state()
    state = {"model": model.state_dict(), "optimizer": train_state.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    train_state.load_state_dict(state["optimizer"])
    found: dict[str, Any] = {"resumed": measure(model, data)}
    epoch = len(data.train) // sizes.batch
    train(model, data, sizes, range(9 * epoch, 9 * epoch + 3))
    found["and trained"] = measure(model, data)
    return found


def _rank(rank: int, world: int, rendezvous: str, work: str, sizes: Sizes, folder: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    found = {"route": route, "resume": resume}[work](sizes, folder)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, work: str, sizes: Sizes, folder: str) -> dict[str, Any]:
    """Return what rank 0 of so many measured."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    rendezvous = tempfile.mktemp(prefix="in-place-")
    arguments = (rendezvous, work, sizes, folder, answers)
    ranks = [context.Process(target=_rank, args=(rank, world, *arguments)) for rank in range(world)]
    for each in ranks:
        each.start()
    found = None
    while found is None and not any(each.exitcode for each in ranks):
        with contextlib.suppress(queue.Empty):
            found = answers.get(timeout=1)
    if found is None:
        for each in ranks:
            each.terminate()
        raise SystemExit("a rank failed; its error is above")
    for each in ranks:
        each.join()
    return found


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--table-rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    sizes = Sizes(given.rows, given.table_rows, given.batch, given.epochs)
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(2, "route", sizes, folder)
        found |= on_ranks(4, "resume", sizes, folder)
    scores = [(name, *value) for name, value in found.items() if isinstance(value, tuple)]
    command = " ".join(["python benchmarks/in_place.py", *sys.argv[1:]])
    lines = [
        "# Compressed in place",
        "",
        f"`{command}`; {platform.machine()}, torch {torch.__version__}, two gloo ranks, then four.",
        "",
        f"{sizes.rows:,} clicks of the generator in Criteo's shape, 26 tables of at most {sizes.table_rows:,} rows x",
        f"{DIM}, TorchRec's DLRM; `{METHOD.method}`, {METHOD.num_codes} residual codes, in the metric of the loss:",
        f"{found['bytes']:,} bytes, {found['ratio']:.1f} times smaller. By hand: rows gathered on one rank and",
        "compressed there. One seed.",
        "",
        "| | test AUROC | test logloss |",
        "|---|---|---|",
        *[f"| {name} | {area:.4f} | {loss:.4f} |" for name, area, loss in scores],
        "",
    ]
    text = "\n".join(lines)
    (HERE / "in_place.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
