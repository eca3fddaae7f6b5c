"""Adagrad whose squares are averaged over steps: rates of tables that grow with the root of the steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
from torch import Tensor

from torchrec_compress.methods import Int8Config, NarrowConfig
from torchrec_compress.seams import local_shards
from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig
from torchrec_compress.train.engine.loop import Task, train
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.full import untrained
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.stages import full_model

AVERAGED = OptimConfig(tables="rowwise_adagrad", table_lr=0.05, average_squares=True, decay="none")
STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0, optim=AVERAGED)


@pytest.fixture
def ranks() -> Ranks:
    return start(ParallelConfig())


@pytest.mark.parametrize("decay", ["none", "linear"])
def test_rates_grow_with_the_root_of_the_steps_and_fall_by_decay_alone(config, data, tmp_path, monkeypatch, decay):
    factors, before = [], Trainable.set_table_rate
    monkeypatch.setattr(
        Trainable, "set_table_rate", lambda self, factor: (factors.append(factor), before(self, factor))[1]
    )
    stage = dataclasses.replace(STAGE, optim=dataclasses.replace(AVERAGED, decay=decay))
    train(full_model(config, data), Task(data, stage, 0, tmp_path, position=None), start(ParallelConfig()))
    falls = [1.0 if decay == "none" else max(0.02, 1 - step / 13) for step in range(13)]
    assert factors == pytest.approx([math.sqrt(step + 1) * fall for step, fall in enumerate(falls)])


@pytest.mark.parametrize("kind", ["stock", "trained"])
def test_tables_alone_take_it(config, data, ranks, kind):
    chosen = {"*": Int8Config(), "user": NarrowConfig(width=4, bits=8), "item": NarrowConfig(width=4)}
    model = full_model(config, data) if kind == "stock" else untrained(config, {**chosen, "*": chosen["item"]}, data)
    trainable = Trainable(model, STAGE, ranks, ParallelConfig())
    trainable.set_rate(0.5)
    trainable.set_table_rate(3.0)
    fused = [group["lr"] for group in trainable.module.fused_optimizer.param_groups]
    rest = [group["lr"] for group in trainable.optimizer.param_groups][len(fused) :]
    assert fused == pytest.approx([0.15] * len(fused)) and fused
    assert set(rest) == {0.0005}


@pytest.mark.parametrize("averaged", [False, True])
def test_steps_of_like_gradients_stay_as_long(config, data, ranks, averaged):
    stage = dataclasses.replace(STAGE, train_dense=False, optim=dataclasses.replace(AVERAGED, table_lr=1e-4))
    trainable = Trainable(full_model(config, data), stage, ranks, ParallelConfig())
    batch = next(iter(data.batches("train", 256, 0).epoch(0)))
    row = int(batch.features["user"].values()[0])
    pipeline, stream, lengths = trainable.pipeline(), iter([batch] * 4), []

    def values() -> Tensor:
        weight = trainable.model.state_dict()["embeddings.embedding_bags.user.weight"]
        return next(part for part, _ in local_shards(weight))[row].clone()

    trainable.module.train()
    for step in range(4):
        trainable.set_rate(1.0)
        if averaged:
            trainable.set_table_rate(math.sqrt(step + 1))
        before = values()
        pipeline.progress(stream)
        lengths.append(float((values() - before).square().mean().sqrt()) / 1e-4)
    assert lengths == pytest.approx([1.0 if averaged else (step + 1) ** -0.5 for step in range(4)], rel=0.05)


@pytest.mark.parametrize("tables", ["sgd", "adam"])
def test_what_adds_up_no_squares_is_refused(config, data, ranks, tables):
    stage = dataclasses.replace(STAGE, optim=dataclasses.replace(AVERAGED, tables=tables))
    with pytest.raises(ValueError, match=rf"optim\.average_squares: must be false with optim\.tables = '{tables}'"):
        Trainable(full_model(config, data), stage, ranks, ParallelConfig())
