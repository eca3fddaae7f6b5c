"""Share a byte budget out over tables, so that bytes follow look-ups."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from tqdm import tqdm

from torchrec_compress.compression.candidates import LENGTHS, ONE_ROW, USUAL, Tried
from torchrec_compress.compression.frontier import Choice, Frontier, check_budget
from torchrec_compress.compression.knapsack import Candidate, undominated
from torchrec_compress.compression.measuring import measure_candidates, sample_of
from torchrec_compress.compression.rows import Compressed, Rows, rows_of
from torchrec_compress.fit.checks import check_counts, check_seed
from torchrec_compress.fit.curvature import Curvature, check_own
from torchrec_compress.methods import CodebookConfig, DenseConfig, as_codebook

logger = logging.getLogger(__name__)


def for_budget(
    tables: EmbeddingBagCollection | EmbeddingCollection | Compressed | Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    budget_bytes: float,
    *,
    curvature: Mapping[str, Curvature] | None = None,
    num_codes: Sequence[int] = LENGTHS,
    widths: Sequence[int] = (),
    codes: CodebookConfig | None = None,
    noise: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """Choose a method for every table so that all of them together fit a budget with the least error.

    With a curvature the error is the predicted rise of the loss, one unit for all tables, and codes are fitted in that
    metric; without one, the squared error of every row times its count in training, summed over all tables. For
    several budgets, `measure_frontier` once and `choose` from it.

    Args:
        tables, counts, curvature, num_codes, widths, codes, noise, seed, progress: as for `measure_frontier`.
        budget_bytes: for all tables, everything counted (codes, codebooks, hot rows, dense tables).

    Returns:
        The method by table name, to be passed to `compress`; printed, what each table has of the budget.

    Raises:
        ValueError: as `measure_frontier`; the budget is no number of bytes, or below the smallest choice (which is
            named).

    Example:
        >>> rows = {"user": torch.randn(4000, 16), "day": torch.randn(7, 16)}
        >>> counts = {"user": torch.arange(4000), "day": torch.full((7,), 9)}
        >>> {name: method.method for name, method in for_budget(rows, counts, 30_000, num_codes=(2,)).items()}
        {'user': 'pq', 'day': 'dense'}
    """
    check_budget("for_budget", budget_bytes)
    tried = _tried("for_budget", codes, num_codes, widths)
    return _measure(
        "for_budget", tables, counts, curvature, tried, {} if noise is None else noise, seed, progress
    ).choose(budget_bytes)


def measure_frontier(
    tables: EmbeddingBagCollection | EmbeddingCollection | Compressed | Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    *,
    curvature: Mapping[str, Curvature] | None = None,
    num_codes: Sequence[int] = LENGTHS,
    widths: Sequence[int] = (),
    codes: CodebookConfig | None = None,
    noise: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Frontier:
    """Measure what every table costs at every size.

    Each table is tried dense, int8, int4, as one row for all ids, and as product and residual codes of several
    lengths, with hot heads of several sizes in int4 and int8, unless a code is no smaller than int8 rows. Errors are
    estimates: of short fits on 16,384 rows, drawn by look-ups, of a larger table, and one or two fits for all heads
    (benchmarks/budget.md).
    Codes of a table that was trained small, whose rows are read by ids, are codes of its narrow rows.

    Args:
        tables: a trained collection, compressed or not, or rows, (N, D) float32 by table name.
        counts: look-ups per id in training, (N,) by table name, for every table.
        curvature: what `measure_curvature` found of that model, of every table that was looked up. None: squared error.
        num_codes: code lengths to try; of residual codes 2 to 8, of product codes those that divide the width.
        widths: numbers of a codeword to try beside those of the rows, see `CodebookConfig`: each costs fits of its own.
        codes: the method of codes that is tried beside residual ones, default `PQConfig(popularity="count")`; its
            num_codes, tiers and width are replaced.
        noise: by table name, look-ups in training at which a row is half noise, 0 for those left out: so a row that few
            clicks taught loses less where its id shares one (`measuring.share_of_signal`). The trainer measures it.
        seed: of the fits.
        progress: whether to show a progress bar.

    Raises:
        ValueError: counts lack a table or are not finite, rows are not finite; a table with look-ups has no curvature,
            or that of another table or model; noise is no look-ups of these tables.

    Example:
        >>> rows, counts = {"user": torch.randn(4000, 16)}, {"user": torch.arange(4000)}
        >>> frontier = measure_frontier(rows, counts, num_codes=(1, 2))
        >>> frontier.choose(30_000).error > frontier.choose(60_000).error
        True
    """
    tried = _tried("measure_frontier", codes, num_codes, widths)
    return _measure(
        "measure_frontier", tables, counts, curvature, tried, {} if noise is None else noise, seed, progress
    )


def _measure(
    where: str,
    tables: Any,
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature] | None,
    tried: Tried,
    noise: Mapping[str, float],
    seed: int,
    progress: bool,
) -> Frontier:
    """Do as `measure_frontier` says, with `where` in errors."""
    rows, found = rows_of(where, tables), {}
    _check_counts(where, rows, counts)
    check_seed(where, seed)
    _check_noise(where, rows, noise)
    known = {} if curvature is None else _check_curvature(where, rows, counts, curvature)
    bar = tqdm(rows.items(), desc="measuring candidates", unit="table", disable=not progress, leave=False)
    with bar, torch.inference_mode(False):  # some methods train in their fits
        for name, mine in bar:
            bar.set_postfix_str(name)
            if curvature is not None and name not in known:
                found[name] = [Candidate(ONE_ROW.stored_bytes(mine.table), 0.0, ONE_ROW)]  # its errors cost nothing
                continue
            sample = sample_of(mine, counts[name].detach().cpu(), int(seed), known.get(name), float(noise.get(name, 0)))
            found[name] = undominated(name, measure_candidates(sample, tried))
    sizes = {name: (mine.table.num_embeddings, mine.table.embedding_dim) for name, mine in rows.items()}
    return Frontier(sizes, found, "squared error" if curvature is None else "loss")


def _check_curvature(
    where: str, tables: Mapping[str, Rows], counts: Mapping[str, Tensor], curvature: Any
) -> dict[str, Curvature]:
    """Return the curvature of every table that was looked up, or raise ValueError where there is none or another's."""
    if not isinstance(curvature, Mapping):
        raise ValueError(f"{where}: curvature must be a mapping by table name, got {type(curvature).__name__}")
    unknown = sorted(set(curvature) - set(tables), key=str)
    if unknown:
        raise ValueError(f"{where}: curvature must name tables of {sorted(tables)}, got {unknown}")
    found = {}
    for name, rows in tables.items():
        mine = curvature.get(name)
        if mine is not None:
            check_own(name, mine, rows.table.num_embeddings, rows.table.embedding_dim)
            mine.check_rows(rows.read)
        if not bool((counts[name] > 0).any()):
            logger.info("table %r: never looked up, stored in as few bytes as it can be", name)
        elif mine is None or not mine.lookups:
            raise ValueError(
                f"{where}: table {name!r}: must have a curvature that tells what its errors cost, as it was looked "
                f"up in training, got {'none' if mine is None else 'one of no look-ups'}; measure more batches, or "
                "pass no curvature at all"
            )
        else:
            if mine.too_little:
                logger.warning("table %r: fitted to squared error, not to the loss: %s", name, mine.too_little)
            found[name] = mine
    return found


