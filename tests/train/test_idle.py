"""Settings that have nothing to act on are said."""

import pytest

from torchrec_compress.train.config import OptimConfig, RunConfig, StageConfig
from torchrec_compress.train.idle import idle_settings

HASH = {"*": {"method": "hash", "num_buckets": 9}}
PQ = {"u": {"method": "pq", "num_codes": 2}, **HASH}
ON = StageConfig(epochs=1, optim=OptimConfig(codebook_lr=0.5), train_codebooks=False)


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (RunConfig(), []),
        (RunConfig(pretrain=StageConfig(patience=7), compression=PQ, retrain=ON), []),
        (
            RunConfig(start="scratch", compression=HASH, pretrain=StageConfig(optim=OptimConfig(table_lr=0.9))),
            ["pretrain.optim.table_lr: changes nothing with start = 'scratch', which has no stage pretrain"],
        ),
        (RunConfig(start="scratch", pretrain=StageConfig(patience=7)), []),
        (
            RunConfig(compression=PQ, retrain=StageConfig(epochs=0, distill_weight=0.5)),
            ["retrain.distill_weight: changes nothing with retrain.epochs = 0"],
        ),
        (
            RunConfig(retrain=StageConfig(epochs=1, patience=7)),
            ["retrain.patience: changes nothing with no compression, which has no stage retrain"],
        ),
        (
            RunConfig(compression=HASH, retrain=ON),
            [
                "retrain.optim.codebook_lr: changes nothing without a table that has codebooks or a projection",
                "retrain.train_codebooks: changes nothing without a table that has codebooks or a projection",
            ],
        ),
        (RunConfig(compression={"method": "narrow", "width": 8}, retrain=ON), []),
        (RunConfig(compression={"budget_ratio": 9}, retrain=ON), []),
        (
            RunConfig(compression=HASH, context={"user": "item"}),
            ["context: changes nothing without a table that is fitted to contexts (quantile)"],
        ),
        (RunConfig(compression={"method": "quantile", "num_codes": 2}, context={"user": "item"}), []),
    ],
)
def test_a_setting_without_effect_is_said(config, lines):
    assert idle_settings(config) == lines
