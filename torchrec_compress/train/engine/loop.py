"""The training loop: pipelined, validated, stopped early, and resumable at any step on any number of ranks."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm

from torchrec_compress.train.config import ParallelConfig, StageConfig, lasting
from torchrec_compress.train.data.batch import Batch, Share
from torchrec_compress.train.data.source import Batches, ClickSource
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.profile import Profile
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.evaluate.scoring import total_counts, validate
from torchrec_compress.train.journal import Journal
from torchrec_compress.train.machine import give_back
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.ranks import Ranks

# what a scheduler takes for "try again later" (sysexits.h, EX_TEMPFAIL)
PREEMPTED = 75


class Preempted(SystemExit):
    """SIGTERM came: everything is saved, and the process ends with status 75, so that the job is queued again."""

    def __init__(self, label: str, step: int) -> None:
        super().__init__(PREEMPTED)
        self.text = f"{label}: asked to end, saved at step {step}; the same command continues"


@dataclass(frozen=True)
class Task:
    """What one stage needs besides the model.

    Args:
        data: the rows.
        stage: how to train.
        seed: of the order of rows and of dropout.
        folder: of checkpoints and logs; with several ranks, one that all of them see.
        label: in front of the progress bar.
        keep_start: whether the model as given competes for the best validation.
        teacher: (train rows,) float32 logits to imitate, or None.
        tensorboard: whether to write TensorBoard logs.
        position: of the progress bar; None shows none.
        identity: plain data that must not change when the stage resumes.
        parallel: how tables may be sharded, and the steps that are profiled.
    """

    data: ClickSource
    stage: StageConfig
    seed: int
    folder: Path
    label: str = "train"
    keep_start: bool = False
    teacher: Tensor | None = None
    tensorboard: bool = False
    position: int | None = 0
    identity: dict[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass
class Progress:
    """Where a stage stands; everything is in its checkpoints."""

    step: int = 0
    scale: float = 1.0
    best: float = math.inf
    best_step: int = 0
    bad_evals: int = 0
    stopped: bool = False
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    skipped: int = 0

    @staticmethod
    def of(notes: dict[str, Any]) -> Progress:
        """Return what `notes` returned."""
        return Progress(**{**notes, "best": math.inf if notes["best"] is None else notes["best"]})

    def notes(self) -> dict[str, Any]:
        """Return plain data that JSON has: no best yet is None."""
        return {**vars(self), "best": self.best if math.isfinite(self.best) else None}


@dataclass(frozen=True)
class Trained:
    """The outcome of a stage.

    Args:
        trainable: the model, as it was at the best validation.
        checkpoint: the folder that holds it.
        best_step: the step of that validation.
        best: what it found: the logloss, or minus the AUC or nDCG where the stage monitors that.
        steps: all steps that were done.
        rows_per_second: of training over all ranks, validation left out.
        seconds: of training, over all interrupted runs.
        skipped: batches that were left out for a loss that was not finite.
        state_bytes: of the tables' optimizer state, codebooks' and projections' too, and of what `adaptive_l2` knows of
            ids: one copy over all ranks.
    """

    trainable: Trainable
    checkpoint: Path
    best_step: int
    best: float
    steps: int
    rows_per_second: float
    seconds: float
    skipped: int
    state_bytes: int


def train(model: Recommender, task: Task, ranks: Ranks) -> Trained:
    """Train a model, from its newest checkpoint where there is one. Every rank calls it.

    Args:
        model: the same on every rank; it is wrapped in place, build it anew to use it unsharded.
        task: data, settings and folder.
        ranks: all of which call this.

    Raises:
        ValueError: bad settings, a checkpoint of other settings, or a loss that is not finite; the message names step,
            ids and the last good checkpoint.
        OSError: a checkpoint could not be written.
        Preempted: SIGTERM came and the state is saved.
    """
    torch.manual_seed(task.seed)
    if ranks.world > 1:  # dropout differs over the ranks, and is the same in every run
        torch.manual_seed(task.seed * 65_537 + ranks.rank)
    pooling = dict(zip(task.data.layout.features, task.data.layout.widths, strict=True))
    rarity = None
    if task.stage.optim.adaptive_l2:
        rarity = Rarity(total_counts(task.data, ranks), task.data.num_rows("train"), ranks.device)
    trainable = Trainable(model, task.stage, ranks, task.parallel, task.teacher, pooling, rarity)
    identity = {"stage": lasting(task.stage), "seed": task.seed, **task.identity}
    store = Checkpoints(task.folder / "checkpoints", identity, ranks, task.stage.keep_checkpoints)
    return _Stage(trainable, task, store).run()


class _Stage:
    """One stage in the making."""

    def __init__(self, trainable: Trainable, task: Task, store: Checkpoints) -> None:
        self._trainable, self._task, self._store, self._ranks = trainable, task, store, trainable.ranks
        self._stage, self._data = task.stage, task.data
        self._batches = task.data.batches(
            "train", task.stage.batch_size, task.seed, Share(self._ranks.rank, self._ranks.world)
        )
        self._total = round(task.stage.epochs * len(self._batches))
        self._every = max(1, math.ceil(len(self._batches) / task.stage.evals_per_epoch))
        saved = store.newest()
        self._is_new = saved is None
        self._progress = Progress() if saved is None else Progress.of(saved.notes)
        if saved is not None:
            trainable.load(store, saved)
        self._journal = Journal(task.folder, task.tensorboard, self._progress.step) if self._ranks.is_first else None
        self._profile = Profile(task.folder, task.parallel.profile_steps, self._ranks.rank)

    def run(self) -> Trained:
        """Train until the end, a stop or a SIGTERM."""
        progress = self._progress
        if self._is_new and self._task.keep_start:
            self._validate()
            self._save()
        with _watch() as asked, _bar(self._task, self._total, progress.step, self._ranks) as bar, self._profile:
            while progress.step < self._total and not progress.stopped:
                self._train_until(min((progress.step // self._every + 1) * self._every, self._total), bar, asked)
                self._validate()
                bar.set_postfix_str(f"best {self._stage.monitor} {abs(progress.best):.4f}")
                self._save()
        self._store.wait()
        if self._journal is not None:
            self._journal.close()
        best = self._store.at(progress.best_step)
        self._trainable.load_model(best.path)
        rate = progress.step * self._stage.batch_size / max(progress.seconds, 1e-9)
        size = self._trainable.state_bytes()
        return Trained(
            trainable=self._trainable,
            checkpoint=best.path,
            best_step=best.step,
            best=progress.best,
            steps=progress.step,
            rows_per_second=rate,
            seconds=progress.seconds,
            skipped=progress.skipped,
            state_bytes=size,
        )

    def _train_until(self, stop: int, bar: tqdm, asked: threading.Event) -> None:
        """Do the steps up to `stop`, where the pipeline has run empty."""
        progress, stage = self._progress, self._stage
        batches, pipeline = _steps(self._batches, progress.step, stop), self._trainable.pipeline(progress.step)
        self._trainable.module.train()
        while progress.step < stop:
            started = time.perf_counter()
            self._trainable.set_rate(self._rate())
            if stage.optim.average_squares:
                self._trainable.set_table_rate(self._rate() * math.sqrt(progress.step + 1))
            loss, _, batch = pipeline.progress(batches)
            progress.step += 1
            ends = self._note(float(loss), batch, asked)
            progress.seconds += time.perf_counter() - started
            bar.update(stage.batch_size)
            self._profile.step()
            if ends:
                self._save()
                self._store.wait()
                raise Preempted(self._task.label, progress.step)
            if stage.log_every and progress.step % stage.log_every == 0:
                self._write("train", self._mean_loss())
            if stage.checkpoint_every and progress.step % stage.checkpoint_every == 0 and progress.step < stop:
                self._save()
        if isinstance(pipeline, TrainPipelineSparseDist):
            pipeline.detach()  # its forward expects ids that were sent ahead

    def _rate(self) -> float:
        """Return the factor of all learning rates."""
        if self._stage.optim.decay == "linear":
            return max(0.02, 1 - self._progress.step / self._total)
        return self._progress.scale

    def _note(self, loss: float, batch: Batch, asked: threading.Event) -> bool:
        """Count the loss over all ranks; return whether some rank was asked to end.

        Raises:
            ValueError: the loss of a rank is not finite, and no more batches may be skipped.
        """
        finite = math.isfinite(loss)
        found = torch.tensor([loss if finite else 0.0, float(not finite), float(asked.is_set())], dtype=torch.float64)
        if self._ranks.world > 1:
            dist.all_reduce(found)
        total, num_bad, num_asked = found.tolist()
        progress = self._progress
        if num_bad:
            progress.skipped += 1
            if not self._trainable.was_skipped or progress.skipped > self._stage.skip_bad_batches:
                self._stop_at_bad_loss(loss, batch)
            self._write("skipped", {"batches": progress.skipped})
        else:
            progress.loss_sum += total / self._ranks.world
            progress.loss_steps += 1
        return num_asked > 0

    def _stop_at_bad_loss(self, loss: float, batch: Batch) -> None:
        """Raise an error that tells what is needed to find the cause."""
        rows = batch.rows[batch.weights > 0].tolist()
        where = f"rank {self._ranks.rank}, " if self._ranks.world > 1 else ""
        if math.isfinite(loss):
            what = "the loss of another rank is not"
        else:
            ids = {name: bags.values()[:8].tolist() for name, bags in batch.features.to_dict().items()}
            what = f"got {loss}; train rows {rows[:8]} and {max(len(rows) - 8, 0)} more, their first ids {ids}"
        raise ValueError(
            f"{self._task.label}: the loss must be finite, {where}step {self._progress.step}: {what}; lower the "
            f"learning rates or set skip_bad_batches; the last checkpoint is {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        self._store.wait()
        saved = self._store.newest()
        return "none" if saved is None else str(saved.path)

    def _mean_loss(self) -> dict[str, float]:
        """Return the mean train loss since it was last asked for."""
        progress = self._progress
        found = {"train_logloss": progress.loss_sum / progress.loss_steps} if progress.loss_steps else {}
        progress.loss_sum, progress.loss_steps = 0.0, 0
        return found

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self._journal is not None:
            self._journal.write(self._progress.step, kind, values)

    def _validate(self) -> None:
        """Score the validation split and decide whether it is the best, and whether to go on."""
        progress, stage = self._progress, self._stage
        give_back()
        found = validate(self._trainable.logits, self._data, self._ranks)
        give_back()
        self._write("valid", {**found, **self._mean_loss(), "scale": progress.scale})
        value = found["logloss"] if stage.monitor == "logloss" else -found[stage.monitor]
        if value < progress.best:
            progress.best, progress.best_step, progress.bad_evals = value, progress.step, 0
            return
        progress.bad_evals += 1
        if stage.optim.decay == "plateau" and progress.bad_evals % (1 + stage.optim.decay_patience) == 0:
            progress.scale *= 0.1
        progress.stopped = stage.patience > 0 and progress.bad_evals >= stage.patience

    def _save(self) -> None:
        progress = self._progress
        self._store.save(progress.step, self._trainable.state(), progress.notes(), protected=progress.best_step)


def _steps(batches: Batches, step: int, stop: int) -> Iterator[Batch]:
    """Yield the batches of steps [step, stop), over as many epochs as it takes."""
    while step < stop:
        epoch, first = divmod(step, len(batches))
        for batch in batches.epoch(epoch, first):
            yield batch
            step += 1
            if step >= stop:
                return


class _watch:
    """Note a SIGTERM instead of dying of it, while the training can still save."""

    def __enter__(self) -> threading.Event:
        self._asked = threading.Event()
        # signals reach the main thread only; elsewhere, as in a test, none is watched
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)


def _bar(task: Task, total: int, step: int, ranks: Ranks) -> tqdm:
    size = task.stage.batch_size
    return tqdm(
        total=total * size,
        initial=step * size,
        desc=task.label,
        unit="rows",
        unit_scale=True,
        leave=False,
        position=task.position,
        disable=task.position is None or not ranks.is_first or not sys.stderr.isatty(),
        mininterval=0.5,
    )
