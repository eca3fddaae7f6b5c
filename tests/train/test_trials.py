"""Short trainings that choose widths: the rule, what is tried, and a run that resumes."""

from __future__ import annotations

import dataclasses
import types

import pytest
from torchrec import EmbeddingBagConfig

from torchrec_compress.methods import NarrowConfig
from torchrec_compress.train import stages, trials
from torchrec_compress.train.check import check_config, check_tables, compression_of
from torchrec_compress.train.config import RunConfig, StageConfig, override
from torchrec_compress.train.ranks import start
from torchrec_compress.train.sealed import read_json
from torchrec_compress.train.width_trial import WidthTrial, least_bytes, width_trial_of

TRIAL = {"trial_epochs": 0.5, "widths": [4], "min_share": 0.1, "confirm": False}


def test_a_trial_is_read_in_one_place():
    assert width_trial_of({"user": {"method": "int8"}}) is None and width_trial_of({}) is None
    assert width_trial_of({"trial_epochs": {"method": "int8"}}) is None, "a table may be called so"
    assert compression_of(TRIAL) == WidthTrial(trial_epochs=0.5, widths=[4], min_share=0.1, confirm=False)
    for wrong, message in (
        ({"trial_epochs": 0}, r"compression.trial_epochs: must be in \(0, 100\], got 0"),
        ({"trial_epochs": None}, "compression.trial_epochs: must be a number, got null"),
        ({"trial_epochs": 1, "width": [8]}, "did you mean 'compression.widths'"),
        ({"trial_epochs": 1, "widths": []}, "compression.widths: must hold different numbers, one at least"),
        ({"trial_epochs": 1, "widths": [8, 8]}, "compression.widths: must hold different numbers"),
        ({"trial_epochs": 1, "bits": [16]}, r"compression.bits\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            width_trial_of(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "pretrained", "pretrain.epochs": 1}, "start: must be 'scratch' with a trial"),
        ({"retrain.optim.tables": "adam"}, r"retrain.optim.tables: must be one of .*'adagrad'.*got 'adam'"),
        ({"retrain.optim.tables": "sgd"}, r"retrain.optim.tables: must be one of .*'adagrad'.*got 'sgd'"),
        ({"retrain.train_tables": False}, r"retrain.train_tables: must be true with a trial"),
        ({"retrain.epochs": 0}, r"retrain.epochs: must be over 0"),
    ],
)
def test_a_trial_that_cannot_train_is_refused(changes, message):
    config = override(RunConfig(compression=TRIAL, start="scratch", retrain=StageConfig()), changes)
    with pytest.raises(ValueError, match=message):
        check_config(config)


@pytest.mark.parametrize("widths", [[5], [32], [8, 64]])
def test_a_width_that_no_table_can_have_is_refused(widths):
    config = RunConfig(compression={"trial_epochs": 1, "widths": widths}, start="scratch", retrain=StageConfig())
    wanted = check_config(config)
    with pytest.raises(ValueError, match=r"compression.widths: must be multiples of 4 below the tables' 32, got"):
        check_tables(config, wanted, {"user": 1000})


def test_the_fewest_bytes_that_are_good_enough_win():
    sizes = {0: 10, 1: 20, 2: 40}
    assert least_bytes({0: 0.5, 1: 0.4, 2: 0.3996}, sizes, 0.4001) == 1
    assert least_bytes({0: 0.5, 1: 0.4, 2: 0.39}, sizes, 0.3905) == 2
    assert least_bytes({0: 0.5, 1: 0.4, 2: 0.39}, sizes, 0.5) == 0
    assert least_bytes({0: 0.4, 1: 0.4}, {0: 10, 1: 5}, 0.4) == 1
    assert least_bytes({0: 0.5, 1: 0.4, 2: 0.4}, {0: 1, 1: 20, 2: 5}, 0.3) == 2  # none is


