"""Stage two: which method serves which table, and the fit of the tables to the model of stage one."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress import CompressedEmbeddingBagCollection, compress_into
from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.convert import Curvature, predicted_rise, row_reader
from torchrec_compress.methods.learned import RowReader
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import base_of
from torchrec_compress.train.config import RunConfig, fingerprint
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.click import ClickModel, make_tables
from torchrec_compress.train.sealed import is_done, publish, read_json, save_tensors, write_json

logger = logging.getLogger(__name__)

_MAX_PAIRS = 2_000_000
_READ_ROWS = 65_536
PREDICTED = "predicted.json"


class _Tables(Mapping[str, Tensor]):
    """The rows of a full model's tables, (N, D) float32 by name, read one at a time: all may not fit in memory."""

    def __init__(self, path: Path, tables: Sequence[EmbeddingBagConfig]) -> None:
        self._path, self._tables = path, {table.name: table for table in tables}

    def __getitem__(self, name: str) -> Tensor:
        table = self._tables[name]
        key = f"embeddings.embedding_bags.{name}.weight"
        state = {"model": {key: torch.empty(table.num_embeddings, table.embedding_dim)}}
        read(self._path, state)
        return state["model"][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


def fit(
    config: RunConfig,
    data: ClickSource,
    source: Path | None,
    kept: Path,
    model: ClickModel,
    counts: dict[str, Tensor],
    curvature: Mapping[str, Curvature],
) -> None:
    """Write a model with fitted tables to a file, unless it is there, and what its errors should cost beside it.

    Rank 0 alone calls it.

    Args:
        config: the run.
        data: the rows.
        source: folder of the trained model of stage 1, or None to start from scratch.
        kept: the file; beside it `predicted.json`, the rise of the loss by table, where there is a curvature.
        model: with unfitted tables; filled in place.
        counts: look-ups per id in train, (rows,) int64 by table.
        curvature: of the loss of the model of stage 1 by table, or empty to fit to squared error.
    """
    predicted = kept.with_name(PREDICTED)
    if is_done(kept) and (not curvature or is_done(predicted)):
        return
    collection = model.embeddings
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    tables = make_tables(config.model, data)
    contexts = _contexts(config, data, collection.methods())
    rows: Mapping[str, Tensor | RowReader] = {}
    if source is not None and config.pretrain_compression:
        small = trained_model(config, data, source).embeddings
        assert isinstance(small, CompressedEmbeddingBagCollection)
        rows = {table.name: row_reader(small, table.name) for table in tables}
    elif source is not None:
        rows = _Tables(best_checkpoint(source), tables)
    compress_into(collection, rows, counts=counts, contexts=contexts, curvature=curvature, seed=config.seed)
    if source is not None:
        net = {name: value for name, value in model.state_dict().items() if not name.startswith("embeddings.")}
        read(best_checkpoint(source), {"model": net})
        model.load_state_dict(net, strict=False)
    if curvature:
        write_json(predicted, _predicted(collection, rows, counts, curvature))
    save_tensors(kept, dict(model.state_dict()))


def _predicted(
    collection: CompressedEmbeddingBagCollection,
    rows: Mapping[str, Tensor | RowReader],
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
) -> dict[str, float]:
    """Return the rise of the loss that is predicted for the errors of each table; none for one that was never read."""
    return {
        name: predicted_rise(rows[name], row_reader(collection, name), counts[name], mine)
        for name, mine in curvature.items()
        if mine.lookups and bool((counts[name] > 0).any())
    }


def choose(
    budget: Budget,
    tables: Sequence[EmbeddingBagConfig],
    source: Path,
    kept: Path,
    counts: dict[str, Tensor],
    seed: int,
    curvature: Mapping[str, Curvature] | None = None,
) -> dict[str, Any]:
    """Return the methods that are chosen for a budget, as plain data, and keep them and what they were chosen from.

    Rank 0 alone calls it.

    Args:
        budget: of bytes, over all tables.
        tables: the full model's.
        source: folder of the trained full model.
        kept: the file.
        counts: look-ups per id in train, (rows,) int64 by table.
        seed: of the fits that are tried.
        curvature: of the full model's loss, by table; None: errors are squared errors of rows.
    """
    if not is_done(kept):
        dense = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
        choice = _frontier(budget, tables, source, counts, seed, curvature).choose(budget.num_bytes(dense))
        logger.info("methods for %s bytes:\n%s", f"{budget.num_bytes(dense):,}", choice)
        write_json(kept, {name: method.to_dict() for name, method in choice.items()})
    return read_json(kept)


def _frontier(
    budget: Budget,
    tables: Sequence[EmbeddingBagConfig],
    source: Path,
    counts: dict[str, Tensor],
    seed: int,
    curvature: Mapping[str, Curvature] | None,
) -> Frontier:
    """Return what every table costs at every size; measured once for all budgets of a full model, and kept beside it.

    Raises:
        ValueError: what was kept is damaged, or of another model, curvature or other settings.
    """
    best = best_checkpoint(source)
    settings = {"codes": budget.codes, "num_codes": budget.num_codes, "seed": seed, "curvature": _digest(curvature)}
    model = read_json(source / "summary.json", keys=("identity",))["identity"]
    told = {**settings, "model": model, "checkpoint": best.name}
    folder = source / "frontiers" / fingerprint(settings)
    path, remedy = folder / "frontier.json", f"delete {folder}, the same command makes it again"
    if not is_done(path):
        rows = dict(_Tables(best, tables))
        options = {"num_codes": budget.num_codes, "codes": base_of(budget), "seed": seed}
        measured = measure_frontier(rows, counts, curvature=curvature, **options)
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


def _digest(curvature: Mapping[str, Curvature] | None) -> str | None:
    """Return a hash of what a curvature says of all tables."""
    if curvature is None:
        return None
    found = hashlib.sha256()
    for name, each in sorted(curvature.items()):
        found.update(repr((name, each.num_embeddings, each.examples, each.lookups, each.width)).encode())
        found.update(each.matrix.contiguous().numpy().tobytes())
    return found.hexdigest()


def _contexts(config: RunConfig, data: ClickSource, methods: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of ids that occur together in clicks, for the tables whose method asks for them."""
    others = {}
    for name in (name for name, method in methods.items() if method.needs == "contexts"):
        rest = [other for other in data.features if other != name]
        other = config.context.get(name) or max(rest, key=lambda key: data.vocab[data.features.index(key)])
        if other not in data.features or other == name:
            raise ValueError(f"context.{name}: must be another table of {data.features}, got {other!r}")
        widths = [data.layout.columns(key) for key in (name, other)]
        if any(columns.stop - columns.start != 1 for columns in widths):
            raise ValueError(f"context.{name}: must pair features of one id per row, got {name!r} and {other!r}")
        others[name] = other
    return _pairs(data, others) if others else {}


def _pairs(data: ClickSource, others: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ids of both features of every pair in the first clicks, (P,) int64 each, by the first feature."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in others}
    left = _MAX_PAIRS
    for batch in data.batches("train", _READ_ROWS, None).epoch(0):
        clicked = ((batch.labels > 0.5) & (batch.weights > 0)).nonzero().squeeze(1)[:left]
        for name, other in others.items():
            first, second = (batch.features[key].values()[clicked].long() for key in (name, other))
            found[name].append((first, second))
        left -= len(clicked)
        if left <= 0:
            break
    return {name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for name, parts in found.items()}
