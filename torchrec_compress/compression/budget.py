"""Share a byte budget out over tables, so that bytes follow look-ups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from tqdm import tqdm

from torchrec_compress.compression.candidates import candidates_of, with_finer_heads
from torchrec_compress.compression.knapsack import Candidate, allocate
from torchrec_compress.fit.checks import check_counts, check_seed
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import (
    CodebookConfig,
    DenseConfig,
    MethodConfig,
    PQConfig,
    TableData,
    as_codebook,
)
from torchrec_compress.methods.learned import check_trained_rows
from torchrec_compress.names import kind_of

_USUAL = PQConfig(num_codes=1, popularity="count")
# A larger table is measured on a sample of so many rows: enough to fit 256 codewords as well as all rows would.
_MAX_MEASURED_ROWS = 65536


def for_budget(
    tables: EmbeddingBagCollection | EmbeddingCollection | Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    budget_bytes: int,
    *,
    num_codes: Sequence[int] = (1, 2, 4, 8, 16),
    codes: CodebookConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, MethodConfig]:
    """Choose a method for every table so that all of them together fit a budget with the least error.

    The error of a choice is what look-ups meet: the squared error of every row times its count in training, summed over
    all tables. Each table is tried dense, int8, int4, and as product and residual codes of several lengths with hot
    heads of several sizes in int4 and int8. Every candidate is fitted and measured (on 65,536 rows of a larger table),
    so this takes a few minutes for a few large tables.

    Args:
        tables: a trained collection, or its rows, (N, D) float32 by table name.
        counts: look-ups per id in training, (N,) by table name, for every table.
        budget_bytes: for all tables, everything counted (codes, codebooks, hot rows, dense tables).
        num_codes: code lengths to try.
        codes: the product-code method that candidates are made of, default `PQConfig(popularity="count")`; its
            num_codes and tiers are replaced.
        seed: of the fits.
        progress: whether to show a progress bar.

    Returns:
        The method by table name, to be passed to `compress`.

    Raises:
        ValueError: counts lack a table or are not finite, rows are not finite, or the budget is no number of bytes, or
            below the smallest choice (which is named).

    Example:
        >>> rows = {"user": torch.randn(4000, 16), "day": torch.randn(7, 16)}
        >>> counts = {"user": torch.arange(4000), "day": torch.full((7,), 9)}
        >>> {name: method.method for name, method in for_budget(rows, counts, 30_000, num_codes=(2,)).items()}
        {'user': 'pq', 'day': 'dense'}
    """
    tables = _rows_of(tables)
    _check_arguments(tables, counts, budget_bytes, num_codes, codes, seed)
    base = codes or _USUAL
    candidates: dict[str, list[Candidate[MethodConfig]]] = {}
    bar = tqdm(tables.items(), desc="measuring candidates", unit="table", disable=not progress, leave=False)
    with bar, torch.inference_mode(False):  # some methods train in their fits
        for name, rows in bar:
            bar.set_postfix_str(name)
            candidates[name] = measure_candidates(name, rows, counts[name].cpu(), base, num_codes, seed)
    return {name: choice.option for name, choice in allocate(candidates, budget_bytes).choices.items()}


def _rows_of(tables: Any) -> dict[str, Tensor]:
    """Return the rows by table name, (N, D) float32 in the host's memory."""
    stored: Any = tables
    if isinstance(tables, EmbeddingBagCollection | EmbeddingCollection):
        modules: Any = tables.embeddings if isinstance(tables, EmbeddingCollection) else tables.embedding_bags
        stored = {name: module.weight for name, module in modules.items()}
    if not isinstance(stored, Mapping):
        raise ValueError(
            "for_budget: tables must be an EmbeddingBagCollection, an EmbeddingCollection or rows by table name, got "
            f"{kind_of(tables, EmbeddingBagCollection, EmbeddingCollection)}"
        )
    for name, rows in stored.items():
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            raise ValueError(f"for_budget: table {name!r}: rows must be a tensor (N, D), got {type(rows).__name__}")
        check_trained_rows(_table(name, rows), rows)
    return {name: rows.detach().float().cpu() for name, rows in stored.items()}