def test_whole_rows_are_tried_with_both_kinds_of_state_the_runs_own_last():
    table = EmbeddingBagConfig(name="user", num_embeddings=1000, embedding_dim=16, feature_names=["user"])
    trial = WidthTrial(trial_epochs=1.0, widths=[32, 8], bits=[8, 4], rate=0.5)
    narrow = [
        NarrowConfig(width=8, bits=8, optimizer="rowwise_adagrad", rate=0.5),
        NarrowConfig(width=8, bits=4, optimizer="rowwise_adagrad", state_bits=8, rate=0.5),
    ]
    by_row = NarrowConfig(width=16, bits=8, optimizer="rowwise_adagrad")
    each = NarrowConfig(width=16, bits=8, optimizer="adagrad", state_bits=8)
    assert trials.candidates(trial, table, "adagrad") == [*narrow, by_row, each]
    assert trials.candidates(trial, table, "rowwise_adagrad") == [*narrow, each, by_row]


class Asked(trials.Trials):
    """Trials whose losses are given by what the tables `a` (the larger) and `b` are stored as."""

    def __init__(self, losses, trial, optimizer="rowwise_adagrad"):
        stage = override(StageConfig(), {"optim.tables": optimizer})
        self._trial, self._task, self._losses, self.asked = trial, types.SimpleNamespace(stage=stage), losses, []
        self._whole_task = "to the end"

    def _loss(self, methods, task):
        key = tuple((methods[name].width, methods[name].optimizer == "adagrad") for name in "ab")
        self.asked.append(key)
        return self._losses[key if task is self._task else (*key, task)]


ROW, EACH, FEW = (16, False), (16, True), (8, False)
TWO = [
    EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16, feature_names=[name])
    for name, rows in (("b", 1000), ("a", 2000))
]


def test_tables_lose_the_tolerance_together():
    losses = {(FEW, ROW): 0.4004, (EACH, ROW): 0.4001, (ROW, ROW): 0.4000, (FEW, FEW): 0.4006, (FEW, EACH): 0.4002}
    trial = WidthTrial(trial_epochs=1.0, widths=[8], tolerance=0.0005, confirm=False)
    found = Asked(losses, trial).choose(TWO)
    assert (found["a"].width, found["b"].width) == (8, 16), "narrow rows of both would be .0006 above the best"
    found = Asked(losses, dataclasses.replace(trial, tolerance=0.0006)).choose(TWO)
    assert (found["a"].width, found["b"].width) == (8, 8)


@pytest.mark.parametrize(("by_choice", "kept"), [(0.3, 8), (0.3005, 8), (0.3006, 16)])
def test_the_choice_is_held_against_whole_rows_for_all_by_trainings_to_the_end(by_choice, kept):
    """Short trainings favour narrow rows."""
    losses = {(FEW, ROW): 0.4, (EACH, ROW): 0.5, (ROW, ROW): 0.5, (FEW, FEW): 0.4, (FEW, EACH): 0.5}
    losses |= {(FEW, FEW, "to the end"): by_choice, (ROW, ROW, "to the end"): 0.3}
    asked = Asked(losses, WidthTrial(trial_epochs=1.0, widths=[8], tolerance=0.00051))
    assert {each.width for each in asked.choose(TWO).values()} == {kept}
    assert asked.asked[-2:] == [(FEW, FEW), (ROW, ROW)]


def test_whole_rows_that_are_the_choice_need_no_confirming():
    losses = dict.fromkeys([(FEW, ROW), (EACH, ROW), (ROW, FEW), (ROW, EACH)], 0.5) | {(ROW, ROW): 0.4}
    asked = Asked(losses, WidthTrial(trial_epochs=1.0, widths=[8]))
    assert {each.width for each in asked.choose(TWO).values()} == {16} and len(asked.asked) == 6


def test_a_run_confirms_its_choice_as_it_trains_itself(by_trial, tmp_path, monkeypatch):
    tasks, train = [], trials.train
    monkeypatch.setattr(trials, "train", lambda model, task, ranks: (tasks.append(task), train(model, task, ranks))[1])
    _run(override(by_trial, {"compression": {**TRIAL, "confirm": True, "tolerance": 1.0}}), tmp_path)
    assert [task.stage.epochs for task in tasks] == [0.5] * 5 + [1.0] * 2
    assert {task.stage.monitor for task in tasks} == {"logloss"}


