"""Which methods a budget of bytes gives to the tables of a trained full model."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress import CompressedEmbeddingBagCollection, compress_into
from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.convert import Curvature, row_reader
from torchrec_compress.methods import MethodConfig
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import base_of
from torchrec_compress.train.config import RunConfig, fingerprint
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.fitting import FullTables
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.click import ClickModel, make_tables
from torchrec_compress.train.sealed import is_done, publish, read_json, write_json

logger = logging.getLogger(__name__)

_BATCH = 8192
_READ_ROWS = 65_536
# Where predictions are held against measurements: as a budget of a fiftieth would store a table.
_TRIED_AT = 0.02
# The least of a prediction that is believed: an error that does good on a sample of validation is not free elsewhere.
_LEAST = 0.05


def choose(
    config: RunConfig,
    budget: Budget,
    data: ClickSource,
    source: Path,
    kept: Path,
    counts: dict[str, Tensor],
    curvature: Mapping[str, Curvature],
) -> dict[str, Any]:
    """Return the methods that are chosen for a budget, as plain data, and keep them and what they were chosen from.

    Rank 0 alone calls it.

    Args:
        config: of the run.
        budget: of bytes, over all tables.
        data: the rows.
        source: folder of the trained full model.
        kept: the file.
        counts: look-ups per id in train, (rows,) int64 by table.
        curvature: of the full model's loss, by table; empty: errors are squared errors of rows.
    """
    if not is_done(kept):
        wanted = budget.num_bytes(_dense_bytes(make_tables(config.model, data)))
        choice = _frontier(config, budget, data, source, counts, curvature).choose(wanted)
        logger.info("methods for %s bytes:\n%s", f"{wanted:,}", choice)
        write_json(kept, {name: method.to_dict() for name, method in choice.items()})
    return read_json(kept)


def _dense_bytes(tables: list[EmbeddingBagConfig]) -> int:
    return sum(4 * table.num_embeddings * table.embedding_dim for table in tables)


def _frontier(
    config: RunConfig,
    budget: Budget,
    data: ClickSource,
    source: Path,
    counts: dict[str, Tensor],
    curvature: Mapping[str, Curvature],
) -> Frontier:
    """Return what every table costs at every size; measured once for all budgets of a full model, and kept beside it.

    Raises:
        ValueError: what was kept is damaged, or of another model, curvature or other settings.
    """
    best, tables = best_checkpoint(source), make_tables(config.model, data)
    settings = {"codes": budget.codes, "num_codes": budget.num_codes, "seed": config.seed}
    settings |= {"curvature": _digest(curvature) if curvature else None, "curvature_rows": config.curvature_rows}
    model = read_json(source / "summary.json", keys=("identity",))["identity"]
    told = {**settings, "model": model, "checkpoint": best.name}
    folder = source / "frontiers" / fingerprint(settings)
    path, remedy = folder / "frontier.json", f"delete {folder}, the same command makes it again"
    if not is_done(path):
        rows = dict(FullTables(best, tables))
        options = {"num_codes": budget.num_codes, "codes": base_of(budget), "seed": config.seed}
        measured = measure_frontier(rows, counts, curvature=curvature or None, **options)
        del rows
        if curvature:
            measured = measured.scaled(_factors(config, data, source, counts, curvature, measured))
        plain = {"identity": told, **measured.to_dict()}
        if folder.is_dir() and not is_done(path):
            shutil.rmtree(folder)
        publish(folder, lambda part: write_json(part / path.name, plain))
    plain = read_json(path, remedy, keys=("identity",))
    check_same(path, plain.pop("identity"), told)
    try:
        found = Frontier.from_dict(plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error
    sizes = {table.name: (table.num_embeddings, table.embedding_dim) for table in tables}
    if found.sizes != sizes:
        raise ValueError(f"{path}: must be of tables {sizes}, got {found.sizes}; {remedy}")
    return found


def _factors(
    config: RunConfig,
    data: ClickSource,
    source: Path,
    counts: dict[str, Tensor],
    curvature: Mapping[str, Curvature],
    frontier: Frontier,
) -> dict[str, float]:
    """Return by what the predictions of each table must be multiplied to be what is measured at one of its sizes.

    Predictions rank the fits of one table, but not tables against each other: the rows of a flat table hold noise of
    their own clicks, which errors take away (docs/curvature.md).
    """
    least = sum(some[0].num_bytes for some in frontier.candidates.values())
    dense = _dense_bytes(make_tables(config.model, data))
    tried = frontier.choose(max(least, _TRIED_AT * dense))
    felt = {name: method for name, method in tried.items() if tried.shares[name].error > 0}
    rises = measured_rises(config, data, source, felt, counts, curvature)
    found = {name: max(_LEAST, rise / tried.shares[name].error) for name, rise in rises.items()}
    for name, rise in rises.items():
        logger.info(
            "table %r: as %s the loss on validation rises by %.5f, predicted %.5f: predictions are multiplied by %.2f",
            *(name, felt[name].method, rise, tried.shares[name].error, found[name]),
        )
    return found


def measured_rises(
    config: RunConfig,
    data: ClickSource,
    source: Path,
    chosen: Mapping[str, MethodConfig],
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
) -> dict[str, float]:
    """Return by how much the loss on validation rises where one table alone is stored by its method, by table name.

    Args:
        config: of the run; so many rows of validation are scored as for its curvature.
        data: the rows.
        source: folder of the trained full model.
        chosen: methods by table name.
        counts: look-ups per id in train, (rows,) int64 by table.
        curvature: of the full model's loss, by table.
    """
    model, found = trained_model(config, data, source), {}
    tables = {table.name: table for table in make_tables(config.model, data)}
    model.eval()
    before = _loss(config, model, data)
    for name, method in chosen.items():
        alone = CompressedEmbeddingBagCollection([tables[name]], compression=method, seed=config.seed)
        bags: Any = model.embeddings
        weight: Tensor = bags.embedding_bags[name].weight.data
        mine = {name: curvature[name]} if name in curvature else {}
        compress_into(alone, {name: weight}, counts={name: counts[name]}, curvature=mine, seed=config.seed)
        kept, read = weight.clone(), row_reader(alone, name)
        for ids in torch.arange(len(weight)).split(_READ_ROWS):
            weight[ids] = read(ids)
        found[name] = _loss(config, model, data) - before
        weight.copy_(kept)
    return found


@torch.no_grad()
def _loss(config: RunConfig, model: ClickModel, data: ClickSource) -> float:
    """Return the mean cross-entropy over as many rows of validation as a curvature is measured on, the same ones."""
    total, rows = 0.0, 0.0
    batches = data.batches("valid", _BATCH, config.seed).epoch(0)
    for batch in islice(batches, math.ceil(config.curvature_rows / _BATCH)):
        logits = model(batch.features, batch.dense).logits.double()
        total += float(
            F.binary_cross_entropy_with_logits(logits, batch.labels.double(), reduction="none") @ batch.weights.double()
        )
        rows += float(batch.weights.sum())
    return total / rows


def _digest(curvature: Mapping[str, Curvature]) -> str:
    """Return a hash of what a curvature says of all tables."""
    found = hashlib.sha256()
    for name, each in sorted(curvature.items()):
        found.update(repr((name, each.num_embeddings, each.examples, each.lookups, each.width)).encode())
        found.update(each.matrix.contiguous().numpy().tobytes())
    return found.hexdigest()
