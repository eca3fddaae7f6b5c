"""Short trainings that choose the width of narrow rows, table by table."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.methods import DenseConfig, MethodConfig, NarrowConfig
from torchrec_compress.methods.base import dense_bytes
from torchrec_compress.methods.width import LANES
from torchrec_compress.ops import TrainedFormat
from torchrec_compress.train.config import fingerprint, lasting
from torchrec_compress.train.engine.loop import Task, train
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.ranks import Ranks, on_first
from torchrec_compress.train.sealed import is_done, read_json, write_json
from torchrec_compress.train.width_trial import WidthTrial, least_bytes

logger = logging.getLogger(__name__)


def candidates(trial: WidthTrial, table: EmbeddingBagConfig, optimizer: str) -> list[NarrowConfig]:
    """Return the ways to store a table that are tried, last the whole width with the state of the run's optimizer.

    Args:
        trial: widths and bits of narrow rows.
        table: of the full model.
        optimizer: that the run trains tables with.

    Example:
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=16, feature_names=["user"])
        >>> [(each.width, each.optimizer) for each in candidates(WidthTrial(trial_epochs=1.0), table, "adagrad")]
        [(8, 'rowwise_adagrad'), (16, 'rowwise_adagrad'), (16, 'adagrad')]
    """
    widths = [width for width in trial.widths if width < table.embedding_dim and width % LANES == 0]
    narrow: list[NarrowConfig] = []
    for width in sorted(widths):
        for bits in trial.bits:
            state = 8 if bits == 4 else 32  # a float of state beside four bytes of numbers would be half of a row
            narrow.append(
                NarrowConfig(width=width, bits=bits, optimizer="rowwise_adagrad", state_bits=state, rate=trial.rate)
            )
    whole = [
        NarrowConfig(width=table.embedding_dim, bits=8, optimizer="rowwise_adagrad"),
        NarrowConfig(width=table.embedding_dim, bits=8, optimizer="adagrad", state_bits=8),
    ]
    return [*narrow, *sorted(whole, key=lambda each: each.optimizer == optimizer)]


class Trials:
    """Trainings of candidates, of which each is done once and kept.

    Args:
        trial: which candidates, and for how long.
        task: what training a candidate for good would be.
        build: makes the untrained model of methods by table name.
        ranks: that train; every rank calls `choose`.
    """

    def __init__(
        self, trial: WidthTrial, task: Task, build: Callable[[Mapping[str, MethodConfig]], Recommender], ranks: Ranks
    ) -> None:
        assert trial.trial_epochs is not None
        self._trial, self._build, self._ranks = trial, build, ranks
        # one validation, at the end: the best of several would be chosen by luck
        short = {"epochs": trial.trial_epochs, "evals_per_epoch": 1, "monitor": "logloss", "patience": 0}
        self._task = dataclasses.replace(task, stage=dataclasses.replace(task.stage, **short), teacher=None)
        whole = dataclasses.replace(task.stage, monitor="logloss")
        self._whole_task = dataclasses.replace(task, stage=whole, teacher=None)
        self._folder = task.folder.parent / "trials"
        self._kept = self._folder / "found.json"
        kept = on_first(lambda: read_json(self._kept) if is_done(self._kept) else {}, ranks)
        self._found: dict[str, Any] = kept

    def choose(self, tables: list[EmbeddingBagConfig]) -> dict[str, MethodConfig]:
        """Return the method of every table.

        Args:
            tables: of the full model.

        Raises:
            ValueError: what was kept is damaged, or a loss is not finite.
            OSError: something could not be written.
        """
        optimizer, least_loss = self._task.stage.optim.tables, math.inf
        total = sum(dense_bytes(table) for table in tables)
        large = [table for table in tables if dense_bytes(table) >= self._trial.min_share * total]
        chosen: dict[str, MethodConfig] = {table.name: DenseConfig() for table in tables}
        chosen |= {table.name: candidates(self._trial, table, optimizer)[-1] for table in large}
        whole = dict(chosen)
        for table in sorted(large, key=lambda table: (-dense_bytes(table), table.name)):
            tried = candidates(self._trial, table, optimizer)
            losses = {
                number: self._loss({**chosen, table.name: method}, self._task) for number, method in enumerate(tried)
            }
            sizes = {number: _held_bytes(method, table) for number, method in enumerate(tried)}
            least_loss = min(least_loss, *losses.values())
            best = least_bytes(losses, sizes, least_loss + self._trial.tolerance)
            chosen[table.name] = tried[best]
            told = ", ".join(f"{_told(tried[n])} {loss:.5f}" for n, loss in losses.items())
            logger.info("table %r: %s, of %s", table.name, _told(tried[best]), told)
        if self._trial.confirm and chosen != whole:
            by_choice, by_whole = (self._loss(methods, self._whole_task) for methods in (chosen, whole))
            logger.info("trained to the end: the choice %.5f, whole rows for all %.5f", by_choice, by_whole)
            if by_whole < by_choice - self._trial.tolerance:
                return whole
        return chosen

    def _loss(self, methods: Mapping[str, MethodConfig], task: Task) -> float:
        """Return the logloss on validation after a training, done now unless it is kept."""
        plain = {name: method.to_dict() for name, method in methods.items()}
        # all that a loss depends on: a run that was killed among its trials may go on with other settings
        key = fingerprint(plain, lasting(task.stage), task.seed, task.identity)
        if key not in self._found:
            folder = self._folder / key
            task = dataclasses.replace(task, folder=folder, label=f"trial {len(self._found) + 1}")
            trained = train(self._build(methods), task, self._ranks)
            self._found[key] = trained.best
            on_first(lambda: write_json(self._kept, self._found), self._ranks)
            on_first(lambda: shutil.rmtree(folder, ignore_errors=True), self._ranks)
        return float(self._found[key])


def _held_bytes(method: NarrowConfig, table: EmbeddingBagConfig) -> int:
    """Return the bytes of a table's rows, projection and optimizer state."""
    assert method.bits != 32 and method.optimizer is not None
    form = TrainedFormat(method.width, method.bits, method.optimizer, method.state_bits)
    return method.stored_bytes(table) + table.num_embeddings * form.state_bytes


def _told(method: NarrowConfig) -> str:
    return f"{method.width} x {method.bits} bits, {method.optimizer}"