def test_bytes_are_those_that_are_held_with_the_state():
    """Whole rows by element-wise state in 8 bits hold 18 bytes of state, by row 4; served they are alike."""
    losses = dict.fromkeys([(FEW, EACH), (ROW, EACH), (EACH, EACH), (ROW, FEW), (ROW, ROW)], 0.4)
    losses |= {(FEW, EACH): 0.5, (ROW, FEW): 0.5}
    asked = Asked(losses, WidthTrial(trial_epochs=1.0, widths=[8], confirm=False), "adagrad")
    assert {each.optimizer for each in asked.choose(TWO).values()} == {"rowwise_adagrad"}
    assert asked.asked == [(FEW, EACH), (ROW, EACH), (EACH, EACH), (ROW, FEW), (ROW, ROW), (ROW, EACH)]


@pytest.fixture
def by_trial(config):
    stage = {"epochs": 1.0, "batch_size": 256, "optim": {"tables": "adagrad"}}
    return override(config, {"compression": TRIAL, "start": "scratch", "retrain": stage})


def _run(config, tmp_path):
    return stages.run(config, tmp_path / "run", tmp_path / "full", start(config.parallel), None)


def test_a_run_trains_each_candidate_once_and_keeps_the_choice(by_trial, tmp_path, monkeypatch):
    labels, train = [], trials.train
    monkeypatch.setattr(trials, "train", lambda model, task, ranks: (labels.append(task), train(model, task, ranks))[1])
    # the whole width is better for the first table, the narrow one for the second
    losses = iter([0.5, 0.45, 0.4, 0.3, 0.39])
    monkeypatch.setattr(trials.Trials, "_loss", _counted(trials.Trials._loss, losses))
    summary = _run(by_trial, tmp_path)
    chosen = read_json(tmp_path / "run" / "compression.json")
    assert {name: found.get("width") for name, found in chosen.items() if found["method"] == "narrow"} == {
        "user": 8,
        "item": 4,
    }
    assert {found["method"] for name, found in chosen.items() if name not in ("user", "item")} == {"dense"}
    assert [task.stage.epochs for task in labels] == [0.5] * 5, "what both tables try is trained once"
    assert summary["training"]["steps"] == 13 and not list((tmp_path / "run" / "trials").glob("*/*"))


def _counted(loss, losses):
    """Train as asked, then report the loss that the test wants, the same for the same methods."""
    told: dict[str, float] = {}

    def found(self, methods, task):
        before = len(self._found)
        loss(self, methods, task)
        key = str(methods)
        if len(self._found) > before:
            told[key] = next(losses)
        return told[key]

    return found


def test_a_run_that_was_killed_among_its_trials_resumes_with_those_that_are_done(by_trial, tmp_path, monkeypatch):
    whole = _run(by_trial, tmp_path / "whole")
    train, calls = trials.train, []

    def dies(model, task, ranks):
        calls.append(task.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(model, task, ranks)

    monkeypatch.setattr(trials, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        _run(by_trial, tmp_path)
    assert _run(by_trial, tmp_path)["metrics"] == whole["metrics"]
    assert len(calls) == 6, "the one that was cut off alone is done again"


def test_a_run_that_goes_on_with_other_trials_keeps_no_loss_of_the_old_ones(by_trial, tmp_path, monkeypatch):
    train, epochs = trials.train, []

    def watched(model, task, ranks):
        epochs.append(task.stage.epochs)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train(model, task, ranks)

    monkeypatch.setattr(trials, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        _run(by_trial, tmp_path)
    _run(override(by_trial, {"compression": {**TRIAL, "trial_epochs": 0.25}}), tmp_path)
    assert epochs == [0.5] * 3 + [0.25] * 5
