"""What the loss on validation does where the rows of one table alone are served otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_compress import CompressedEmbeddingBagCollection, compress_into
from torchrec_compress.compression.measuring import share_of_signal
from torchrec_compress.compression.rows import rows_of
from torchrec_compress.convert import Curvature, predicted_rise, row_reader
from torchrec_compress.fit.lookups import by_lookups
from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.learned import RowReader
from torchrec_compress.methods.shared_row import SharedRow
from torchrec_compress.train.asked import validation
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.full import trained_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.models.recommender import Recommender

# The ids that share a row for a trial: all but the hottest, which have so much of the look-ups.
_OWN_LOOKUPS = 0.75
_HALVINGS = 40  # of the range of look-ups at which a row is half noise


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


class Rise(NamedTuple):
    """By how much the loss rises.

    Attributes:
        measured: over the rows of validation that the curvature is measured on.
        spread: standard error of it, as a mean over these rows.
        predicted: by the curvature.
    """

    measured: float
    spread: float
    predicted: float


def measured_rises(chosen: Mapping[str, MethodConfig], known: Known) -> dict[str, Rise]:
    """Return what the loss does where one table alone is stored by its method, by table name.

    Args:
        chosen: methods by table name.
        known: of the model.
    """
    found, tables = {}, {table.name: table for table in known.tables}
    trial = _Trial(known)
    for name, method in chosen.items():
        alone = CompressedEmbeddingBagCollection([tables[name]], compression=method, seed=known.config.seed)
        mine = {name: known.curvature[name]} if name in known.curvature else {}
        rows = {name: trial.rows(name)}
        compress_into(alone, rows, counts={name: known.counts[name]}, curvature=mine, seed=known.config.seed)
        found[name] = trial.rise(name, row_reader(alone, name))
    return found


class Sharing(NamedTuple):
    """What was found where the rare ids of a table share a row.

    Attributes:
        rise: of the loss.
        costs: (S,) float64, what the error of each of these ids is predicted to cost; they add up to `rise.predicted`.
        counts: (S,) float64, look-ups of each.
    """

    rise: Rise
    costs: Tensor
    counts: Tensor


def shared_rises(names: list[str], known: Known) -> dict[str, Sharing]:
    """Return what the loss does where the ids with the last quarter of look-ups of one table share their mean row.

    Args:
        names: of tables.
        known: of the model.
    """
    trial, found = _Trial(known), {}
    for name in names:
        counts = known.counts[name].double()
        order = by_lookups(counts, len(counts))
        num_own = int((counts[order].cumsum(0) < _OWN_LOOKUPS * counts.sum()).sum())
        rare = order[num_own:]
        read = trial.rows(name)
        rows = read(rare).double()
        mean = (counts[rare] @ rows) / counts[rare].sum()
        is_own = torch.ones(len(counts), dtype=torch.bool)
        is_own[rare] = False
        shared = SharedRow(is_own, mean.float())
        rise = trial.rise(name, lambda ids, read=read, shared=shared: shared.in_place(ids, read(ids).float()))
        curvature, gaps = known.curvature[name], mean - rows
        per_lookup = 0.5 * curvature.lookups / curvature.examples / float(counts.sum())
        costs = ((gaps @ curvature.matrix) * gaps).sum(dim=1).clamp(min=0) * counts[rare] * per_lookup
        found[name] = Sharing(rise, costs, counts[rare])
    return found


def noise_of(sharing: Sharing, factor: float) -> float:
    """Return the look-ups at which a row is half noise: those that make the prediction what was measured.

    Args:
        sharing: of a table's rare ids; one standard error is added to what was measured, so that chance spares no id.
        factor: by what the table's predictions are multiplied.
    """
    target = max(0.0, sharing.rise.measured + sharing.rise.spread) / factor
    low, high = 0.0, float(sharing.counts.max())  # more is not known of hotter ids
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        predicted = float(sharing.costs @ share_of_signal(sharing.counts, middle))
        low, high = (low, middle) if predicted < target else (middle, high)
    return low


class _Trial:
    """The trained model, of which one table after another is served otherwise."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._model: Recommender = trained_model(known.config, known.data, known.source)
        self._model.eval()
        self._trained = self._model.embeddings
        self._rows = rows_of("measured rise", self._trained)
        self._before = self._losses()

    def rows(self, name: str) -> RowReader:
        """Return what reads the trained rows of a table."""
        return self._rows[name].read

    def rise(self, name: str, served: RowReader) -> Rise:
        """Return what the loss does where a table serves other rows."""
        known = self._known
        (table,) = [table for table in known.tables if table.name == name]
        self._model.embeddings = _Altered(self._trained, table, self.rows(name), served)  # type: ignore[assignment]
        after, weights = self._losses()
        self._model.embeddings = self._trained
        gaps, total = after - self._before[0], weights.sum()
        measured = float(gaps @ weights / total)
        spread = float(((weights * (gaps - measured)).square().sum()).sqrt() / total)
        mine = known.curvature.get(name)
        predicted = 0.0 if mine is None else predicted_rise(self.rows(name), served, known.counts[name], mine)
        return Rise(measured, spread, predicted)

    @torch.no_grad()
    def _losses(self) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the rows of validation that a curvature is measured on, and their weights."""
        losses, weights = [], []
        for batch in validation(self._known.config, self._known.data):
            logits = self._model(batch.features, batch.dense).logits.double()
            losses.append(F.binary_cross_entropy_with_logits(logits, batch.labels.double(), reduction="none"))
            weights.append(batch.weights.double())
        return torch.cat(losses), torch.cat(weights)


class _Altered(nn.Module):
    """A collection of which one table serves other rows."""

    def __init__(self, trained: nn.Module, table: EmbeddingBagConfig, before: RowReader, served: RowReader) -> None:
        super().__init__()
        self._trained, self._table, self._before, self._served = trained, table, before, served

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self._trained(features).to_dict()
        for name in self._table.feature_names:
            ids, lengths = features[name].values().long(), features[name].lengths().long()
            gaps = self._served(ids).detach().float() - self._before(ids).detach().float()
            bags = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            sums = gaps.new_zeros(len(lengths), gaps.shape[1]).index_add_(0, bags, gaps)
            if self._table.pooling == PoolingType.MEAN:
                sums /= lengths.clamp(min=1).unsqueeze(1)
            pooled[name] = pooled[name] + sums
        return KeyedTensor(list(pooled), [each.shape[1] for each in pooled.values()], torch.cat([*pooled.values()], 1))
