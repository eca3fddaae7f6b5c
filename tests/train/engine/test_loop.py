from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, MEmComConfig, PQConfig
from torchrec_compress.seams import local_shards
from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig, override
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.engine import trainable as parallel
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.loop import PREEMPTED, Preempted, Progress, Task, Trained, train
from torchrec_compress.train.engine.trainable import Trainable, make_constraints
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import start
from torchrec_compress.train.stages import full_model

STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0)


def _train(config, task: Task) -> Trained:
    return train(full_model(config, task.data), task, start(task.parallel))


def _before(config, data):
    return {name: value.clone() for name, value in full_model(config, data).state_dict().items()}


def _after(trained: Trained, config, data) -> dict[str, torch.Tensor]:
    """Return the best model's tensors, from its checkpoint."""
    state = {"model": full_model(config, data).state_dict()}
    read(trained.checkpoint, state)
    return state["model"]


def _trainable(config, data, ranks, stage=STAGE) -> Trainable:
    return Trainable(full_model(config, data), stage, ranks, ParallelConfig())


@pytest.mark.parametrize("tables", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_every_table_optimizer_learns(config, data, tmp_path, tables):
    stage = dataclasses.replace(STAGE, epochs=3.0, optim=OptimConfig(tables=tables, table_lr=0.05, dense_lr=0.01))
    trained = _train(config, Task(data, stage, 0, tmp_path, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["auc"] for line in lines) > 0.55
    assert trained.steps == 39 and (trained.state_bytes > 0) == (tables != "sgd")  # the tables', not the net's
    name = "embeddings.embedding_bags.user.weight"
    moved = (_after(trained, config, data)[name] - _before(config, data)[name]).abs().max()
    assert moved > 1e-4


def test_weights_survive_the_wrapping(config, data, ranks, tmp_path):
    before = _before(config, data)
    store = Checkpoints(tmp_path, {}, ranks)
    store.save(1, _trainable(config, data, ranks).state(), {})
    store.wait()
    after = full_model(override(config, {"seed": 7}), data).state_dict()
    read(store.at(1).path, {"model": after})
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("part", ["dense", "tables"])
@pytest.mark.parametrize("tables", ["adagrad", "adam"])
def test_parts_can_be_frozen(config, data, tmp_path, part, tables):
    stage = dataclasses.replace(STAGE, **{f"train_{part}": False}, optim=OptimConfig(tables=tables))
    trained = _train(config, Task(data, stage, 0, tmp_path, position=None))
    after = _after(trained, config, data)
    for name, value in _before(config, data).items():
        frozen = name.startswith("embeddings.") == (part == "tables")
        assert torch.equal(after[name], value) == frozen, name


def test_l2_of_whole_tables_shrinks_rows_that_are_never_looked_up(config, data, tmp_path):
    untouched = data.counts()["user"] == 0
    sizes = []
    for l2 in (0.0, 1.0):
        stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="adam", table_lr=2e-4, table_l2=l2))
        trained = _train(config, Task(data, stage, 0, tmp_path / str(l2), position=None))
        weight = _after(trained, config, data)["embeddings.embedding_bags.user.weight"]
        sizes.append(float(weight[untouched].abs().sum()))
    assert untouched.any() and sizes[1] < 0.9 * sizes[0]


def test_l2_that_fused_optimizers_would_ignore_is_refused(config, data, ranks):
    stage = dataclasses.replace(STAGE, optim=OptimConfig(tables="adagrad", table_l2=0.1))
    with pytest.raises(ValueError, match=r"optim\.table_l2"):
        _trainable(config, data, ranks, stage)


