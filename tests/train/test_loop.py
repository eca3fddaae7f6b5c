from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from torchrec_compress.train.config import OptimConfig, StageConfig
from torchrec_compress.train.loop import Task, train
from torchrec_compress.train.parallel import Trainable, load_plain, plain_state
from torchrec_compress.train.stages import full_model

STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0)


def _before(config, data):
    return {name: value.clone() for name, value in full_model(config, data).state_dict().items()}


@pytest.mark.parametrize("tables", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_every_table_optimizer_learns(config, data, tmp_path, tables):
    stage = dataclasses.replace(STAGE, epochs=3.0, optim=OptimConfig(tables=tables, table_lr=0.05, dense_lr=0.01))
    trained = train(full_model(config, data), Task(data, stage, 0, tmp_path, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["auc"] for line in lines) > 0.55
    assert trained.steps == 39 and trained.optimizer_bytes > 0
    moved = (
        (
            trained.state["embeddings.embedding_bags.user.weight"]
            - _before(config, data)["embeddings.embedding_bags.user.weight"]
        )
        .abs()
        .max()
    )
    assert moved > 1e-4


def test_weights_survive_the_wrapping(config, data):
    model, before = full_model(config, data), _before(config, data)
    after = plain_state(Trainable(model, STAGE).module)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("part", ["dense", "tables"])
@pytest.mark.parametrize("tables", ["adagrad", "adam"])
def test_parts_can_be_frozen(config, data, tmp_path, part, tables):
    stage = dataclasses.replace(STAGE, **{f"train_{part}": False}, optim=OptimConfig(tables=tables))
    trained = train(full_model(config, data), Task(data, stage, 0, tmp_path, position=None))
    for name, value in _before(config, data).items():
        frozen = name.startswith("embeddings.") == (part == "tables")
        assert torch.equal(trained.state[name], value) == frozen, name


def test_l2_of_whole_tables_shrinks_rows_that_are_never_looked_up(config, data, tmp_path):
    untouched = data.counts()["user"] == 0
    sizes = []
    for l2 in (0.0, 1.0):
        stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="adam", table_lr=2e-4, table_l2=l2))
        trained = train(full_model(config, data), Task(data, stage, 0, tmp_path / str(l2), position=None))
        sizes.append(float(trained.state["embeddings.embedding_bags.user.weight"][untouched].abs().sum()))
    assert untouched.any() and sizes[1] < 0.9 * sizes[0]


def test_l2_that_fused_optimizers_would_ignore_is_refused(config, data):
    stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="adagrad", table_l2=0.1))
    with pytest.raises(ValueError, match=r"optim\.table_l2"):
        Trainable(full_model(config, data), stage)


def test_lookup_l2_and_start_l2_hold_parameters_back(config, data, tmp_path):
    def distance(name: str, **change) -> tuple[float, float]:
        optim = OptimConfig(tables="sgd", table_lr=1.0, lookup_l2=change.pop("lookup_l2", 0.0))
        stage = dataclasses.replace(STAGE, optim=optim, **change)
        state = train(full_model(config, data), Task(data, stage, 0, tmp_path / name, position=None)).state
        old = _before(config, data)
        net = [k for k in old if not k.startswith("embeddings.")]
        rows = float(state["embeddings.embedding_bags.item.weight"].square().sum())
        return sum(float((state[k] - old[k]).square().sum()) for k in net), rows

    free, held, small = distance("a"), distance("b", start_l2=10.0), distance("c", lookup_l2=1.0)
    assert held[0] < 0.5 * free[0]
    assert small[1] < 0.9 * free[1]


def test_the_rate_falls_to_zero_with_the_schedule_on_fused_tables_too(config, data):
    trainable = Trainable(full_model(config, data), STAGE)
    trainable.set_rate(0.5)
    # a fused table keeps its rate as a float32
    assert sorted(group["lr"] for group in trainable.optimizer.param_groups) == pytest.approx([0.0005, 0.025])


def test_teacher_replaces_labels(config, data, tmp_path):
    stage = dataclasses.replace(STAGE, epochs=4.0, distill_weight=1.0, monitor="auc")
    wrong = torch.where(data.train.labels > 0.5, -4.0, 4.0)  # the opposite of every label
    train(full_model(config, data), Task(data, stage, 0, tmp_path, teacher=wrong, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["auc"] < 0.45


def test_early_stopping_keeps_the_best_and_the_start_competes(config, data, tmp_path):
    stage = dataclasses.replace(
        STAGE, epochs=30.0, patience=1, optim=OptimConfig(dense_lr=0.3, table_lr=3.0, decay="none")
    )
    trained = train(full_model(config, data), Task(data, stage, 0, tmp_path, keep_start=True, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert trained.steps < 30 * 13 and lines[0]["step"] == 0
    best = min(lines, key=lambda line: line["logloss"])
    assert trained.best_step == best["step"]
    if best["step"] == 0:
        assert all(torch.equal(trained.state[k], v) for k, v in _before(config, data).items())


def test_a_diverged_loss_is_an_error(config, data, tmp_path):
    stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="sgd", table_lr=1e30, dense_lr=1e10))
    with pytest.raises(ValueError, match="must be finite"):
        train(full_model(config, data), Task(data, stage, 0, tmp_path, position=None))


def test_load_plain_refuses_other_shapes(config, data):
    model = full_model(config, data)
    state = {name: value[:1] for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shape"):
        load_plain(model, state)
    with pytest.raises(ValueError, match="names"):
        load_plain(model, {})


def test_several_processes_are_refused(config, data, monkeypatch):
    from torchrec_compress.train import parallel

    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="must run as one process"):
        Trainable(full_model(config, data), STAGE)


def test_l2_leaves_multipliers_of_memcom_alone(config, data, tmp_path):
    from torchrec_compress.train.config import override
    from torchrec_compress.train.stages import run

    changes = {"start": "scratch", "compression": {"*": {"method": "memcom", "num_buckets": 20}}}
    optim = {"tables": "adam", "table_lr": 0.01, "table_l2": 5.0}
    changes |= {"retrain": vars(config.pretrain), "retrain.epochs": 3.0, "retrain.optim": optim}
    run(override(config, changes), tmp_path / "a", tmp_path / "full", None)
    state = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    scalars = torch.cat([value.flatten() for name, value in state.items() if name.endswith("__scalars.weight")])
    assert 0.9 < float(scalars.mean()) < 1.1
