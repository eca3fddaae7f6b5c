"""One method at a budget of bytes: named in a config, sized by the tables alone."""

import pytest

from torchrec_compress.compression import sized
from torchrec_compress.methods import HashConfig, dense_bytes
from torchrec_compress.train import stages
from torchrec_compress.train.check import check_config, check_run, compression_of, pretrain_methods
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.idle import idle_settings
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.plan_from_training import from_training
from torchrec_compress.train.ranks import start
from torchrec_compress.train.sized import Sized

HASH = {"method": "hash", "num_buckets": 1}
STAGE = {"epochs": 1.0, "batch_size": 256, "evals_per_epoch": 2}


def _run(config, tmp_path, **changes):
    found = override(config, changes)
    return found, stages.run(found, tmp_path / "run", tmp_path / "full", start(found.parallel), None)


def test_a_run_from_scratch_has_the_bytes_that_were_asked_for(config, data, tmp_path):
    asked = {"budget_ratio": 10, "method": HASH}
    found, summary = _run(config, tmp_path, start="scratch", retrain=STAGE, compression=asked)
    tables = make_tables(found.model, data)
    dense = _dense(tables)
    assert 0.9 * dense / 10 < summary["footprint"]["total_bytes"] <= dense / 10
    wanted = compression_of(asked)
    assert isinstance(wanted, Sized) and wanted.methods(tables) == sized(tables, HashConfig(num_buckets=1), dense / 10)
    assert not (tmp_path / "full").exists()  # no full model is needed


def test_a_method_that_is_fitted_is_sized_as_well(config, tmp_path):
    coded = {"budget_ratio": 4, "method": {"method": "pq", "num_codes": 1, "codebook_size": 16}}
    _, summary = _run(config, tmp_path, compression=coded, **{"retrain.epochs": 0})
    assert summary["footprint"]["ratio"] >= 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"compression": {"budget_ratio": 9, "method": {"method": "hsah"}}},
            "compression.method.method: must be one of",
        ),
        ({"compression": {"budget_ratio": 9, "method": {"user": HASH}}}, "compression.method: must be one method with"),
        ({"compression": {"budget_ratio": 9, "method": HASH, "num_codes": [1]}}, "compression.num_codes: must be left"),
        ({"compression": {"budget_ratio": 9, "method": HASH, "codes": HASH}}, "compression.codes: must be left out"),
        (
            {"compression": {"budget_ratio": 9, "method": {"method": "int8"}}},
            "compression: sized: budget_bytes must be at least .* method 'int8'",
        ),
        (
            {
                "compression": {"budget_ratio": 4, "method": {"method": "pq", "num_codes": 1}},
                "start": "scratch",
                "retrain": STAGE,
            },
            "start: must be 'pretrained' for tables that are fitted",
        ),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(config, data, changes, said):
    with pytest.raises(ValueError, match=said):
        found = override(config, changes)
        check_run(found, check_config(found), data)


def test_stage_1_names_methods(config):
    with pytest.raises(ValueError, match="pretrain_compression: must name methods, got a budget"):
        pretrain_methods(override(config, {"pretrain_compression": {"budget_ratio": 9, "method": HASH}}))


def test_settings_of_codebooks_are_idle_without_any():
    stage = {**STAGE, "optim": {"codebook_lr": 0.5}}
    plain = {"start": "scratch", "retrain": stage, "compression": {"budget_ratio": 9, "method": HASH}}
    lines = idle_settings(override(RunConfig(), plain))
    assert any("codebook_lr" in line for line in lines)


def test_it_is_planned(config, data):
    found = override(config, {"compression": {"budget_ratio": 9, "method": HASH}})
    planned = from_training(found)["compression"]
    tables = make_tables(found.model, data)
    assert planned == {
        name: each.to_dict() for name, each in sized(tables, HashConfig(num_buckets=1), _dense(tables) / 9).items()
    }


def _dense(tables):
    return sum(map(dense_bytes, tables))
