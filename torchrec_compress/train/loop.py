"""The training loop: validated, stopped early, and resumable at any step."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from torchrec_compress.train import checkpoint
from torchrec_compress.train.batch import Batch
from torchrec_compress.train.config import StageConfig
from torchrec_compress.train.data import Batches, ClickData, ClickSource
from torchrec_compress.train.journal import Journal
from torchrec_compress.train.metrics import auc, logloss
from torchrec_compress.train.models import ClickModel
from torchrec_compress.train.parallel import Trainable

_EVAL_BATCH = 16384


@dataclass(frozen=True)
class Task:
    """What one stage needs besides the model.

    Args:
        data: the rows.
        stage: how to train.
        seed: of the order of rows and of dropout.
        folder: of checkpoints and logs.
        label: in front of the progress bar.
        keep_start: whether the model as given competes for the best validation.
        teacher: (train rows,) float32 logits to imitate, or None.
        tensorboard: whether to write TensorBoard logs.
        position: of the progress bar; None shows none.
        identity: plain data that must not change when the stage resumes.
    """

    data: ClickData
    stage: StageConfig
    seed: int
    folder: Path
    label: str = "train"
    keep_start: bool = False
    teacher: Tensor | None = None
    tensorboard: bool = False
    position: int | None = 0
    identity: dict[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Trained:
    """The outcome of a stage.

    Args:
        state: the model's tensors at the best validation, by name.
        best_step: the step of that validation.
        steps: all steps that were done.
        rows_per_second: of training, validation left out.
        seconds: of training, over all interrupted runs.
        optimizer_bytes: of all optimizer state.
    """

    state: dict[str, Tensor]
    best_step: int
    steps: int
    rows_per_second: float
    seconds: float
    optimizer_bytes: int


def train(model: ClickModel, task: Task) -> Trained:
    """Train a model, from its newest checkpoint where there is one.

    Args:
        model: it is wrapped in place; build it anew to use it unsharded.
        task: data, settings and folder.

    Raises:
        ValueError: bad settings, a checkpoint of other settings, or a loss that is not finite.
        OSError: a checkpoint could not be written.
    """
    torch.manual_seed(task.seed)
    trainable = Trainable(model, task.stage)
    start = {name: p.detach().clone() for name, p in trainable.pulled.items()} if task.stage.start_l2 else {}
    progress, best = _resume(trainable, task)
    batches = task.data.batches("train", task.stage.batch_size, task.seed)
    total = round(task.stage.epochs * len(batches))
    every = max(1, math.ceil(len(batches) / task.stage.evals_per_epoch))
    journal = Journal(task.folder, task.tensorboard, progress.step)
    if progress.step == 0 and task.keep_start:
        best = _validate(trainable, task, progress, journal) or best
    with _bar(task, total, progress.step) as bar:
        for batch in _remaining(batches, total, progress):
            started = time.perf_counter()
            trainable.set_rate(_rate(task.stage, progress, total))
            loss = _step(trainable, batch, task, start)
            progress.step += 1
            progress.seconds += time.perf_counter() - started
            _count_loss(progress, loss, task)
            bar.update(len(batch.labels))
            done = progress.step == total
            if progress.step % every == 0 or done:
                best = _validate(trainable, task, progress, journal) or best
                bar.set_postfix_str(f"best {task.stage.monitor} {abs(progress.best):.4f}")
                _save(trainable, task, progress, best)
            elif task.stage.checkpoint_every and progress.step % task.stage.checkpoint_every == 0:
                _save(trainable, task, progress, best)
    journal.close()
    rate = progress.step * task.stage.batch_size / max(progress.seconds, 1e-9)
    return Trained(best, progress.best_step, progress.step, rate, progress.seconds, trainable.optimizer_bytes())


def predict(model: nn.Module, data: ClickSource, split: str) -> Tensor:
    """Return the logits of all rows of a split: (N,) float32. The model is left in evaluation mode."""
    model.eval()
    logits = torch.empty(data.num_rows(split))
    with torch.no_grad():
        for batch in data.batches(split, _EVAL_BATCH, None).epoch(0):
            logits[batch.rows] = model(batch.features, batch.dense).logits
    return logits


def _remaining(batches: Batches, total: int, progress: Progress) -> Iterator[Batch]:
    """Yield what is left; `progress.step` is the position and is moved on by the caller."""
    while progress.step < total:
        epoch, first = divmod(progress.step, len(batches))
        for batch in batches.epoch(epoch, first):
            yield batch
            if progress.stopped or progress.step >= total:
                return


def _step(trainable: Trainable, batch: Batch, task: Task, start: dict[str, Tensor]) -> float:
    """Do one update and return the loss."""
    stage, model = task.stage, trainable.module
    model.train()
    trainable.optimizer.zero_grad()
    output = model(batch.features, batch.dense)
    targets = batch.labels
    if task.teacher is not None:  # the cross-entropy is linear in its target, so both terms are one
        targets = torch.lerp(targets, task.teacher[batch.rows].sigmoid(), stage.distill_weight)
    loss = F.binary_cross_entropy_with_logits(output.logits, targets)
    total = loss
    if stage.optim.lookup_l2:
        total = total + stage.optim.lookup_l2 / 2 * output.embeddings.square().sum() / len(targets)
    for name, value in start.items():
        total = total + stage.start_l2 / 2 * (trainable.pulled[name] - value).square().sum()
    total.backward()
    trainable.optimizer.step()
    return loss.item()


def _rate(stage: StageConfig, progress: Progress, total: int) -> float:
    """Return the factor of all learning rates."""
    if stage.optim.decay == "linear":
        return max(0.02, 1 - progress.step / total)
    return progress.scale


def _count_loss(progress: Progress, loss: float, task: Task) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"{task.label}: the loss must be finite, got {loss} at step {progress.step}; lower the learning rates; "
            f"checkpoints are in {task.folder}"
        )
    progress.loss_sum += loss
    progress.loss_steps += 1


def _validate(trainable: Trainable, task: Task, progress: Progress, journal: Journal) -> dict[str, Tensor] | None:
    """Score the validation split and decide; return the model's tensors where they are the best so far."""
    labels = task.data.valid.labels.numpy()
    logits = predict(trainable.module, task.data, "valid").numpy()
    if not np.isfinite(logits).all():
        raise ValueError(f"{task.label}: validation logits must be finite at step {progress.step}; lower the rates")
    found = {"auc": auc(labels, logits), "logloss": logloss(labels, logits)}
    if progress.loss_steps:
        found["train_logloss"] = progress.loss_sum / progress.loss_steps
        progress.loss_sum, progress.loss_steps = 0.0, 0
    journal.write(progress.step, "valid", {**found, "scale": progress.scale})
    value = found["logloss"] if task.stage.monitor == "logloss" else -found["auc"]
    if value < progress.best:
        progress.best, progress.best_step, progress.bad_evals = value, progress.step, 0
        return trainable.model_state()
    progress.bad_evals += 1
    if task.stage.optim.decay == "plateau":
        progress.scale *= 0.1
    progress.stopped = task.stage.patience > 0 and progress.bad_evals >= task.stage.patience
    return None


