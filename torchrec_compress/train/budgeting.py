"""Which methods a budget of bytes gives to the tables of the trained model of stage 1."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchrec_compress.compression import Choice, Frontier, measure_frontier
from torchrec_compress.compression.candidates import families_of
from torchrec_compress.compression.rows import Rows, rows_of
from torchrec_compress.convert import Curvature
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import tried_by
from torchrec_compress.train.config import fingerprint
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.fitting import FullTables
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.rises import Known, measured_rises, noise_of, shared_rises
from torchrec_compress.train.sealed import is_done, publish, read_json, write_json

logger = logging.getLogger(__name__)

# The least of a prediction that is believed: an error that does good on a sample of validation is not free elsewhere.
_LEAST = 0.05
# What is tried beside codes; a frontier that was kept without one of them is measured anew.
_OTHERS = ["dense", "int8", "int4", "one row"]
# The least rise that is measured; tables whose errors are below it stay as predicted.
_SEEN = 0.0005


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
        choice = _checked(_frontier(budget, known), wanted, known)
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
    settings |= {"seed": config.seed, "others": _OTHERS, "felt": _SEEN}
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
        felt = _felt(rows_of("budget", rows), budget, known) if curvature else {}
        options["noise"] = {name: each.noise for name, each in felt.items()}
        measured = measure_frontier(rows, known.counts, curvature=curvature or None, **options)
        del rows
        measured = measured.scaled({name: each.factor for name, each in felt.items()})
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


def _checked(frontier: Frontier, budget_bytes: int, known: Known) -> Choice:
    """Return the choice for a budget, or another one where what was measured of the first says so.

    Large errors are not felt as small ones are: each table that is predicted to cost something is stored as chosen,
    alone, predictions are put right there, and of two choices the one stays that is measured to cost less.
    """
    first = frontier.choose(budget_bytes)
    measured = _rises_of(first, known)
    if not measured:
        return first
    right = {name: max(_LEAST, rise / first.shares[name].error) for name, rise in measured.items()}
    second = frontier.scaled(right).choose(budget_bytes)
    if dict(second) == dict(first):
        return first
    again = _rises_of(second, known)
    told = [sum(each.values()) for each in (measured, again)]
    logger.info("two choices: stored table by table the loss on validation rises by %.5f and %.5f", *told)
    return second if told[1] < told[0] else first


def _rises_of(choice: Choice, known: Known) -> dict[str, float]:
    """Return what the loss does where one table alone is stored as chosen, of tables that are predicted to be felt."""
    chosen = {name: share.method for name, share in choice.shares.items() if share.error > _SEEN and known.curvature}
    return {name: rise.measured for name, rise in measured_rises(chosen, known).items()} if chosen else {}


class _Felt(NamedTuple):
    """How the errors of a table are felt.

    Attributes:
        factor: by what predictions are multiplied to be what is measured.
        noise: look-ups at which a row is half noise.
    """

    factor: float
    noise: float


def _felt(rows: Mapping[str, Rows], budget: Budget, known: Known) -> dict[str, _Felt]:
    """Return how the errors of tables are felt, by name, where they are large enough to be measured.

    Predictions rank the fits of one table, but not tables against each other: the rows of a flat table hold noise of
    their own clicks, which errors take away (docs/curvature.md). Codes of the fewest bytes are tried, since next to
    small errors what is measured is the noise of a sample of validation.
    """
    tried, chosen = tried_by(budget), {}
    for name, mine in rows.items():
        families = families_of(mine.table, tried, mine.rank) if name in known.curvature else []
        if families:
            family, lengths = families[0]
            chosen[name] = dataclasses.replace(family, num_codes=lengths[0], codebook_dtype="fp32")
    coded = {name: rise for name, rise in measured_rises(chosen, known).items() if rise.predicted > _SEEN}
    found = {}
    for name, sharing in shared_rises(list(coded), known).items():
        rise, factor = coded[name], max(_LEAST, coded[name].measured / coded[name].predicted)
        noise = noise_of(sharing, factor) if sharing.rise.predicted > _SEEN else 0.0
        logger.info(
            "table %r: as %d codes the loss on validation rises by %.5f, predicted %.5f: predictions are multiplied by "
            "%.2f; where the ids with the last quarter of look-ups share a row, by %.5f, predicted %.5f: at %.1f "
            "look-ups a row is half noise",
            *(name, chosen[name].num_codes, rise.measured, rise.predicted, factor),
            *(sharing.rise.measured, sharing.rise.predicted, noise),
        )
        found[name] = _Felt(factor, noise)
    return found


def _digest(curvature: Mapping[str, Curvature]) -> str:
    """Return a hash of what a curvature says of all tables."""
    found = hashlib.sha256()
    for name, each in sorted(curvature.items()):
        found.update(repr((name, each.num_embeddings, each.examples, each.lookups, each.width)).encode())
        found.update(each.matrix.contiguous().numpy().tobytes())
    return found.hexdigest()
