"""The schema of a run: what YAML files and the command line may set. Every value has one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from.

    Args:
        source: "synthetic" (the embedded generator), "parquet" or "criteo" (TorchRec's NumPy files).
        path: Parquet file, or folder of Criteo day files; unused for synthetic data.
        features: id columns in order; empty means every integer column that has no other role (Parquet).
        label: label column (Parquet).
        split: split column with 0 train, 1 valid, 2 test (Parquet); empty splits at random 8:1:1 by `seed`.
        kind: column that tells kinds of negatives apart, reported apart; 0 is the positive. Empty: none.
        drop: {column: value}: rows with that value are left out (Parquet).
        exclude: columns that are not features (Parquet).
        fraction: share of the training rows that is used, a fixed sample by `seed`; validation and test stay whole.
        num_examples: examples of the generator.
        seed: of the generator, the random split and the sample.
    """

    source: Literal["synthetic", "parquet", "criteo"] = "synthetic"
    path: str = ""
    features: list[str] = field(default_factory=list)
    label: str = "label"
    split: str = "split"
    kind: str = ""
    drop: dict[str, int] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    fraction: float = 1.0
    num_examples: int = 1_000_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The recommender.

    Args:
        name: "deepfm", "dcnv2" or "dlrm".
        embedding_dim: width of every table.
        hidden: layer widths of the (over) MLP; its output layer comes on top.
        dense_hidden: layer widths of DLRM's MLP over dense features, before the one of embedding_dim.
        dropout: share of the MLP's activations that is dropped in training.
        embedding_dropout: the same for the embeddings.
        batch_norm: whether the MLP normalises its layers.
        cross_layers: DCN-V2's cross layers.
        cross_rank: rank of a cross layer's weight; 0 is full rank.
        init_std: spread of the tables' start values; 0 keeps TorchRec's uniform start.
    """

    name: Literal["deepfm", "dcnv2", "dlrm"] = "deepfm"
    embedding_dim: int = 32
    hidden: list[int] = field(default_factory=lambda: [256, 128])
    dense_hidden: list[int] = field(default_factory=lambda: [128])
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    batch_norm: bool = False
    cross_layers: int = 3
    cross_rank: int = 0
    init_std: float = 0.01


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizers and their schedule.

    Args:
        batch_size: examples per step.
        epochs: at most.
        table_optimizer: "adagrad" and "rowwise_adagrad" are fused into the backward of native tables; "adam" trains
            them densely (small tables only), and alone supports embedding_l2.
        table_lr: rate of native tables.
        lr: Adam's rate for everything else: MLPs and codebooks.
        codebook_lr: Adam's rate for codebooks and hot rows; 0 means `lr`.
        embedding_l2: weight of half the squared norm of all embedding tables in the loss.
        patience: evaluations without a better validation logloss before training stops; 0 never stops early.
        evals_per_epoch: validations per epoch.
        lr_decay: factor on all rates after an evaluation without improvement; 1 keeps them.
        final_lr: share of the rates that is left at the end of the last epoch, reached linearly; 1 keeps them.
        monitor: what validation judges by.
    """

    batch_size: int = 8192
    epochs: int = 2
    table_optimizer: Literal["adagrad", "rowwise_adagrad", "adam"] = "adagrad"
    table_lr: float = 0.05
    lr: float = 0.001
    codebook_lr: float = 0.0
    embedding_l2: float = 0.0
    patience: int = 2
    evals_per_epoch: int = 1
    lr_decay: float = 1.0
    final_lr: float = 1.0
    monitor: Literal["logloss", "auc"] = "logloss"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How a compressed model is made.

    Args:
        start: "pretrained": fit to a full model and start from its other weights too; "scratch": train from the start,
            codes (where the method learns any) fitted to the full model's tables or to co-occurrence.
        train: whether the compressed model is trained on; without, the fitted tables replace the full ones as they are.
        optim: values of `OptimConfig` that differ in this stage, e.g. {epochs: 1, lr: 0.0001}.
        distill: weight of the full model's predictions in the loss, in [0, 1]; the labels have the rest.
        train_dense: whether MLPs are trained in this stage.
        train_codebooks: whether codebooks and hot rows are.
        context: {table: table}: whose co-occurrence quantile codes are made of.
    """

    start: Literal["pretrained", "scratch"] = "pretrained"
    train: bool = True
    optim: dict[str, Any] = field(default_factory=dict)
    distill: float = 0.0
    train_dense: bool = True
    train_codebooks: bool = True
    context: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        data: examples.
        model: the recommender.
        optim: optimizers of the full model (and, with `stage.optim` on top, of the compressed one).
        compression: method by table name or pattern, as `torchrec_compress.compression.parse` reads it, or
            {"budget_bytes": n} to share a budget out over tables; empty trains the full model.
        stage: how the compressed model is made.
        seed: of everything random but the data.
        out: folder of the run; a run that was cut off is continued from there.
        cache: folder of pre-trained full models, shared by runs; empty: inside `out`.
        checkpoint_every: steps between checkpoints; 0 only at validations.
        num_threads: of torch; 0 leaves its own choice.
        tensorboard: whether to write TensorBoard logs.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compression: dict[str, Any] = field(default_factory=dict)
    stage: StageConfig = field(default_factory=StageConfig)
    seed: int = 0
    out: str = "runs/train"
    cache: str = ""
    checkpoint_every: int = 0
    num_threads: int = 0
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of methods over seeds.

    Args:
        base: what all variants share.
        variants: values that differ, by variant name, as nested mappings of `RunConfig`'s keys.
        seeds: of the runs.
        out: folder of the comparison; finished runs in it are not run again.
        title: of the report.
        reference: the variant that gaps are measured against.
    """

    base: RunConfig = field(default_factory=RunConfig)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    out: str = "runs/compare"
    title: str = "Comparison"
    reference: str = "full"
