"""A model that does not fit: TorchRec's planner with the host's memory, one setting for all tables, and `choose`.

Run: python benchmarks/choose.py --keep /tmp/choose            (the embedded generator, loss measured; three seeds)
     python benchmarks/choose.py --keep /tmp/choose --criteo   (26 tables of MLPerf's sizes on eight ranks, planned)

All have the same memory in GPUs, in which the dense model has no room, and TorchRec's reservation of 15 %. A step is
what TorchRec's planner thinks of the slowest rank. The rise of the logloss is `predicted_rise` of what was stored.
Tables of MLPerf's sizes were never trained: predicted and measured is a model of the generator's Criteo clicks whose
tables have at most 100,000 rows, and a share of hot or coded rows there is the same share of the large table. Nothing
is trained after compression. Trained models and what was measured of them are kept under --keep.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from curvature import evaluate, train
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from torchrec_compress import CompressedEmbeddingBagCollection, Curvature, compress, measure_curvature, predicted_rise
from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.compression.knapsack import Candidate, undominated
from torchrec_compress.methods import DenseConfig, Int4Config, Int8Config, MethodConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.train.config import GeneratorConfig, ModelConfig
from torchrec_compress.train.data.batch import Layout
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.mlperf import TABLE_ROWS
from torchrec_compress.train.models.click import ClickModel, make_model, tables_of

WIDTH, META = 32, torch.device("meta")
FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
UNIFORM: dict[str, MethodConfig] = {
    "int8": Int8Config(),
    "int4": Int4Config(),
    "4 product codes": PQConfig(num_codes=4, popularity="count"),
    **{f"{m} residual codes": PQConfig(num_codes=m, structure="residual", popularity="count") for m in (2, 1)},
}


class Machines(NamedTuple):
    """GPUs that are planned for: how many, their batch, MiB of each, and of the host's memory beside each."""

    ranks: int
    batch: int
    memory: float
    host: float

    def topology(self, host: bool) -> Topology:
        """Return them, with the host's memory or next to none."""
        return Topology(
            world_size=self.ranks,
            local_world_size=self.ranks,
            compute_device="cuda",
            hbm_cap=int(self.memory * 2**20),
            ddr_cap=int(self.host * 2**20) if host else 1,
        )


class Stored(NamedTuple):
    """A trained model as it is stored: predicted rise of the logloss, AUC and logloss on test, ms to serve a batch."""

    predicted: float
    auc: float
    loss: float
    milliseconds: float


class Trained(NamedTuple):
    """A trained model and what was measured of it.

    Attributes:
        model, layout, data: the model, how it reads ids, and the clicks.
        counts: look-ups in training by table.
        curvature: of the loss, from validation.
        frontier: bytes and predicted rise of every way, by table.
        measured: of models stored with some methods, by those.
    """

    model: ClickModel
    layout: Layout
    data: ClickData
    counts: dict[str, Tensor]
    curvature: dict[str, Curvature]
    frontier: Frontier
    measured: dict[Any, Stored]


def trained(clicks: GeneratorConfig, seed: int, kept: Path) -> Trained:
    """Return a trained DeepFM; trained before, if it is kept."""
    data = generate(clicks)
    sizes = dict(zip(data.features, data.vocab, strict=True))
    layout, config = Layout(data.features, (1,) * len(sizes)), ModelConfig(embedding_dim=WIDTH, hidden=[128, 64])
    torch.manual_seed(seed)
    model = make_model(EmbeddingBagCollection(tables_of(config, sizes)), 0, config)
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        train(model, layout, data, epochs=2)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    counts = {name: torch.bincount(data.train.ids[:, n].long(), minlength=sizes[name]) for n, name in enumerate(sizes)}
    batches = [layout.to_features(ids) for ids in data.valid.ids.split(4096)]
    curvature = measure_curvature(model, batches, lambda net, batch: net(batch).logits)
    found = kept.with_suffix(".json")
    if not found.exists():
        frontier = measure_frontier(model.embeddings, counts, curvature=curvature, seed=seed)  # type: ignore[arg-type]
        found.write_text(json.dumps(frontier.to_dict()))
    return Trained(model, layout, data, counts, curvature, Frontier.from_dict(json.loads(found.read_text())), {})


def resized(option: MethodConfig, rows: int, to_rows: int) -> MethodConfig:
    """Return a way of a table for a larger or smaller one, with the same shares of hot and of coded rows."""
    names = [name for name in ("num_hot_rows", "num_coded") if getattr(option, name, None)]
    return dataclasses.replace(option, **{name: round(getattr(option, name) * to_rows / rows) for name in names})


