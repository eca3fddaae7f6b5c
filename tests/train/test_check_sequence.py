"""What is refused of a config of sequences before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrec_compress.train.check import check_config
from torchrec_compress.train.command_line import read_file
from torchrec_compress.train.config import RunConfig, lasting, override
from torchrec_compress.train.plan_from_training import from_training

TRIAL = {"compression": {"trial_epochs": 1}, "retrain.epochs": 1.0}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _config(**changes) -> RunConfig:
    base = {"curvature_rows": 0, "data.sequence.by": "user", "model": {"name": "hstu", "embedding_dim": 8}}
    return override(override(RunConfig(), base), changes)


def test_a_config_of_sequences_passes():
    check_config(_config())
    check_config(_config(**{"model.name": "sasrec", "pretrain.monitor": "ndcg10"}))


@pytest.mark.parametrize("name", ["hstu_ml1m.yaml", "hstu_globo_news.yaml"])
def test_the_configs_pass_but_for_their_path(name):
    from torchrec_compress.train.check import check_variants

    config = override(RunConfig(), {**read_file(CONFIGS / name), "data.path": "rows.parquet"})
    assert "full" in check_variants(config)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model.name": "deepfm"}, r"data\.sequence\.by: must be null with model\.name = 'deepfm', got 'user'"),
        ({"data.sequence.by": None}, r"data\.sequence\.by: must name the column of sequences with .*'hstu', got None"),
        ({"data.sequence.by": "item"}, r"must be another column than data\.sequence\.item, got 'item' twice"),
        ({"data.sequence.order_seed": 3}, r"order_seed: has no meaning with data\.sequence\.order = 'file', got 3"),
        ({"model.attention.num_heads": 3}, r"num_heads: must divide model\.embedding_dim = 8, got 3"),
        ({"model.hidden": [4]}, r"model\.hidden: has no meaning with model\.name = 'hstu'.*, got \[4\]"),
        ({"model.bfloat16": True}, r"model\.bfloat16: has no meaning"),
        ({"data.streaming": True}, r"data\.streaming: has no meaning"),
        ({"data.kind": "criteo", "data.path": "here"}, r"data\.kind: must be 'parquet' or 'generator'"),
        ({"data.kind": "parquet", "data.path": "a", "data.label": "click"}, r"data\.label: has no meaning"),
        ({"pretrain.monitor": "auc"}, r"pretrain\.monitor: must be another for a model of sequences.*, got 'auc'"),
        ({"retrain.distill_weight": 0.5}, r"retrain\.distill_weight: has no meaning"),
        ({"pretrain.optim.lookup_l2": 0.5}, r"pretrain\.optim\.lookup_l2: has no meaning"),
        ({"pretrain.optim.adaptive_l2": 0.5}, r"pretrain\.optim\.adaptive_l2: has no meaning"),
        ({"curvature_rows": 9, "compression": {"method": "int8"}}, r"curvature_rows: must be 0 .*, got 9"),
        (
            {"compression": {"method": "quantile", "num_codes": 4}},
            r"compression: must not need contexts.*'hstu', got 'quantile'",
        ),
        ({"compression": {"budget_ratio": 4}}, r"compression: must name methods .*'hstu', got a budget"),
        ({**TRIAL, "start": "scratch"}, r"compression: must name methods .*, got a trial"),
    ],
)
def test_what_cannot_work_is_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        check_config(_config(**changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data.sequence.max_length": 7}, r"data\.sequence\.max_length: has no meaning without a model of sequences"),
        ({"model.attention.num_heads": 2}, r"model\.attention: has no meaning without a model of sequences"),
        ({"pretrain.monitor": "ndcg10"}, r"pretrain\.monitor: must be another for a model of clicks.*, got 'ndcg10'"),
    ],
)
def test_what_clicks_have_no_use_for_is_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        check_config(override(RunConfig(), changes))


def test_what_clicks_trained_before_goes_on():
    """Keys of sequences leave no trace in what a run of clicks depends on."""
    plain = lasting(RunConfig())
    assert "sequence" not in plain["data"] and "attention" not in plain["model"]
    assert "sequence" in lasting(_config())["data"]


def test_the_one_table_of_items_is_planned_unpooled():
    clicks = {"num_users": 500, "num_items": 300}
    config = _config(**{"data.generator": clicks, "data.sequence.max_length": 20, "data.sequence.num_negatives": 64})
    planned = from_training(override(config, {"pretrain.batch_size": 32}))
    assert planned["unpooled"] and [*planned["tables"]] == ["item"]
    assert planned["tables"]["item"]["num_embeddings"] == 300
    assert planned["tables"]["item"]["pooling_factor"] == 42.0  # what was, what came next, two negatives
    with pytest.raises(ValueError, match=r"data\.vocab: must give the rows of every table .* \['film'\]"):
        from_training(override(config, {"data": {"kind": "parquet", "path": "a", "sequence": {"item": "film"}}}))
    with pytest.raises(ValueError, match=r"data\.sequence\.item: must be a column of .*, got 'film'"):
        from_training(override(config, {"data.sequence.item": "film"}))
    assert not from_training(RunConfig())["unpooled"]