def test_lookup_l2_and_start_l2_hold_parameters_back(config, data, tmp_path):
    def distance(name: str, **change) -> tuple[float, float]:
        optim = OptimConfig(tables="sgd", table_lr=1.0, lookup_l2=change.pop("lookup_l2", 0.0))
        stage = dataclasses.replace(STAGE, optim=optim, **change)
        trained = _train(config, Task(data, stage, 0, tmp_path / name, position=None))
        state = _after(trained, config, data)
        old = _before(config, data)
        net = [k for k in old if not k.startswith("embeddings.")]
        rows = float(state["embeddings.embedding_bags.item.weight"].square().sum())
        return sum(float((state[k] - old[k]).square().sum()) for k in net), rows

    free, held, small = distance("a"), distance("b", start_l2=10.0), distance("c", lookup_l2=1.0)
    assert held[0] < 0.5 * free[0]
    assert small[1] < 0.9 * free[1]


def test_the_rate_falls_to_zero_with_the_schedule_on_fused_tables_too(config, data, ranks):
    trainable = _trainable(config, data, ranks)
    trainable.set_rate(0.5)
    # a fused table keeps its rate as a float32
    assert sorted(group["lr"] for group in trainable.optimizer.param_groups) == pytest.approx([0.0005, 0.025])


def test_the_seed_orders_the_rows_and_a_begun_folder_keeps_it(config, data, tmp_path):
    states = []
    for seed in (0, 1):
        trained = _train(config, Task(data, STAGE, seed, tmp_path / str(seed), position=None))
        states.append(_after(trained, config, data))
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
    for change, key in (({"seed": 1}, "seed"), ({"stage": dataclasses.replace(STAGE, epochs=2.0)}, r"stage\.epochs")):
        task = dataclasses.replace(Task(data, STAGE, 0, tmp_path / "0", position=None), **change)
        with pytest.raises(ValueError, match=rf"{key} must be .* as when it was written"):
            _train(config, task)


def test_the_training_loss_of_a_line_is_the_mean_since_the_line_before(config, data, tmp_path):
    def losses(log_every: int) -> list[float]:
        folder = tmp_path / str(log_every)
        stage = dataclasses.replace(STAGE, log_every=log_every)
        _train(config, Task(data, stage, 0, folder, position=None))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["train_logloss"] for line in lines if "train_logloss" in line]

    steps = losses(1)
    assert len(steps) == 13 and len(set(steps)) == 13
    assert losses(0) == pytest.approx([sum(steps[:7]) / 7, sum(steps[7:]) / 6], rel=1e-6)