def _check_arguments(
    tables: Mapping[str, Tensor],
    counts: Any,
    budget_bytes: Any,
    num_codes: Sequence[int],
    codes: CodebookConfig | None,
    seed: int,
) -> None:
    """Raise ValueError for what would fail, or be ignored, once candidates are measured."""
    if not isinstance(counts, Mapping):
        raise ValueError(f"for_budget: counts must be a mapping by table name, got {type(counts).__name__}")
    missing = sorted(set(tables) ^ set(counts))
    if missing:
        raise ValueError(
            f"for_budget: tables and counts must name the same tables, got only one of the two for {missing}"
        )
    for name, rows in tables.items():
        check_counts(f"for_budget: table {name!r}", counts[name], rows.shape[0])
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, Real) or not 0 < float(budget_bytes) < math.inf:
        raise ValueError(f"for_budget: budget_bytes must be a number of bytes above 0, got {budget_bytes!r}")
    if len(num_codes) == 0 or any(isinstance(m, bool) or not isinstance(m, Integral) or m < 1 for m in num_codes):
        raise ValueError(f"for_budget: num_codes must be code lengths of at least 1, got {num_codes!r}")
    if codes is not None and as_codebook(codes) is None:
        raise ValueError(f"for_budget: codes must be a method of codes such as PQConfig(num_codes=1), got {codes!r}")
    if codes is not None and codes.needs == "contexts":
        raise ValueError(f"for_budget: codes must be fitted to rows alone, got {codes.method!r}, which needs contexts")
    check_seed("for_budget", seed)


def measure_candidates(
    name: str, rows: Tensor, counts: Tensor, base: CodebookConfig, num_codes: Sequence[int], seed: int
) -> list[Candidate[MethodConfig]]:
    """Return bytes and error of every way to store one table; arguments as for `for_budget`.

    Returns:
        Candidates; their error is sum over rows of count times squared distance.
    """
    table = _table(name, rows)
    rows, counts = _sample(rows, counts, seed)
    sample, share = _table(name, rows), rows.shape[0] / table.num_embeddings
    weights = popularity_weights(counts, "count", rows.shape[0]).double()
    data = TableData(rows=rows, counts=counts, seed=seed)
    dense = DenseConfig()
    found: list[Candidate[MethodConfig]] = [Candidate(dense.stored_bytes(table), 0.0, dense)]
    for config in candidates_of(table, base, num_codes):
        measured = config.scaled(share)
        try:
            config.check(table)
            measured.check(sample)
        except ValueError:
            continue  # this table cannot be stored this way
        if config.stored_bytes(table) < found[0].num_bytes:
            served = _served(measured, sample, data)
            for choice in with_finer_heads(config):
                if choice is not config:  # the tail is the same: it was fitted without the head
                    served = measured.serve_finer_head(served, sample, data)
                error = float(((rows - served).square().sum(1).double() * weights).sum())
                found.append(Candidate(choice.stored_bytes(table), error / share, choice))
    return found


def smallest_bytes(tables: Sequence[EmbeddingBagConfig], codes: CodebookConfig | None, num_codes: Sequence[int]) -> int:
    """Return the least bytes that `for_budget` can store tables in, from their sizes alone; arguments as there.

    Example:
        >>> smallest_bytes([EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=4)], None, [1])
        46
    """
    return sum(_smallest(table, codes or _USUAL, num_codes) for table in tables)


def maybe_dense(
    tables: Sequence[EmbeddingBagConfig], budget_bytes: int, codes: CodebookConfig | None, num_codes: Sequence[int]
) -> list[str]:
    """Return the tables that `for_budget` could leave dense, from their sizes alone; arguments as there.

    Example:
        >>> day = EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=4)
        >>> user = EmbeddingBagConfig(name="user", num_embeddings=1000, embedding_dim=4)
        >>> maybe_dense([day, user], 8000, None, [1])
        ['day']
    """
    smallest = [_smallest(table, codes or _USUAL, num_codes) for table in tables]
    left = budget_bytes - sum(smallest)
    return [
        table.name
        for table, least in zip(tables, smallest, strict=True)
        if DenseConfig().stored_bytes(table) - least <= left
    ]


def _smallest(table: EmbeddingBagConfig, base: CodebookConfig, num_codes: Sequence[int]) -> int:
    sizes = [DenseConfig().stored_bytes(table)]
    for config in candidates_of(table, base, num_codes):
        with suppress(ValueError):  # this table cannot be stored this way
            config.check(table)
            sizes.append(config.stored_bytes(table))
    return min(sizes)


def _table(name: str, rows: Tensor) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=rows.shape[0], embedding_dim=rows.shape[1], feature_names=[name]
    )


def _sample(rows: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return a fixed sample of rows and their counts, or all of them where they are few."""
    if rows.shape[0] <= _MAX_MEASURED_ROWS:
        return rows, counts
    chosen = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))[:_MAX_MEASURED_ROWS]
    return rows[chosen], counts[chosen]


@torch.no_grad()
def _served(config: MethodConfig, table: EmbeddingBagConfig, data: TableData) -> Tensor:
    """Return the rows that a fitted table serves: (N, D) float32."""
    state = config.fit(table, data)
    decoder = config.decoder(table, None)
    assert decoder is not None and state.codes is not None
    decoder.load_state_dict(state.decoder)
    return decoder(torch.arange(table.num_embeddings), None, None, state.codes, [])