def _identity(task: Task) -> dict[str, Any]:
    return {"stage": dataclasses.asdict(task.stage), "seed": task.seed, **task.identity}


def _save(trainable: Trainable, task: Task, progress: Progress, best: dict[str, Tensor]) -> None:
    state = {
        "state": trainable.state(),
        "best": best,
        "progress": dict(vars(progress)),
        "random": torch.get_rng_state(),
    }
    checkpoint.save(task.folder / "checkpoints", progress.step, state, _identity(task))


def _resume(trainable: Trainable, task: Task) -> tuple[Progress, dict[str, Tensor]]:
    """Restore the newest checkpoint, or start anew."""
    saved = checkpoint.load(task.folder / "checkpoints", _identity(task))
    if saved is None:
        return Progress(), trainable.model_state()
    trainable.load_state(saved["state"])
    torch.set_rng_state(saved["random"])
    return Progress(**saved["progress"]), saved["best"]


def _bar(task: Task, total: int, step: int) -> tqdm:
    size = task.stage.batch_size
    return tqdm(
        total=total * size,
        initial=step * size,
        desc=task.label,
        unit="rows",
        unit_scale=True,
        leave=False,
        position=task.position,
        disable=task.position is None or not sys.stderr.isatty(),
        mininterval=0.5,
    )
