"""Which methods a budget of bytes gives to the tables of the trained model of stage 1."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_compress import CompressedEmbeddingBagCollection, compress_into
from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.compression.rows import rows_of
from torchrec_compress.convert import Curvature
from torchrec_compress.methods import MethodConfig
from torchrec_compress.train.asked import validation
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import tried_by
from torchrec_compress.train.config import RunConfig, fingerprint
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.fitting import FullTables
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.click import ClickModel, make_tables
from torchrec_compress.train.sealed import is_done, publish, read_json, write_json

logger = logging.getLogger(__name__)

# Where predictions are held against measurements: as a budget of a fiftieth would store a table.
_TRIED_AT = 0.02
# The least of a prediction that is believed: an error that does good on a sample of validation is not free elsewhere.
_LEAST = 0.05
# What is tried beside codes; a frontier that was kept without one of them is measured anew.
_OTHERS = ["dense", "int8", "int4", "one row"]
# The share of all predicted errors from which one is measured.
_SEEN = 0.001


class Known(NamedTuple):
    """What is known of the trained model of stage 1.

    Attributes:
        config: of the run.
        data: the rows.
        source: folder of the model.
        counts: look-ups per id in train, (rows,) int64 by table.
        curvature: of its loss, by table; empty: errors are squared errors of rows.
    """

    config: RunConfig
    data: ClickSource
    source: Path
    counts: Mapping[str, Tensor]
    curvature: Mapping[str, Curvature]

    @property
    def tables(self) -> list[EmbeddingBagConfig]:
        """Its tables."""
        return make_tables(self.config.model, self.data)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all of them, were they full."""
        return sum(4 * table.num_embeddings * table.embedding_dim for table in self.tables)


def choose(budget: Budget, known: Known, kept: Path) -> dict[str, Any]:
    """Return the methods that are chosen for a budget, as plain data, and keep them and what they were chosen from.

    Rank 0 alone calls it.

    Args:
        budget: of bytes, over all tables.
        known: of the model.
        kept: the file.
    """
    if not is_done(kept):
        wanted = budget.num_bytes(known.dense_bytes)
        choice = _frontier(budget, known).choose(wanted)
        logger.info("methods for %s bytes:\n%s", f"{wanted:,}", choice)
        write_json(kept, {name: method.to_dict() for name, method in choice.items()})
    return read_json(kept)


def _frontier(budget: Budget, known: Known) -> Frontier:
    """Return what every table costs at every size; measured once for all budgets of a model, and kept beside it.

    Raises:
        ValueError: what was kept is damaged, or of another model, curvature or other settings.
    """
    config, source, curvature, tables = known.config, known.source, known.curvature, known.tables
    best = best_checkpoint(source)
    settings: dict[str, Any] = {"codes": budget.codes, "num_codes": budget.num_codes, "widths": budget.widths}
    settings |= {"seed": config.seed, "others": _OTHERS}
    settings |= {"curvature": _digest(curvature) if curvature else None, "curvature_rows": config.curvature_rows}
    model = read_json(source / "summary.json", keys=("identity",))["identity"]
    told = {**settings, "model": model, "checkpoint": best.name}
    folder = source / "frontiers" / fingerprint(settings)
    path, remedy = folder / "frontier.json", f"delete {folder}, the same command makes it again"
    if not is_done(path):
        tried = tried_by(budget)
        options = {"num_codes": tried.num_codes, "widths": tried.widths, "codes": tried.codes, "seed": config.seed}
        if config.pretrain_compression:
            rows: Any = trained_model(config, known.data, source).embeddings
        else:
            rows = dict(FullTables(best, tables))
        measured = measure_frontier(rows, known.counts, curvature=curvature or None, **options)
        del rows
        if curvature:
            measured = measured.scaled(_factors(measured, known))
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


def _factors(frontier: Frontier, known: Known) -> dict[str, float]:
    """Return by what the predictions of each table must be multiplied to be what is measured at one of its sizes.

    Predictions rank the fits of one table, but not tables against each other: the rows of a flat table hold noise of
    their own clicks, which errors take away (docs/curvature.md). Where next to nothing is predicted, what is measured
    would be rounding, and the prediction stays.
    """
    least = sum(some[0].num_bytes for some in frontier.candidates.values())
    tried = frontier.choose(max(least, _TRIED_AT * known.dense_bytes))
    felt = {name: method for name, method in tried.items() if tried.shares[name].error > _SEEN * tried.error}
    rises = measured_rises(felt, known)
    found = {name: max(_LEAST, rise / tried.shares[name].error) for name, rise in rises.items()}
    for name, rise in rises.items():
        logger.info(
            "table %r: as %s the loss on validation rises by %.5f, predicted %.5f: predictions are multiplied by %.2f",
            *(name, felt[name].method, rise, tried.shares[name].error, found[name]),
        )
    return found


def measured_rises(chosen: Mapping[str, MethodConfig], known: Known) -> dict[str, float]:
    """Return by how much the loss on validation rises where one table alone is stored by its method, by table name.

    Args:
        chosen: methods by table name.
        known: of the model; the rows of validation are those of its curvature.
    """
    config, model, found = known.config, trained_model(known.config, known.data, known.source), {}
    tables = {table.name: table for table in known.tables}
    model.eval()
    trained, before = model.embeddings, _loss(model, known)
    for name, method in chosen.items():
        alone = CompressedEmbeddingBagCollection([tables[name]], compression=method, seed=config.seed)
        mine = {name: known.curvature[name]} if name in known.curvature else {}
        rows = rows_of("measured_rises", trained)[name].read
        compress_into(alone, {name: rows}, counts={name: known.counts[name]}, curvature=mine, seed=config.seed)
        model.embeddings = _WithOne(trained, alone)  # type: ignore[assignment]
        found[name] = _loss(model, known) - before
    return found


class _WithOne(nn.Module):
    """A collection of which one table is served by another."""

    def __init__(self, trained: nn.Module, alone: nn.Module) -> None:
        super().__init__()
        self._trained, self._alone = trained, alone

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = {**self._trained(features).to_dict(), **self._alone(features).to_dict()}
        return KeyedTensor(list(pooled), [each.shape[1] for each in pooled.values()], torch.cat([*pooled.values()], 1))


@torch.no_grad()
def _loss(model: ClickModel, known: Known) -> float:
    """Return the mean cross-entropy over the rows of validation that a curvature is measured on."""
    total, rows = 0.0, 0.0
    for batch in validation(known.config, known.data):
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