def stretched(frontier: Frontier, tables: list[EmbeddingBagConfig]) -> Frontier:
    """Return a frontier for larger tables of the same names."""
    found = {}
    for table in tables:
        rows, some = frontier.sizes[table.name][0], []
        for each in frontier.candidates[table.name]:
            option = resized(each.option, rows, table.num_embeddings)
            try:
                option.check(table)
            except ValueError:  # a head of so many rows has no codes left
                continue
            some.append(Candidate(option.stored_bytes(table), each.error, option))
        found[table.name] = undominated(table.name, some)
    return Frontier({t.name: (t.num_embeddings, t.embedding_dim) for t in tables}, found, frontier.unit)


def uniform(tables: list[EmbeddingBagConfig], method: MethodConfig) -> dict[str, MethodConfig]:
    """Return one method for all tables, but for those that it makes larger, which stay dense."""
    small = {table.name for table in tables if method.stored_bytes(table) < DenseConfig().stored_bytes(table)}
    return {table.name: method if table.name in small else DenseConfig() for table in tables}


class Planned(NamedTuple):
    """What a planner thinks: bytes over all ranks, milliseconds of the slowest rank, and CPU seconds to plan."""

    memory: float
    host: float
    step: float
    seconds: float


def planned(plan: Callable[[list[Any]], Any]) -> Planned | None:
    """Return what a planner thinks of a model, or None where nothing fits; `plan` gets a list of callbacks."""
    kept: list[list[ShardingOption]] = []
    start = time.process_time()
    try:
        plan([lambda best: kept.append(best) or best])
    except PlannerError:
        return None
    seconds, ranks = time.process_time() - start, {}
    for option in kept[-1]:
        for shard in option.shards:
            mine = ranks.setdefault(shard.rank, [0.0, 0.0, 0.0])
            assert shard.storage is not None and shard.perf is not None
            for place, value in enumerate((shard.storage.hbm, shard.storage.ddr, shard.perf.total)):
                mine[place] += value
    memory, host, _ = (sum(column) for column in zip(*ranks.values(), strict=True))
    return Planned(memory, host, max(step for *_, step in ranks.values()), seconds)


def by_torchrec(tables: list[EmbeddingBagConfig], machines: Machines, host: bool) -> Planned | None:
    """Plan the dense model with TorchRec's own planner."""
    model = nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=META)})
    sharders = get_default_sharders(fused_params=FUSED)

    def plan(callbacks: list[Any]) -> Any:
        reservation = FixedPercentageStorageReservation(0.15)
        options = {"storage_reservation": reservation, "stats": [], "callbacks": callbacks}
        return StockPlanner(machines.topology(host), machines.batch, **options).plan(model, sharders)

    return planned(plan)


def by_us(
    tables: list[EmbeddingBagConfig], machines: Machines, how: Mapping[str, MethodConfig] | Frontier
) -> tuple[Planned | None, Mapping[str, MethodConfig]]:
    """Plan a model with methods, or choose them first; return the methods as well."""
    methods = {} if isinstance(how, Frontier) else dict(how)

    def plan(callbacks: list[Any]) -> None:
        planner = EmbeddingShardingPlanner(
            machines.topology(host=False),
            machines.batch,
            storage_reservation=FixedPercentageStorageReservation(0.15),
            stats=[],
            callbacks=callbacks,
        )
        sharders = get_default_sharders(fused_params=FUSED)
        if isinstance(how, Frontier):
            model = nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=META)})
            methods.update(planner.choose(model, how, sharders=sharders))
            return
        collection = CompressedEmbeddingBagCollection(tables, device=META, compression=methods)
        planner.plan(nn.ModuleDict({"sparse": collection}), sharders)

    return planned(plan), methods


def stored(known: Trained, tables: list[EmbeddingBagConfig], methods: Mapping[str, MethodConfig]) -> Stored:
    """Compress a trained model with the methods of tables that may be larger, and measure it."""
    other, before = copy.deepcopy(known.model), known.model.embeddings
    mine = {
        table.name: resized(methods[table.name], table.num_embeddings, known.frontier.sizes[table.name][0])
        for table in tables
    }
    key = tuple(sorted((name, repr(method)) for name, method in mine.items()))
    if key in known.measured:
        return known.measured[key]
    made = compress(before, mine, counts=known.counts, curvature=known.curvature)  # type: ignore[call-overload]
    other.embeddings = made
    rises = []
    for name, curvature in known.curvature.items():
        rows: Tensor = before.embedding_bags[name].weight.detach()  # type: ignore[union-attr, index, operator, assignment]
        served = made.table_rows(name, torch.arange(len(rows))).detach()
        rises.append(predicted_rise(rows, served, known.counts[name], curvature))
    score = evaluate(other, known.layout, known.data.test)
    known.measured[key] = Stored(sum(rises), *score, serving_time(other, known))
    return known.measured[key]