def test_teacher_replaces_labels(config, data, tmp_path):
    stage = dataclasses.replace(STAGE, epochs=4.0, distill_weight=1.0, monitor="auc")
    wrong = torch.where(data.train.labels > 0.5, -4.0, 4.0)  # the opposite of every label
    _train(config, Task(data, stage, 0, tmp_path, teacher=wrong, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["auc"] < 0.45


def test_early_stopping_keeps_the_best_and_the_start_competes(config, data, tmp_path):
    stage = dataclasses.replace(
        STAGE, epochs=30.0, patience=1, optim=OptimConfig(dense_lr=0.3, table_lr=3.0, decay="none")
    )
    trained = _train(config, Task(data, stage, 0, tmp_path, keep_start=True, position=None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert trained.steps < 30 * 13 and lines[0]["step"] == 0
    best = min(lines, key=lambda line: line["logloss"])
    assert trained.best_step == best["step"]
    if best["step"] == 0:
        after = _after(trained, config, data)
        assert all(torch.equal(after[k], v) for k, v in _before(config, data).items())


def test_every_part_has_its_own_rate_and_l2(config, data, ranks):
    optim = OptimConfig(tables="adam", table_lr=0.2, table_l2=0.02, dense_lr=0.3, dense_l2=0.03, codebook_lr=0.5)
    methods = {
        "user": PQConfig(num_codes=2, codebook_size=16, num_hot_rows=3, hot_dtype="fp32"),
        "item": MEmComConfig(num_buckets=20, bias=True),
        "*": DenseConfig(),
    }
    collection = CompressedEmbeddingBagCollection(make_tables(config.model, data), compression=methods)
    model = make_model(collection, data.num_dense, config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    trainable = Trainable(model, dataclasses.replace(STAGE, optim=optim), ranks, ParallelConfig())
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in trainable.optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, rates in found.items():
        if name.endswith((".codebooks", ".hot_rows")):
            assert rates == (0.5, 0.0), name
        elif name.endswith("__scalars.weight"):
            assert rates == (0.2, 0.0), name
        else:
            assert rates == ((0.2, 0.02) if name.startswith("embeddings.") else (0.3, 0.03)), name
    assert {name.rpartition("item__")[2] for name in found if "item__" in name} == {
        "buckets.weight",
        "scalars.weight",
        "biases.weight",
    }


def test_a_diverged_loss_names_step_ids_and_checkpoint(config, data, tmp_path):
    stage = dataclasses.replace(
        STAGE, checkpoint_every=1, optim=OptimConfig(tables="sgd", table_lr=1e30, dense_lr=1e10, decay="none")
    )
    with pytest.raises(
        ValueError, match=r"must be finite, step [2-9]: got .* train rows \[\d+.*'user': \[\d+"
    ) as error:
        _train(config, Task(data, stage, 0, tmp_path, position=None))
    newest = sorted((tmp_path / "checkpoints").glob("step*"))[-1]
    assert str(newest) in str(error.value)


def _poisoned(data: ClickData, rows: list[int]) -> ClickData:
    """Return the data with dense columns, of which some rows of train are not finite."""

    def with_dense(split: Split, bad: list[int]) -> Split:
        dense = torch.linspace(0, 1, 2 * len(split)).view(-1, 2).clone()
        dense[bad] = float("inf")
        return dataclasses.replace(split, dense=dense)

    splits = {
        name: with_dense(data.split(name), rows if name == "train" else []) for name in ("train", "valid", "test")
    }
    return dataclasses.replace(data, num_dense=2, **splits)


def test_bad_batches_are_left_out_where_that_is_asked(config, data, tmp_path):
    """Two rows spoil at most two batches; the rest trains as it would without those batches."""
    bad = _poisoned(data, [5, 1000])
    stage = dataclasses.replace(STAGE, skip_bad_batches=2)
    trained = _train(config, Task(bad, stage, 0, tmp_path / "a", position=None))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line["kind"] == "skipped"]
    assert 1 <= trained.skipped == len(skipped) <= 2
    assert all(
        torch.isfinite(value).all() for value in _after(trained, config, bad).values() if value.is_floating_point()
    )
    with pytest.raises(ValueError, match="must be finite"):
        _train(config, Task(bad, STAGE, 0, tmp_path / "b", position=None))


def test_a_training_that_stopped_at_a_bad_batch_goes_on_when_told_to_skip_it(config, data, tmp_path):
    bad = _poisoned(data, [5])
    stage = dataclasses.replace(STAGE, checkpoint_every=1)
    with pytest.raises(ValueError, match="set skip_bad_batches"):
        _train(config, Task(bad, stage, 0, tmp_path, position=None))
    stage = dataclasses.replace(stage, skip_bad_batches=1, keep_checkpoints=3)
    assert _train(config, Task(bad, stage, 0, tmp_path, position=None)).skipped == 1


def test_a_left_out_batch_moves_nothing(config, data, ranks):
    bad = _poisoned(data, list(range(len(data.train))))
    trainable = _trainable(config, bad, ranks, dataclasses.replace(STAGE, skip_bad_batches=9))
    good = next(iter(_poisoned(data, []).batches("train", 64, 0).epoch(0)))
    worse = next(iter(bad.batches("train", 64, 0).epoch(0)))
    trainable.module.train()
    pipeline = trainable.pipeline()
    batches = iter([good, worse])
    pipeline.progress(batches)
    before = _local(trainable)
    pipeline.progress(batches)
    assert trainable.was_skipped
    assert all(torch.equal(value, before[name]) for name, value in _local(trainable).items())


def _local(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Return copies of this rank's shards."""
    shards = {name: local_shards(value) for name, value in trainable.state()["model"].items()}
    return {f"{name}.{i}": part.clone() for name, parts in shards.items() for i, (part, _) in enumerate(parts)}


def test_where_a_stage_stands_is_valid_json_before_the_first_validation():
    notes = Progress().notes()
    assert Progress.of(json.loads(json.dumps(notes, allow_nan=False))) == Progress()
    assert Progress.of({**notes, "best": float("inf")}) == Progress()  # as older checkpoints have it


def test_sigterm_saves_and_ends_with_the_status_for_another_try(config, data, tmp_path, monkeypatch):
    whole = _train(config, Task(data, STAGE, 0, tmp_path / "a", position=None))
    stage = Trainable.set_rate

    def interrupt(self, factor):
        os.kill(os.getpid(), signal.SIGTERM)
        stage(self, factor)

    monkeypatch.setattr(Trainable, "set_rate", interrupt)
    task = Task(data, STAGE, 0, tmp_path / "b", position=None)
    with pytest.raises(Preempted) as end:
        _train(config, task)
    assert end.value.code == PREEMPTED and "saved at step 1;" in end.value.text
    monkeypatch.undo()
    resumed = _train(config, task)
    first, second = (_after(trained, config, data) for trained in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_profiler_trace_is_written_on_request(config, data, tmp_path):
    stage, parallel = dataclasses.replace(STAGE, patience=0), ParallelConfig(profile_steps=2)
    _train(config, Task(data, stage, 0, tmp_path, position=None, parallel=parallel))
    events = json.loads((tmp_path / "trace_rank0.json").read_text())["traceEvents"]
    assert any("forward" in str(event.get("name")) for event in events)


def test_logits_are_those_of_evaluation(config, data, ranks):
    """Of our models none has a layer that knows the difference; a user's may."""
    trainable = _trainable(config, data, ranks)
    trainable.module.train()
    trainable.logits(next(iter(data.batches("test", 64, 0).epoch(0))))
    assert not any(module.training for module in trainable.module.modules())


def test_the_planner_is_told_the_batch_of_one_rank(config, data, ranks, monkeypatch):
    told = []
    monkeypatch.setattr(parallel, "EmbeddingShardingPlanner", lambda _, batch, *args, **named: told.append(batch))
    with pytest.raises(AttributeError):
        Trainable(full_model(config, data), STAGE, dataclasses.replace(ranks, world=3), ParallelConfig())
    assert told == [86]


def test_sharding_types_are_checked(config, data):
    model = full_model(config, data)
    found = make_constraints(model, 4, ParallelConfig(sharding_types={"us*": ["row_wise"]}), {"user": 7})
    assert found["user"].sharding_types == ["row_wise"] and found["user"].pooling_factors == [7.0]
    assert "data_parallel" not in found["item"].sharding_types
    # 4 rows over 3 ranks: cut by rows, the last would get none
    assert found["device"].sharding_types != ["table_wise", "column_wise"]
    assert make_constraints(model, 3, ParallelConfig(), {})["device"].sharding_types == ["table_wise", "column_wise"]
    with pytest.raises(ValueError, match="must fit a table"):
        make_constraints(model, 4, ParallelConfig(sharding_types={"usr": ["row_wise"]}), {})
    with pytest.raises(ValueError, match="must not be data_parallel"):
        make_constraints(model, 4, ParallelConfig(sharding_types={"user": ["data_parallel"]}), {})


def test_l2_leaves_multipliers_of_memcom_alone(config, ranks, tmp_path):
    from torchrec_compress.train.stages import run

    changes = {"start": "scratch", "compression": {"*": {"method": "memcom", "num_buckets": 20}}}
    optim = {"tables": "adam", "table_lr": 0.01, "table_l2": 5.0}
    changes |= {"retrain": vars(config.pretrain), "retrain.epochs": 3.0, "retrain.optim": optim}
    run(override(config, changes), tmp_path / "a", tmp_path / "full", ranks, None)
    state = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    scalars = torch.cat([value.flatten() for name, value in state.items() if name.endswith("__scalars.weight")])
    assert 0.9 < float(scalars.mean()) < 1.1
