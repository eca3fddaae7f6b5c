"""Models of what comes next through the stages: what they learn, on any number of ranks, and after an interruption."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.train.compare.report import write_report
from torchrec_compress.train.compare.worker import Worker
from torchrec_compress.train.config import ParallelConfig, RunConfig, override
from torchrec_compress.train.engine.loop import Preempted
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.stages import run

ITEMS = 32
OPTIM = {"tables": "rowwise_adagrad", "table_lr": 0.2, "dense_lr": 0.01, "codebook_lr": 0.01}
STAGE = {"epochs": 12.0, "batch_size": 30, "evals_per_epoch": 1, "patience": 0, "monitor": "ndcg10", "optim": OPTIM}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """Walks round a circle of items in a drawn order: the last item tells the next, and nothing else does."""
    rng = np.random.default_rng(0)
    circle = np.tile(rng.permutation(ITEMS), 2)
    starts, lengths = rng.integers(0, ITEMS, 150), rng.integers(4, 10, 150)
    walks = [circle[first : first + length] for first, length in zip(starts, lengths, strict=True)]
    table = pa.table({"user": np.repeat(np.arange(150), lengths), "item": np.concatenate(walks)})
    file = tmp_path_factory.mktemp("walks") / "walks.parquet"
    pq.write_table(table, file)
    return str(file)


def _config(path: str, **changes) -> RunConfig:
    base = {
        "tensorboard": False,
        "curvature_rows": 0,
        "data": {"kind": "parquet", "path": path},
        "data.sequence": {"by": "user", "max_length": 6, "num_negatives": 16},
        "model": {"name": "hstu", "embedding_dim": 16, "init_scale": 0.1, "attention": {"num_blocks": 1}},
        "parallel.device": "cpu",
        "pretrain": STAGE,
        "retrain": {**STAGE, "epochs": 0.0},
    }
    return override(override(RunConfig(), base), changes)


@functools.cache
def _ranks() -> Ranks:
    return start(ParallelConfig(device="cpu"))


def _run(plain: dict, folder: str, full: str | None = None) -> dict:
    return run(override(RunConfig(), plain), Path(folder), Path(full or f"{folder}/full"), _ranks(), None)


def _done(path: str, folder: Path, **changes) -> dict:
    return _run(dataclasses.asdict(_config(path, **changes)), str(folder))


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_full_tables_learn_what_comes_next(path, tmp_path, name):
    summary = _done(path, tmp_path, **{"model.name": name})
    test, alone = summary["metrics"]["test"], summary["popularity"]["test"]
    assert test["ndcg10"] > 0.95 and test["logloss"] < 1.0 < math.log(ITEMS)
    assert alone["ndcg10"] < 0.5
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["test"] == test


def test_hashed_tables_learn_all_that_ids_of_one_row_allow(path, tmp_path):
    """Of items that share a row, each is as likely to stand first: the best there is, less a little."""
    hashed = {"start": "scratch", "compression": {"*": {"method": "hash", "num_buckets": 24}}}
    summary = _done(path, tmp_path, retrain={**STAGE, "epochs": 40.0}, **hashed)
    rows = torch.load(tmp_path / "model.pt", weights_only=True)
    assert any("buckets" in name for name in rows)
    table = _served(path, tmp_path, hashed)
    _, owner, sizes = torch.unique(table, dim=0, return_inverse=True, return_counts=True)
    assert 12 < len(sizes) < ITEMS
    gains = 1 / torch.log2(torch.arange(ITEMS) + 2.0)
    best = float(torch.stack([gains[: int(sizes[row])].mean() for row in owner]).mean())
    assert 0.85 * best < summary["metrics"]["test"]["ndcg10"] and best < 0.95


def _served(path: str, folder: Path, changes: dict) -> torch.Tensor:
    """Return the rows of a finished compressed run's table."""
    from torchrec_compress.train.check import compression_of
    from torchrec_compress.train.data.open import open_data
    from torchrec_compress.train.full import untrained

    config = _config(path, **changes)
    model = untrained(config, compression_of(config.compression), open_data(config.data))  # type: ignore[arg-type]
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model.embeddings.table_rows("item", torch.arange(ITEMS)).detach()


@pytest.mark.parametrize(
    "method",
    [
        {"method": "pq", "num_codes": 4, "codebook_size": 8},
        {
            "method": "mec",
            "num_codes": 4,
            "codebook_size": 8,
            "codebook_dtype": "int8",
            "fit_options": {"num_steps": 20},
        },
        {"method": "int8"},
    ],
    ids=lambda method: method["method"],
)
def test_codes_are_fitted_to_the_full_model_and_trained_on(path, tmp_path, method):
    later = {**STAGE, "epochs": 4.0, "dequantize": method["method"] == "mec"}
    summary = _done(path, tmp_path, compression={"*": method}, retrain=later)
    fitted, trained = summary["fitted"]["test"], summary["metrics"]["test"]
    assert trained["ndcg10"] > 0.9 and trained["ndcg10"] > fitted["ndcg10"] - 0.02
    assert summary["footprint"]["total_bytes"] < summary["footprint"]["dense_bytes"]


def test_narrow_rows_train_from_the_start(path, tmp_path):
    small = {"pretrain_compression": {"*": {"method": "narrow", "width": 8, "bits": 8, "optimizer": "rowwise_adagrad"}}}
    summary = _done(path, tmp_path, **small, **{"pretrain.epochs": 20.0})
    assert summary["metrics"]["test"]["ndcg10"] > 0.9