def _check_counts(where: str, tables: Mapping[str, Rows], counts: Any) -> None:
    """Raise ValueError unless there are look-ups of every id of every table."""
    if not isinstance(counts, Mapping):
        raise ValueError(f"{where}: counts must be a mapping by table name, got {type(counts).__name__}")
    missing = sorted(set(tables) ^ set(counts))
    if missing:
        raise ValueError(f"{where}: tables and counts must name the same tables, got only one of the two for {missing}")
    for name, rows in tables.items():
        check_counts(f"{where}: table {name!r}", counts[name], rows.table.num_embeddings)


def _check_noise(where: str, tables: Mapping[str, Rows], noise: Any) -> None:
    """Raise ValueError unless look-ups are numbers of tables, finite and not negative."""
    if not isinstance(noise, Mapping) or not set(noise) <= set(tables):
        raise ValueError(f"{where}: noise must be look-ups by name of tables {sorted(tables)}, got {noise!r:.200}")
    for name, lookups in noise.items():
        if isinstance(lookups, bool) or not isinstance(lookups, Real) or not 0 <= float(lookups) < math.inf:
            raise ValueError(f"{where}: table {name!r}: noise must be finite look-ups >= 0, got {lookups!r}")


def _tried(where: str, codes: CodebookConfig | None, num_codes: Sequence[int], widths: Sequence[int]) -> Tried:
    """Return what is tried, or raise ValueError for what would fail, or be ignored, once candidates are measured."""
    for what, given in (("num_codes must be code lengths", num_codes), ("widths must be numbers", widths)):
        if any(isinstance(each, bool) or not isinstance(each, Integral) or each < 1 for each in given):
            raise ValueError(f"{where}: {what} of at least 1, got {given!r}")
    if len(num_codes) == 0:
        raise ValueError(f"{where}: num_codes must be code lengths of at least 1, got {num_codes!r}")
    if codes is not None and as_codebook(codes) is None:
        raise ValueError(f"{where}: codes must be a method of codes such as PQConfig(num_codes=1), got {codes!r}")
    if codes is not None and codes.needs == "contexts":
        raise ValueError(f"{where}: codes must be fitted to rows alone, got {codes.method!r}, which needs contexts")
    return Tried(codes or USUAL, num_codes, widths)


def smallest_bytes(tables: Sequence[EmbeddingBagConfig]) -> int:
    """Return the least bytes that `for_budget` can store tables in, from their sizes alone: one row each.

    Example:
        >>> smallest_bytes([EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=4)])
        16
    """
    return sum(ONE_ROW.stored_bytes(table) for table in tables)


def maybe_dense(tables: Sequence[EmbeddingBagConfig], budget_bytes: int) -> list[str]:
    """Return the tables that `for_budget` could leave dense, from their sizes alone.

    Example:
        >>> day = EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=4)
        >>> user = EmbeddingBagConfig(name="user", num_embeddings=1000, embedding_dim=4)
        >>> maybe_dense([day, user], 8000)
        ['day']
    """
    left = budget_bytes - smallest_bytes(tables)
    return [table.name for table in tables if DenseConfig().stored_bytes(table) - ONE_ROW.stored_bytes(table) <= left]
