"""Small tables in stage 1, codes of them in stage 2, which a distillation from the small model trains on."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
import torch

from tests.made import Made
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.compression import measuring, parse
from torchrec_compress.methods import base, learned
from torchrec_compress.train import budgeting, fitting, stages
from torchrec_compress.train.check import check_config, check_run
from torchrec_compress.train.config import ParallelConfig, RunConfig, override
from torchrec_compress.train.full import full_model, trained_model, untrained
from torchrec_compress.train.ranks import Ranks, start
from torchrec_compress.train.sealed import read_json

SMALL = {"*": {"method": "narrow", "width": 4, "bits": 8, "optimizer": "rowwise_adagrad"}}
CODES = {"*": {"method": "pq", "num_codes": 2, "codebook_size": 16, "structure": "residual", "width": 4}}
STAGE = {"epochs": 1.0, "batch_size": 256, "evals_per_epoch": 2}
ALONE = {"pretrain_compression": SMALL, "pretrain": STAGE}
CODED = {**ALONE, "compression": CODES}
BUDGET = {
    "budget_ratio": 6.0,
    "num_codes": [1, 2],
    "widths": [4],
    "codes": {"method": "pq", "num_codes": 1, "codebook_size": 16},
}
DISTILLED = {**CODED, "retrain": {**STAGE, "distill_weight": 0.5}}


def _run(config, tmp_path, name, **changes):
    config = override(config, changes)
    return stages.run(config, tmp_path / name, tmp_path / "full", start(config.parallel), None)


def test_the_whole_road(config, tmp_path):
    whole = _run(config, tmp_path, "whole")
    alone = _run(config, tmp_path, "alone", **ALONE)
    assert alone["footprint"]["total_bytes"] < whole["footprint"]["total_bytes"] / 2
    assert alone["held_bytes"] == alone["footprint"]["total_bytes"] + alone["state_bytes"] < whole["held_bytes"]
    coded = _run(config, tmp_path, "coded", **CODED)
    tables = coded["footprint"]["tables"]
    assert {name for name, table in tables.items() if table["method"] == "pq"} >= {"user", "item"}
    assert coded["held_bytes"] == alone["held_bytes"]  # the full table never was
    distilled = _run(config, tmp_path, "distilled", **DISTILLED)
    assert distilled["fitted"] == coded["metrics"]
    assert distilled["metrics"]["valid"]["logloss"] <= coded["metrics"]["valid"]["logloss"] + 1e-6
    assert len(list((tmp_path / "full").iterdir())) == 2  # a full model, and one small one for three runs


def test_small_alone_is_the_training_from_scratch(config, tmp_path):
    alone = _run(config, tmp_path, "alone", **ALONE)
    scratch = _run(config, tmp_path, "scratch", start="scratch", compression=SMALL, retrain=STAGE)
    assert alone["metrics"] == scratch["metrics"]
    assert alone["held_bytes"] == scratch["held_bytes"]
    for name in ("alone", "scratch"):
        assert (tmp_path / name / "model.pt").is_file()
    one, other = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("alone", "scratch"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tables_that_share_a_projection_are_trained_and_coded(config, tmp_path):
    shared = {"*": {**SMALL["*"], "shared": "all"}}
    alone = _run(config, tmp_path, "alone", **{**ALONE, "pretrain_compression": shared})
    scratch = _run(config, tmp_path, "scratch", start="scratch", compression=shared, retrain=STAGE)
    assert alone["metrics"] == scratch["metrics"]
    (key,) = (key for key in torch.load(tmp_path / "alone" / "model.pt", weights_only=True) if "projection" in key)
    assert key.endswith("decoder.banks.all.projection")
    coded = _run(config, tmp_path, "coded", **{**CODED, "pretrain_compression": shared})
    assert coded["footprint"]["tables"]["user"]["method"] == "pq"


def test_codes_are_those_of_the_trained_rows(config, data, tmp_path):
    config = override(config, {**ALONE, "compression": {"*": {"method": "int8"}}})
    _run(config, tmp_path, "a")
    small = trained_model(config, data, next((tmp_path / "full").iterdir())).embeddings
    served = untrained(config, parse(config.compression), data, in_shards=False)
    served.load_state_dict(torch.load(tmp_path / "a" / "fitted.pt", weights_only=True))
    ids = torch.arange(300)
    rows = small.table_rows("user", ids).detach()
    assert float(rows.std()) > 0
    torch.testing.assert_close(
        served.embeddings.table_rows("user", ids), rows, rtol=0, atol=float(rows.abs().max()) / 100
    )


def test_no_full_table_is_made_of_small_ones(config, data, tmp_path, monkeypatch):
    config = override(config, CODED)
    source = stages.pretrain(config, tmp_path / "full", start(config.parallel), None)
    monkeypatch.setattr(base, "train_size", lambda *_: 64)
    monkeypatch.setattr(learned, "BLOCK_ROWS", 64)
    model = untrained(config, parse(config.compression), data, in_shards=False)
    counts = {name: torch.ones(rows, dtype=torch.int64) for name, rows in zip(data.features, data.vocab, strict=True)}
    with Made() as made:
        fitting.fit(config, data, source, tmp_path / "fitted.pt", model, counts, {})
    assert max(made.floats)[0] < data.vocab[data.features.index("user")] * config.model.embedding_dim


def test_a_budget_of_small_tables_is_spent_on_codes_of_their_rows(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "train_size", lambda *_: 64)
    monkeypatch.setattr(learned, "BLOCK_ROWS", 64)
    monkeypatch.setattr(measuring, "_MEASURED_ROWS", 64)
    small = {**SMALL, "item": {"method": "narrow", "width": 8, "bits": 8}}
    config = override(config, {**ALONE, "pretrain_compression": small})
    measure, floats = budgeting.measure_frontier, []

    def watched(*given, **named):
        with Made() as made:
            found = measure(*given, **named)
        floats.extend(made.floats)
        return found

    monkeypatch.setattr(budgeting, "measure_frontier", watched)
    summary = _run(config, tmp_path, "a", compression=BUDGET)
    assert max(floats)[0] < data.vocab[data.features.index("user")] * config.model.embedding_dim
    assert summary["footprint"]["ratio"] >= 6.0
    chosen = parse(read_json(tmp_path / "a" / "compression.json"))
    assert chosen["user"].width == 4  # all that its rows have, and no more
    kept = [read_json(path) for path in tmp_path.glob("full/*/frontiers/*/frontier.json")]
    assert len(kept) == 1
    widths = {
        name: {each[2].get("width") for each in table["candidates"] if each[2]["method"] == "pq"}
        for name, table in kept[0]["tables"].items()
    }
    assert widths["user"] == {4} and widths["item"] <= {None, 4} and 4 in widths["item"]
    _run(config, tmp_path, "b", compression={**BUDGET, "widths": []})
    assert len(list(tmp_path.glob("full/*/frontiers/*/frontier.json"))) == 2  # other widths, another frontier


@pytest.mark.parametrize("init", ["host", "shards"])
def test_stage_one_starts_where_the_config_says(config, data, init):
    model = full_model(override(config, {**ALONE, "parallel.init": init}), data)
    assert isinstance(model.embeddings, CompressedEmbeddingBagCollection)
    assert all(value.is_meta == (init == "shards") for value in model.embeddings.parameters())


def test_another_small_model_is_another_model(config, tmp_path):
    wider = {"*": {**SMALL["*"], "width": 8}}
    keys = {stages.pretrained_key(override(config, change)) for change in ({}, ALONE, {"pretrain_compression": wider})}
    assert len(keys) == 3
    _run(config, tmp_path, "a", **CODED)
    with pytest.raises(ValueError, match=r": pretrain_compression\.\*\.width must be 4 as when it was written, got 8"):
        _run(config, tmp_path, "a", **{**CODED, "pretrain_compression": wider})
    with pytest.raises(ValueError, match=r": pretrain_compression.* must be .* as when it was written"):
        _run(config, tmp_path, "a", **{**CODED, "pretrain_compression": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain_compression": {"budget_ratio": 9.0}}, "pretrain_compression: must name methods, got a budget"),
        ({"pretrain_compression": {"*": {"method": "narow"}}}, r"pretrain_compression\.\*.*narrow"),
        ({**CODED, "start": "scratch", "retrain": STAGE}, "pretrain_compression: must be empty with start = 'scratch'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(override(config, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrain_compression": {"*": CODES["*"]}},
            r"pretrain_compression: must be methods that train from the start, got others for \['hour', 'item'.*\]",
        ),
        (
            {"pretrain_compression": {"*": {"method": "narrow", "width": 5}}},
            "pretrain_compression: table .*nearest is 4",
        ),
        ({**ALONE, "pretrain.optim.tables": "adam"}, r"pretrain\.optim\.tables: .*"),
        (
            {**ALONE, "pretrain.train_dense": False, "pretrain.train_tables": False, "pretrain.train_codebooks": False},
            "pretrain: must train something",
        ),
    ],
)
def test_tables_that_cannot_train_from_the_start_are_refused(config, data, changes, message):
    config = override(config, changes)
    with pytest.raises(ValueError, match=message):
        check_run(config, check_config(config), data)


def test_what_needs_all_rows_is_refused_before_hours_of_training(config, data, monkeypatch):
    monkeypatch.setattr(base, "train_size", lambda *_: 200)
    config = override(config, {**ALONE, "compression": {"*": {"method": "memcom", "num_buckets": 20}}})
    with pytest.raises(ValueError, match="compression: table 'user': method 'memcom' must learn from all 300 rows"):
        check_run(config, check_config(config), data)


@functools.cache
def _ranks() -> Ranks:
    """Return this process among those of its pool, which it joins once."""
    return start(ParallelConfig(device="cpu"))


def _train(plain: dict, folder: str) -> dict:
    """Run on this rank of a pool."""
    from torchrec_compress.train.stages import run

    return run(override(RunConfig(), plain), Path(folder), Path(folder) / "full", _ranks(), None)


@pytest.mark.slow
@pytest.mark.parametrize("road", [ALONE, DISTILLED], ids=["alone", "distilled"])
def test_two_ranks_go_the_same_road(config, tmp_path, two_ranks, road):
    """A fit turns the last digits of rows into other codes, so that codes are those of one small model."""
    plain = dataclasses.asdict(override(config, road))
    one = _train(plain, str(tmp_path / "one"))
    if "compression" in road:
        shutil.copytree(tmp_path / "one" / "full", tmp_path / "two" / "full")
        shutil.rmtree(next((tmp_path / "two" / "full").iterdir()) / "teacher")  # two ranks ask the small model, too
    first, second = two_ranks.run(_train, plain, str(tmp_path / "two"))
    assert first["metrics"] == second["metrics"]
    for split in ("valid", "test"):
        assert first["metrics"][split] == pytest.approx(one["metrics"][split], abs=1e-4, nan_ok=True)
    assert first["footprint"] == one["footprint"]
    assert first["held_bytes"] == pytest.approx(one["held_bytes"], rel=0.01)  # every rank counts steps
