"""Stage two: the fit of the tables to the model of stage one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from torchrec_compress import compress_into
from torchrec_compress.convert import Curvature, predicted_rise, row_reader
from torchrec_compress.fit.contexts import Contexts
from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.learned import RowReader
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.kinds import CompressedTables, make_tables
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.sealed import is_done, save_tensors, write_json

_MAX_PAIRS = 2_000_000
_READ_ROWS = 65_536
PREDICTED = "predicted.json"


class FullTables(Mapping[str, Tensor]):
    """The rows of a full model's tables, (N, D) float32 by name, read one at a time: all may not fit in memory."""

    def __init__(self, path: Path, tables: Sequence[EmbeddingBagConfig | EmbeddingConfig]) -> None:
        self._path, self._tables = path, {table.name: table for table in tables}

    def __getitem__(self, name: str) -> Tensor:
        table = self._tables[name]
        kind = "embedding_bags" if isinstance(table, EmbeddingBagConfig) else "embeddings"
        key = f"embeddings.{kind}.{name}.weight"
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
    model: Recommender,
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
    assert isinstance(collection, CompressedTables)
    tables = make_tables(config.model, data)
    contexts = _contexts(config, data, tables, collection.methods())
    rows: Mapping[str, Tensor | RowReader] = {}
    if source is not None and config.pretrain_compression:
        small = trained_model(config, data, source).embeddings
        assert isinstance(small, CompressedTables)
        rows = {table.name: row_reader(small, table.name) for table in tables}
    elif source is not None:
        rows = FullTables(best_checkpoint(source), tables)
    compress_into(collection, rows, counts=counts, contexts=contexts, curvature=curvature, seed=config.seed)
    if source is not None:
        net = {name: value for name, value in model.state_dict().items() if not name.startswith("embeddings.")}
        read(best_checkpoint(source), {"model": net})
        model.load_state_dict(net, strict=False)
    if curvature:
        write_json(predicted, _predicted(collection, rows, counts, curvature))
    save_tensors(kept, dict(model.state_dict()))


def _predicted(
    collection: CompressedTables,
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


def _contexts(
    config: RunConfig, data: ClickSource, tables: Sequence[EmbeddingBagConfig], methods: Mapping[str, MethodConfig]
) -> dict[str, Contexts]:
    """Return what ids occur with in clicks, for the tables whose method asks for it."""
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
    found = {table.name: methods[table.name].sketch(table, config.seed) for table in tables if table.name in others}
    sketches = {name: sketch for name, sketch in found.items() if sketch is not None}
    for pairs in _pairs(data, {name: others[name] for name in sketches}, None):
        for name, (ids, contexts) in pairs.items():
            sketches[name].add(ids, contexts)
    few = list(_pairs(data, {name: others[name] for name in others if name not in sketches}, _MAX_PAIRS))
    whole = {
        name: tuple(torch.cat([pairs[name][side] for pairs in few]) for side in (0, 1)) for name in (few or [{}])[0]
    }
    return {**sketches, **whole}  # type: ignore[dict-item]


def _pairs(
    data: ClickSource, others: Mapping[str, str], most: int | None
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield the ids of both features of every pair in clicks, (P,) int64 each, by the first feature.

    Args:
        data: the rows.
        others: the second feature by the first; without any nothing is read.
        most: clicks that count, the first ones; None: all.
    """
    left = most
    for batch in data.batches("train", _READ_ROWS, None).epoch(0) if others else ():
        clicked = ((batch.labels > 0.5) & (batch.weights > 0)).nonzero().squeeze(1)[:left]
        yield {
            name: (batch.features[name].values()[clicked].long(), batch.features[other].values()[clicked].long())
            for name, other in others.items()
        }
        left = None if left is None else left - len(clicked)
        if left is not None and left <= 0:
            break