def test_a_table_that_is_not_trained_stays_as_it_is_and_one_that_is_moves(path, tmp_path):
    start = {"start": "scratch", "compression": {"*": {"method": "hash", "num_buckets": 24}}}
    served = []
    for train in (False, True):
        later = {**STAGE, "epochs": 1.0, "train_tables": train}
        _done(path, tmp_path / str(train), retrain=later, **start)
        served.append(_served(path, tmp_path / str(train), start))
    moved = (served[0] - served[1]).abs().amax(dim=1)
    assert bool((moved > 0.01).all())


METHODS = {
    "dense": {},
    "replicated": {"pretrain.optim": {**OPTIM, "tables": "adam", "table_lr": 0.01}},
    "hash": {"start": "scratch", "compression": {"*": {"method": "hash", "num_buckets": 24}}},
    "pq": {"compression": {"*": {"method": "pq", "num_codes": 4, "codebook_size": 8}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_the_model_that_one_trains(path, tmp_path, two_ranks, method):
    """Batches of 31 rows, which two ranks cannot share evenly; PQ starts from one full model."""
    short = {**STAGE, "epochs": 2.0, "batch_size": 31, "checkpoint_every": 3}
    plain = dataclasses.asdict(_config(path, pretrain=short, retrain=short, **METHODS[method]))
    one = _run(plain, str(tmp_path / "one"))
    full = str(tmp_path / "one" / "full") if method == "pq" else None
    summaries = two_ranks.run(_run, plain, str(tmp_path / "two"), full)
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert one["training"]["steps"] == summaries[0]["training"]["steps"]
    assert one["popularity"] == summaries[0]["popularity"]
    for split in ("valid", "test"):
        assert summaries[0]["metrics"][split] == pytest.approx(one["metrics"][split], abs=1e-5), split


def _refused(plain: dict, folder: str) -> str:
    try:
        _run(plain, folder)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data.sequence.num_negatives": ITEMS}, "data.sequence.num_negatives: must be below the 32 items of 'item'"),
        ({"data.vocab": {"item": 9}}, "ids of column 'item' must be in [0, 9)"),
        ({"model.attention.num_heads": 3}, "model.attention.num_heads: must divide model.embedding_dim = 16, got 3"),
        ({"data.row_filter": "item < 0"}, "data.sequence: must have a sequence of 4 items, got 0 by 'user'"),
    ],
)
def test_bad_input_is_told_by_every_rank(path, tmp_path, two_ranks, changes, error):
    plain = dataclasses.asdict(_config(path, **changes))
    found = two_ranks.run(_refused, plain, str(tmp_path))
    assert all(error in each for each in found), found


@pytest.mark.slow
def test_ranks_without_a_sequence_of_their_own_train_the_same_model(path, tmp_path, two_ranks):
    """Batches of one row, of which a rank has none; validation of rows that two ranks cannot share evenly."""
    short = {**STAGE, "epochs": 0.05, "batch_size": 1}
    plain = dataclasses.asdict(_config(path, pretrain=short, **{"data.row_filter": "user < 101"}))
    one, two = _run(plain, str(tmp_path / "one")), two_ranks.run(_run, plain, str(tmp_path / "two"))
    assert two[0]["metrics"] == two[1]["metrics"] and one["training"]["steps"] > 3
    for split in ("valid", "test"):
        assert two[0]["metrics"][split] == pytest.approx(one["metrics"][split], abs=1e-5), split


@pytest.mark.slow
def test_shards_start_on_their_device_where_no_host_holds_them(path, tmp_path, two_ranks):
    plain = dataclasses.asdict(_config(path, **{"parallel.init": "shards", "pretrain.epochs": 3.0}))
    (first, second) = two_ranks.run(_run, plain, str(tmp_path))
    assert first["metrics"] == second["metrics"] and first["metrics"]["valid"]["logloss"] < math.log(ITEMS)


def test_an_interrupted_run_resumes_to_the_same_model(path, tmp_path, monkeypatch):
    changes = {"pretrain": {**STAGE, "epochs": 2.0, "optim": {**OPTIM, "decay": "linear"}}, "model.dropout": 0.2}
    whole = _done(path, tmp_path / "whole", **changes)
    step, steps = Trainable.set_rate, []

    def interrupt(self, factor):
        steps.append(factor)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, factor)

    monkeypatch.setattr(Trainable, "set_rate", interrupt)
    with pytest.raises(Preempted):
        _done(path, tmp_path / "cut", **changes)
    monkeypatch.undo()
    assert whole["training"]["steps"] > 7
    resumed = _done(path, tmp_path / "cut", **changes)
    assert resumed["metrics"] == whole["metrics"]
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_comparison_tells_ndcg_and_what_popularity_has(path, tmp_path):
    short = {**STAGE, "epochs": 1.0}
    worker, texts = Worker(), []
    for name, changes in (("full", {}), ("pq", {**METHODS["pq"], "retrain": short})):
        config = _config(path, pretrain=short, **changes)
        folder = tmp_path / "runs" / name / "seed0"
        texts.append(worker.run((name, config, str(folder), str(tmp_path / "full"))))
    assert [error for _, _, error in texts] == ["", ""]
    assert all(re.match(r"test nDCG@10 [01]\.\d{4} HR@10 [01]\.\d{4} logloss \d", text) for _, text, _ in texts), texts
    text = write_report(tmp_path, ["full", "pq"]).read_text()
    assert "test nDCG@10 | test HR@10 | test logloss" in text and "AUC" not in text
    assert "Items by their popularity in train alone: test nDCG@10" in text
    assert "| variant | smaller | nDCG@10 | HR@10 | logloss | seeds |" in text
    assert (tmp_path / "ndcg10_against_bytes.png").is_file() and not (tmp_path / "auc_against_bytes.png").exists()
