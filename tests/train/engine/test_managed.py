"""Tables with managers in the training loop: steps are told, left out, frozen and resumed."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import CafeConfig, CceConfig, MethodConfig
from torchrec_compress.modules.after_step import has_managers
from torchrec_compress.seams import local_shards
from torchrec_compress.train.config import OptimConfig, ParallelConfig, RunConfig, StageConfig
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.loop import Preempted, Task, Trained, train
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.models.click import ClickModel, make_model
from torchrec_compress.train.models.kinds import make_tables

STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0)
CAFE = CafeConfig(num_hot_rows=16, num_cold_rows=24, num_blocks=4, every=3)
CCE = CceConfig(num_codes=2, codebook_size=8, cluster_every=3)
each = pytest.mark.parametrize("compression", [CAFE, CCE], ids=["cafe", "cce"])


def made(config: RunConfig, data: ClickData, compression: MethodConfig = CAFE) -> ClickModel:
    torch.manual_seed(3)
    embeddings = CompressedEmbeddingBagCollection(make_tables(config.model, data), compression=compression)
    return make_model(embeddings, data.num_dense, config.model)


def state_of(
    trained: Trained, config: RunConfig, data: ClickData, compression: MethodConfig = CAFE
) -> dict[str, torch.Tensor]:
    state = {"model": made(config, data, compression).state_dict()}
    read(trained.checkpoint, state)
    return state["model"]


def local(trainable: Trainable) -> dict[str, torch.Tensor]:
    return {
        f"{name} {number}": part.clone()
        for name, value in trainable.state()["model"].items()
        for number, (part, _) in enumerate(local_shards(value))
    }


@pytest.mark.parametrize("tables", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_every_table_optimizer_promotes(config, data, ranks, tmp_path, tables):
    stage = dataclasses.replace(STAGE, optim=OptimConfig(tables=tables, table_lr=0.05))
    trained = train(made(config, data), Task(data, stage, 0, tmp_path, position=None), ranks)
    state = state_of(trained, config, data)
    assert state["embeddings.managed.managers.user.hot_ids"].count_nonzero() > 8
    assert state["embeddings.managed.managers.user.sketch.scores"].isfinite().all()


def test_frozen_tables_keep_their_rows(config, data, ranks):
    trainable = Trainable(made(config, data), dataclasses.replace(STAGE, train_tables=False), ranks, ParallelConfig())
    assert moved(trainable, data) == set()


def test_trained_tables_move_theirs(config, data, ranks):
    trainable = Trainable(made(config, data), STAGE, ranks, ParallelConfig())
    assert any("hot_ids" in name for name in moved(trainable, data))


@pytest.mark.parametrize("train_codebooks", [True, False])
def test_codes_move_where_codebooks_are_trained(config, data, ranks, train_codebooks):
    stage = dataclasses.replace(STAGE, train_codebooks=train_codebooks)
    trainable = Trainable(made(config, data, CCE), stage, ranks, ParallelConfig())
    assert any(name.split()[0].endswith(".codes") for name in moved(trainable, data)) == train_codebooks


def moved(trainable: Trainable, data: ClickData) -> set[str]:
    """Return which parts of tables three steps change."""
    trainable.module.train()
    before, pipeline = local(trainable), trainable.pipeline()
    batches = data.batches("train", 256, 0).epoch(0)
    for _ in range(3):
        pipeline.progress(batches)
    return {
        name
        for name, value in local(trainable).items()
        if (".managed." in name or ".code_tables." in name) and not torch.equal(value, before[name])
    }


@each
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    config, data, ranks, tmp_path: Path, monkeypatch, compression
):
    """Rows and codes move every third step: the steps go on being counted."""
    whole = train(made(config, data, compression), Task(data, STAGE, 0, tmp_path / "a", position=None), ranks)
    set_rate: Any = Trainable.set_rate

    def interrupt(self: Trainable, factor: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        set_rate(self, factor)

    monkeypatch.setattr(Trainable, "set_rate", interrupt)
    task = Task(data, STAGE, 0, tmp_path / "b", position=None)
    with pytest.raises(Preempted):
        train(made(config, data, compression), task, ranks)
    monkeypatch.undo()
    resumed = train(made(config, data, compression), task, ranks)
    first, second = (state_of(trained, config, data, compression) for trained in (whole, resumed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@each
def test_copies_on_several_ranks_are_refused_at_once(config, data, ranks, compression):
    many = dataclasses.replace(ranks, world=2)
    stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="adam"))
    with pytest.raises(ValueError, match="several ranks must train tables with managers in the backward"):
        Trainable(made(config, data, compression), stage, many, ParallelConfig())


@each
def test_a_left_out_batch_is_not_noted(config, data, ranks, compression):
    stage = dataclasses.replace(STAGE, skip_bad_batches=9)
    trainable = Trainable(made(config, data, compression), stage, ranks, ParallelConfig())
    trainable.module.train()
    good, worse = (next(iter(data.batches("train", 64, seed).epoch(0))) for seed in (0, 1))
    worse.labels.fill_(float("nan"))
    pipeline = trainable.pipeline()
    batches = iter([good, worse, good])
    pipeline.progress(batches)
    before = local(trainable)
    pipeline.progress(batches)
    assert trainable.was_skipped
    assert all(torch.equal(value, before[name]) for name, value in local(trainable).items())
    pipeline.progress(batches)
    assert not trainable.was_skipped
    assert has_managers(trainable.module)
