"""Full models that `compare` trained: each setting for all tables against `choose` in the bytes it is planned with.

Run, with one output folder for both:
torchrec-compress compare configs/globo_news.yaml --data.path globo_news.parquet --compare.only '[full]' --output OUT
python benchmarks/choose_trained.py configs/globo_news.yaml --data.path globo_news.parquet --output OUT

Nothing is trained after compression. `choose` knows the curvature of the loss and how much of rare rows is noise, both
from rows of validation. AUC and logloss are of all rows of test, gaps those to the full model of the same seed.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from choose import FUSED, META, UNIFORM, Machines, Stored, Trained, stored, uniform
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.cli import parse_run
from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.methods import DenseConfig, MethodConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.train.asked import curvature_of
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.full import trained_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.rises import Known, noise_of, shared_rises
from torchrec_compress.train.stages import open_checked, pretrained_key

MACHINE = Machines(ranks=1, batch=1024, memory=1024, host=0)
SEEN = 0.0005  # the least rise of which noise is measured, as in the trainer


class Case(NamedTuple):
    """A way to store all tables of one model: bytes of a planned step and stored, and what it does."""

    planned: int
    bytes: int
    was: Stored


def opened(config: RunConfig, data: ClickData, ranks: Ranks, kept: Path) -> Trained:
    """Return the full model of a seed, with its curvature and what every way of every table costs."""
    source = Path(config.output) / "full" / pretrained_key(config)
    model, counts = trained_model(config, data, source), data.counts()
    curvature = curvature_of(config, data, source, ranks)
    if not kept.exists():
        known = Known(config, data, source, counts, curvature)
        alike = shared_rises(list(counts), known)
        noise = {name: noise_of(each, 1.0) if each.rise.predicted > SEEN else 0.0 for name, each in alike.items()}
        found = measure_frontier(model.embeddings, counts, curvature=curvature, noise=noise, seed=config.seed)  # type: ignore[arg-type]
        kept.write_text(json.dumps(found.to_dict()))
    frontier = Frontier.from_dict(json.loads(kept.read_text()))
    return Trained(model, data.layout, data, counts, curvature, frontier, {})  # type: ignore[arg-type]


def planned_bytes(tables: list[EmbeddingBagConfig], methods: Mapping[str, MethodConfig]) -> int:
    """Return the bytes of a step: tables, optimizer state, gradients and activations, decoded rows included."""
    planner = EmbeddingShardingPlanner(MACHINE.topology(host=False), MACHINE.batch, stats=[])
    collection = CompressedEmbeddingBagCollection(tables, device=META, compression=dict(methods))
    planner.plan(nn.ModuleDict({"sparse": collection}), get_default_sharders(fused_params=FUSED))
    assert planner.report is not None
    return sum(each.held_bytes + each.activation_bytes for each in planner.report.tables.values())


def chosen(tables: list[EmbeddingBagConfig], frontier: Frontier, budget: int) -> Mapping[str, MethodConfig]:
    """Return what `choose` finds within a budget."""
    planner = EmbeddingShardingPlanner(MACHINE.topology(host=False), MACHINE.batch, stats=[])
    model = nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=META)})
    return planner.choose(model, frontier, budget_bytes=budget, sharders=get_default_sharders(fused_params=FUSED))


def compared(known: Trained, tables: list[EmbeddingBagConfig]) -> Iterator[tuple[str, Case]]:
    """Yield every setting for all tables, and the choice in its bytes."""

    def case(methods: Mapping[str, MethodConfig]) -> Case:
        size = sum(methods[table.name].stored_bytes(table) for table in tables)
        return Case(planned_bytes(tables, methods), size, stored(known, tables, methods))

    for name, method in UNIFORM.items():
        alike = case(uniform(tables, method))
        yield f"all {name}", alike
        yield f"`choose` in those of all {name}", case(chosen(tables, known.frontier, alike.planned))


def told(cases: list[Case], fulls: list[Stored]) -> list[str]:
    """Return the cells of a row: means over seeds and their deviations."""

    def spread(values: list[float], form: str) -> str:
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}"

    cells = [f"{statistics.mean(getattr(each, key) for each in cases):,.0f}" for key in ("planned", "bytes")]
    cells.append(f"{statistics.mean(each.was.predicted for each in cases):+.5f}")
    pairs = list(zip(cases, fulls, strict=True))
    for key in ("auc", "loss"):
        cells.append(spread([getattr(each.was, key) for each in cases], ".4f"))
        cells.append(spread([getattr(each.was, key) - getattr(full, key) for each, full in pairs], "+.4f"))
    return cells


def main() -> None:
    """Open every seed's model, compare and print."""
    config = parse_run(sys.argv[1:], "train")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    ranks, fulls, rows = start(config.parallel), list[Stored](), dict[str, list[Case]]()
    data = open_checked(config.data, ranks)
    assert isinstance(data, ClickData)
    tables = make_tables(config.model, data)
    for seed in config.compare.seeds:
        mine = override(config, {"seed": seed, "curvature_rows": 65536})
        known = opened(mine, data, ranks, Path(config.output) / f"choose_frontier_{seed}.json")
        fulls.append(stored(known, tables, dict.fromkeys(known.counts, DenseConfig())))
        for name, case in compared(known, tables):
            rows.setdefault(name, []).append(case)
            print(f"seed {seed}, {name}: {case}", file=sys.stderr, flush=True)
    heads = ["", "planned, bytes", "stored, bytes", "predicted rise", "AUC", "gap", "logloss", "gap"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    auc, loss = (statistics.mean(getattr(each, key) for each in fulls) for key in ("auc", "loss"))
    print(
        f"| full | | {sum(4 * t.num_embeddings * t.embedding_dim for t in tables):,} | | {auc:.4f} | | {loss:.4f} | |"
    )
    for name, cases in rows.items():
        print(f"| {' | '.join([name, *told(cases, fulls)])} |", flush=True)


if __name__ == "__main__":
    main()
