"""Bytes and error of every way to store one table, from a sample of its rows and as few fits as will do.

Codes of a table are fitted once without hot rows, and once more without its hottest rows where those have much of the
look-ups: the error of a tail is then the lesser of both, whatever the size of its head, and that of a head is the one
of its rows in few bits. Residual codes of all lengths come from one fit. Where rare ids share a row, their error is
that of their mean, and that of the others the one of codes that were fitted to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.compression.candidates import ONE_ROW, Tried, can_store, families_of, heads_of, partly_coded
from torchrec_compress.compression.knapsack import Candidate
from torchrec_compress.compression.rows import Rows
from torchrec_compress.fit.curvature import Curvature
from torchrec_compress.fit.kmeans import sample_points
from torchrec_compress.fit.lookups import by_lookups, ranks_by_lookups
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import (
    CodebookConfig,
    DenseConfig,
    Int4Config,
    Int8Config,
    MethodConfig,
    TableData,
    dense_bytes,
)
from torchrec_compress.methods.buckets import BucketSums

# A larger table is measured on a weighted sample of so many rows: 64 for each of 256 codewords.
_MEASURED_ROWS = 16384
# Codes are fitted a second time, without so many of the hottest rows, where those have so much of the look-ups.
_HOTTEST, _MUCH = 0.01, 0.2


@dataclass(frozen=True)
class Sample:
    """Rows of a table, the hottest first, and what an error of each costs.

    Attributes:
        table: the user's config.
        rank: directions that its rows lie in.
        data: of a fit, of these rows, without their weights.
        shares: (S,) float32, how many ids of its look-ups each row stands for.
        order: (S,) int64, the place of the sample's rows by look-ups in `data`.
        ranks: (S,) int64 ascending, in that order: 0 for the hottest id of the table.
        costs: (S,) float64, in that order, of a squared error, or of d^T F d.
        matrix: (D, D) float64, F, or None.
        noise: look-ups at which a row is half noise.
    """

    table: EmbeddingBagConfig
    rank: int
    data: TableData
    shares: Tensor
    order: Tensor
    ranks: Tensor
    costs: Tensor
    matrix: Tensor | None
    noise: float

    def data_of(self, method: MethodConfig) -> TableData:
        """Return the data of a fit of a method, which weighs rows in its own way."""
        if self.data.ids is None:
            return self.data
        weights = method.learning_weights(self.table, self.data)[self.data.ids] * self.shares
        return replace(self.data, weights=weights)

    def errors_before(self, served: Tensor) -> Tensor:
        """Return the error of the hottest rows, (S + 1,) float64: of none, of one, and so on.

        Args:
            served: (S, D) float32, in place of the rows of `data`.
        """
        gaps = (served - self.data.trained_rows(self.table))[self.order].double()
        felt = gaps if self.matrix is None else gaps @ self.matrix
        # rounding must not make a form that cannot be negative so
        errors = (felt * gaps).sum(dim=1).clamp(min=0) * self.costs
        return torch.cat([errors.new_zeros(1), errors.cumsum(0)])

    def hot_rows(self, num_hot_rows: int) -> int:
        """Return how many of the sample are among so many hottest rows of the table."""
        return int(torch.searchsorted(self.ranks, num_hot_rows))

    def error_of_mean(self, place: int) -> float:
        """Return the error where all rows but the `place` hottest are served their mean, as look-ups weigh it.

        It takes their noise away as well, see `share_of_signal`.
        """
        rare = self.order[place:]
        if not len(rare):
            return 0.0
        rows, counts = self.data.trained_rows(self.table), self.data.counts
        assert counts is not None
        seen = counts if self.data.ids is None else counts[self.data.ids]
        sums = BucketSums(1, rows.shape[1])
        weights = seen[rare].float().clamp(min=1e-3) * self.shares[rare]
        sums.add(rows[rare], torch.zeros(len(rare), dtype=torch.int64), weights)
        errors = self.errors_before(sums.means().expand_as(rows)).diff()[place:]
        return float(errors @ share_of_signal(seen[rare].double(), self.noise))


def share_of_signal(counts: Tensor, noise: float) -> Tensor:
    """Return what share of its error a row costs that is served the mean of its like, (N,) float64.

    A row that was learned from n look-ups is its true value and noise of a variance that falls as 1 / n. Where the two
    are alike at n0 look-ups, the mean, which knows nothing of that noise, is by (n - n0) / (n + n0) of the squared
    error worse than the row, and below n0 look-ups no worse (James-Stein; docs/curvature.md).

    Args:
        counts: (N,) float64, n.
        noise: n0; 0: rows are true.

    Example:
        >>> share_of_signal(torch.tensor([5.0, 10.0, 30.0, 90.0], dtype=torch.float64), noise=10.0).tolist()
        [0.0, 0.0, 0.5, 0.8]
    """
    if not noise:
        return torch.ones_like(counts)
    return ((counts - noise) / (counts + noise)).clamp(min=0)


def sample_of(rows: Rows, counts: Tensor, seed: int, curvature: Curvature | None, noise: float = 0.0) -> Sample:
    """Return a sample of a table that stands for all of it, weighted by look-ups, or all rows where they are few.

    Args:
        rows: of the table.
        counts: (N,) look-ups per id.
        seed: of the sample and of fits.
        curvature: of the loss, or None: errors are squared errors.
        noise: look-ups at which a row is half noise.
    """
    size = rows.table.num_embeddings
    drawn, ids, shares = popularity_weights(counts, "count", size), None, torch.ones(size)
    if size > _MEASURED_ROWS:
        ids, weights = sample_points(drawn, _MEASURED_ROWS, torch.Generator().manual_seed(seed))
        shares = weights / drawn[ids]
    mine = torch.arange(size) if ids is None else ids
    matrix = None if curvature is None else curvature.matrix
    metric = None if curvature is None or curvature.too_little else matrix
    data = TableData(rows.read(mine).float(), counts, seed=seed, ids=ids, curvature=metric)
    ranks, order = ranks_by_lookups(counts, mine)
    costs = drawn[mine].double()
    if curvature is not None:
        known = counts[mine].double()  # ids that were never looked up cost nothing
        costs = known * (0.5 * curvature.lookups / curvature.examples / max(1.0, float(counts.double().sum())))
    return Sample(rows.table, rows.rank, data, shares, order, ranks, (costs * shares)[order], matrix, noise)


def measure_candidates(sample: Sample, tried: Tried) -> list[Candidate[MethodConfig]]:
    """Return bytes and error of every way to store a table.

    Args:
        sample: of its rows.
        tried: codes.
    """
    table = sample.table
    found: list[Candidate[MethodConfig]] = [Candidate(dense_bytes(table), 0.0, DenseConfig())]
    for config in (Int8Config(), Int4Config()):
        if can_store(config, table):
            error = float(sample.errors_before(_served(config, sample))[-1])
            found.append(Candidate(config.stored_bytes(table), error, config))
    # codes that are no smaller than exact or nearly exact rows cannot win, and are not fitted
    limit = min(dense_bytes(table), *(each.num_bytes for each in found if each.option != Int4Config()))
    for family, lengths in families_of(table, tried, sample.rank):
        small = [m for m in lengths if replace(family, num_codes=m).stored_bytes(table) < limit]
        if small:
            found += [each for each in _measure_codes(sample, family, small) if each.num_bytes < limit]
    if can_store(ONE_ROW, table):
        found.append(Candidate(ONE_ROW.stored_bytes(table), sample.error_of_mean(0), ONE_ROW))
    return found


def _measure_codes(sample: Sample, family: CodebookConfig, lengths: Sequence[int]) -> Iterator[Candidate[MethodConfig]]:
    """Yield codes of all lengths with all heads, for all ids and for shares of them."""
    table = sample.table
    data, hot = sample.data_of(family), {}
    plain = {m: sample.errors_before(rows) for m, rows in family.serve_lengths(table, data, lengths)}
    tails = _without_hottest(sample, family, lengths)
    rest: dict[int, float] = {}  # by number of coded rows in the sample
    for length, errors in plain.items():
        for config in heads_of(table, replace(family, num_codes=length)):
            place, head, others = sample.hot_rows(config.num_hot_rows), 0.0, None
            if config.num_hot_rows:
                if config.hot_dtype not in hot:
                    hot[config.hot_dtype] = sample.errors_before(config.serve_hot(table, data))
                head = float(hot[config.hot_dtype][place])
                if length in tails and config.num_hot_rows >= tails[length][0]:
                    others = tails[length][1]
            for partly in partly_coded(table, config):
                last = len(errors) - 1 if partly.num_coded is None else sample.hot_rows(partly.num_coded)
                if last not in rest:
                    rest[last] = sample.error_of_mean(last)
                tail = min(float(each[last] - each[place]) for each in (errors, others) if each is not None)
                yield Candidate(partly.stored_bytes(table), head + max(0.0, tail) + rest[last], partly)


def _without_hottest(sample: Sample, family: CodebookConfig, lengths: Sequence[int]) -> dict[int, tuple[int, Tensor]]:
    """Return by length the head of a second fit and its `errors_before`; nothing where look-ups are spread out."""
    table, counts = sample.table, sample.data.counts
    assert counts is not None
    config = replace(family, num_hot_rows=round(_HOTTEST * table.num_embeddings))
    hottest = counts[by_lookups(counts, config.num_hot_rows)].double()
    if float(hottest.sum()) <= _MUCH * float(counts.double().sum()):
        return {}
    lengths = [m for m in lengths if can_store(replace(config, num_codes=m), table)]
    served = config.serve_lengths(table, sample.data_of(config), lengths) if lengths else ()
    return {m: (config.num_hot_rows, sample.errors_before(rows)) for m, rows in served}


@torch.no_grad()
def _served(config: MethodConfig, sample: Sample) -> Tensor:
    """Return what is served, (S, D), of a method that stores each row by itself: the sample is a table of its own."""
    rows = sample.data.trained_rows(sample.table)
    table = EmbeddingBagConfig(
        name=sample.table.name, num_embeddings=len(rows), embedding_dim=rows.shape[1], feature_names=[]
    )
    state = config.fit(table, TableData(rows, seed=sample.data.seed))
    decoder = config.decoder(table, None)
    assert decoder is not None and state.codes is not None
    return decoder(torch.arange(len(rows)), None, None, state.codes, [])