def serving_time(model: ClickModel, known: Trained, batch: int = 4096) -> float:
    """Return the milliseconds of a batch on one thread, the least of many."""
    features = [known.layout.to_features(ids) for ids in known.data.test.ids[: 8 * batch].split(batch)]
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    model.eval()
    with torch.no_grad():
        for number in range(40):
            start = time.process_time()
            model(features[number % len(features)])
            best = min(best, time.process_time() - start)
    torch.set_num_threads(threads)
    return 1e3 * best


def row(name: str, plans: list[Planned | None], cases: list[Stored]) -> None:
    """Print a row of the table: means over seeds, and deviations of what was measured."""
    found = [each for each in plans if each is not None]
    cells = ["no plan", "", "", ""]
    if found:
        memory, host, step, seconds = (statistics.mean(column) for column in zip(*found, strict=True))
        cells = [f"{memory / 2**20:,.1f}", f"{host / 2**20:,.1f}", f"{step:.3g}", f"{seconds:.1f}"]
    for field, form in (("predicted", "+.5f"), ("auc", ".4f"), ("loss", ".4f"), ("milliseconds", ".1f")):
        values = [getattr(each, field) for each in cases]
        spread = f" ± {statistics.stdev(values):.4f}" if field in ("auc", "loss") and len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):{form}}{spread}")
    print(f"| {' | '.join([name, *cells])} |", flush=True)


def report(
    models: list[Trained], sizes: Mapping[str, int], machines: Machines
) -> dict[str, Mapping[str, MethodConfig]]:
    """Print a table: TorchRec's planner, one setting for all tables, and the choice; return the methods of each."""
    tables = tables_of(ModelConfig(embedding_dim=WIDTH), dict(sizes))
    dense = sum(DenseConfig().stored_bytes(table) for table in tables)
    print(
        f"\n{machines.ranks} ranks of {machines.memory:g} MiB, {machines.host:g} MiB of the host's memory beside each;"
    )
    print(f"batch {machines.batch} a rank; the dense tables take {dense / 2**20:,.1f} MiB without optimizer state.\n")
    heads = [
        "",
        "GPUs, MiB",
        "host, MiB",
        "step, ms",
        "plan, CPU s",
        "predicted rise",
        "AUC",
        "logloss",
        "serving, CPU ms",
    ]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    cases = [stored(known, tables, uniform(tables, DenseConfig())) for known in models]
    large = machines._replace(memory=100 * machines.memory)
    row("dense, TorchRec, memory for all of it", [by_torchrec(tables, large, host=False)], cases)
    row("dense, TorchRec, with the host's memory", [by_torchrec(tables, machines, host=True)], cases)
    row("dense, TorchRec, GPUs alone", [by_torchrec(tables, machines, host=False)], cases)
    variants = {}
    for name, method in UNIFORM.items():
        plan, methods = by_us(tables, machines, uniform(tables, method))
        variants[f"all {name}"] = methods
        row(f"all {name}", [plan], [stored(known, tables, methods) for known in models])
    found = [by_us(tables, machines, stretched(known.frontier, tables)) for known in models]
    chosen = zip(models, found, strict=True)
    row("`choose`", [plan for plan, _ in found], [stored(known, tables, methods) for known, (_, methods) in chosen])
    for name, method in found[0][1].items():
        print(f"    {name}: {method}")
    return {**variants, f"`choose`, {machines.memory:g} MiB a rank": found[0][1]}


def main() -> None:
    """Train what is not kept, plan, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="folder of trained models")
    parser.add_argument("--criteo", action="store_true", help="26 tables of MLPerf's sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the embedded generator's model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if given.criteo:
        clicks = GeneratorConfig(criteo_rows=100_000, num_rows=500_000)
        models = [trained(clicks, 0, given.keep / "criteo_0.pt")]
        for memory in (2048, 512):
            report(models, TABLE_ROWS, Machines(ranks=8, batch=4096, memory=memory, host=16384))
        return
    models = [trained(GeneratorConfig(), seed, given.keep / f"demo_{seed}.pt") for seed in given.seeds]
    variants: dict[str, Mapping[str, MethodConfig]] = {}
    for memory in (2.5, 0.9):
        sizes = {name: rows for name, (rows, _) in models[0].frontier.sizes.items()}
        variants |= report(models, sizes, Machines(ranks=2, batch=64, memory=memory, host=64))
    ways = {name: {table: way.to_dict() for table, way in methods.items()} for name, methods in variants.items()}
    (given.keep / "ways.json").write_text(json.dumps(ways))  # whose steps choose_steps.py times


if __name__ == "__main__":
    main()
