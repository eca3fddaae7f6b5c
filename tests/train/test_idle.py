"""Settings that have nothing to act on are said."""

from pathlib import Path

import pytest

from torchrec_compress.train.command_line import read
from torchrec_compress.train.config import ModelConfig, OptimConfig, RunConfig, StageConfig
from torchrec_compress.train.idle import idle_settings

CONFIGS = Path(__file__).parents[2] / "configs"
HASH = {"*": {"method": "hash", "num_buckets": 9}}
PQ = {"u": {"method": "pq", "num_codes": 2}, **HASH}
LOW_BIT = {"*": {"method": "pq", "num_codes": 2, "codebook_dtype": "int8"}}
BUDGET = {"budget_ratio": 9}
ON = StageConfig(epochs=1, optim=OptimConfig(codebook_lr=0.5), train_codebooks=False)
TRAINED = StageConfig(epochs=1, optim=OptimConfig(codebook_lr=0.5))
ALL = OptimConfig(tables="adagrad", table_lr=0.9, lookup_l2=0.1, dense_lr=0.9, dense_l2=0.1)


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (RunConfig(), []),
        (RunConfig(pretrain=StageConfig(patience=7), compression=PQ, retrain=TRAINED), []),
        (
            RunConfig(compression=PQ, retrain=ON),
            ["retrain.optim.codebook_lr: changes nothing with retrain.train_codebooks = false"],
        ),
        (
            RunConfig(pretrain=StageConfig(train_codebooks=False, optim=OptimConfig(codebook_lr=0.5))),
            [
                "pretrain.optim.codebook_lr: changes nothing in the full model, which has no codebooks",
                "pretrain.train_codebooks: changes nothing in the full model, which has no codebooks",
            ],
        ),
        (
            RunConfig(pretrain=StageConfig(train_tables=False, optim=ALL)),
            [
                f"pretrain.optim.{key}: changes nothing with pretrain.train_tables = false"
                for key in ("table_lr", "tables", "lookup_l2")
            ],
        ),
        (
            RunConfig(compression=PQ, retrain=StageConfig(epochs=1, train_tables=False, optim=ALL)),
            [
                f"retrain.optim.{key}: changes nothing with retrain.train_tables = false"
                for key in ("table_lr", "tables")
            ],
        ),
        (
            RunConfig(pretrain=StageConfig(train_tables=False, optim=OptimConfig(tables="adam", table_l2=0.1))),
            ["pretrain.optim.table_l2: changes nothing with pretrain.train_tables = false"],
        ),
        (
            RunConfig(pretrain=StageConfig(train_dense=False, optim=ALL)),
            [
                f"pretrain.optim.{key}: changes nothing with pretrain.train_dense = false"
                for key in ("dense_lr", "dense_l2")
            ],
        ),
        (RunConfig(pretrain=StageConfig(optim=ALL)), []),
        (RunConfig(start="scratch", compression=HASH, retrain=StageConfig(epochs=1, optim=ALL)), []),
        (
            RunConfig(model=ModelConfig(name="dcnv2", num_cross_layers=0, cross_rank=8)),
            ["model.cross_rank: changes nothing with model.num_cross_layers = 0"],
        ),
        (RunConfig(model=ModelConfig(name="dcnv2", cross_rank=8)), []),
        (
            RunConfig(start="scratch", compression=HASH, pretrain=StageConfig(optim=OptimConfig(table_lr=0.9))),
            ["pretrain.optim.table_lr: changes nothing with start = 'scratch', which has no stage pretrain"],
        ),
        (
            RunConfig(
                compression=LOW_BIT, retrain=StageConfig(epochs=1, dequantize=True, optim=OptimConfig(codebook_lr=1))
            ),
            [],
        ),
        (RunConfig(compression=BUDGET, retrain=StageConfig(epochs=1, dequantize=True)), []),
        (
            RunConfig(compression=PQ, retrain=StageConfig(epochs=1, dequantize=True)),
            ["retrain.dequantize: changes nothing without a table whose codebooks or hot rows are stored in few bits"],
        ),
        (
            RunConfig(compression=LOW_BIT, retrain=StageConfig(epochs=1, dequantize=True, train_codebooks=False)),
            ["retrain.dequantize: changes nothing with retrain.train_codebooks = false"],
        ),
        (
            RunConfig(start="scratch", compression=HASH, retrain=StageConfig(epochs=1, dequantize=True)),
            ["retrain.dequantize: changes nothing with start = 'scratch', which fits nothing"],
        ),
        (
            RunConfig(pretrain=StageConfig(dequantize=True)),
            ["pretrain.dequantize: changes nothing in stage 1, where nothing was fitted yet"],
        ),
        (RunConfig(pretrain=StageConfig(optim=OptimConfig(decay="plateau", decay_patience=1))), []),
        (
            RunConfig(pretrain=StageConfig(optim=OptimConfig(decay_patience=1))),
            ["pretrain.optim.decay_patience: changes nothing with pretrain.optim.decay = 'linear'"],
        ),
        (RunConfig(pretrain=StageConfig(optim=OptimConfig(average_squares=True))), []),
        (
            RunConfig(pretrain=StageConfig(train_tables=False, optim=OptimConfig(average_squares=True))),
            ["pretrain.optim.average_squares: changes nothing with pretrain.train_tables = false"],
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
        (RunConfig(compression={"method": "narrow", "width": 8}, retrain=TRAINED), []),
        (RunConfig(pretrain=TRAINED, pretrain_compression={"method": "narrow", "width": 8}), []),
        (
            RunConfig(
                model=ModelConfig(embedding_dim=64),
                pretrain=TRAINED,
                pretrain_compression={"method": "narrow", "width": 64, "bits": 8},
            ),
            ["pretrain.optim.codebook_lr: changes nothing without a table that has codebooks or a projection"],
        ),
        (
            RunConfig(
                model=ModelConfig(embedding_dim=128),
                compression={"method": "narrow", "width": 64, "bits": 8},
                retrain=TRAINED,
            ),
            [],
        ),
        (RunConfig(compression={"budget_ratio": 9}, retrain=TRAINED), []),
        (
            RunConfig(compression={"budget_ratio": 9}, context={"user": "item"}),
            ["context: changes nothing without a table that is fitted to contexts (quantile, lma, graph)"],
        ),
        (
            RunConfig(compression=HASH, context={"user": "item"}),
            ["context: changes nothing without a table that is fitted to contexts (quantile, lma, graph)"],
        ),
        (RunConfig(compression={"method": "quantile", "num_codes": 2}, context={"user": "item"}), []),
    ],
)
def test_a_setting_without_effect_is_said(config, lines):
    assert idle_settings(config) == lines


@pytest.mark.parametrize("name", ["criteo_1tb_dcnv2", "criteo_1tb_dcnv2_mec", "criteo_1tb_dcnv2_memcom"])
def test_no_shipped_training_has_such(name):
    assert idle_settings(read(RunConfig(), [f"{CONFIGS}/{name}.yaml"], "train")) == []
