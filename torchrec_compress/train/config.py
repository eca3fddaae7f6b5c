"""The single schema of a run: frozen dataclasses, read from YAML and the command line by `command_line`.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from torchrec_compress.schema import Natural, NonNegative, Positive, Range, Rate, Seed, build
from torchrec_compress.train.config_generator import GeneratorConfig
from torchrec_compress.train.config_sequence import AttentionConfig, SequenceConfig

Config = TypeVar("Config")
Value = TypeVar("Value")


# ids are int32 in memory
IdRows = Annotated[int, Range(1, 2**31)]


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and which columns count.

    Args:
        kind: the embedded generator, Parquet, or Criteo's files.
        path: a Parquet file or a folder of them, or the folder (or TSV file) of Criteo; unused by the generator.
        streaming: whether rows are read from the files as they are needed, for sets that do not fit into memory.
        lanes: streaming only: streams of rows that a global batch is made of, in equal parts; a multiple of the number
            of ranks that divides the batch size. The batches depend on it, and not on the number of ranks.
        chunk_rows: streaming only: rows that are read at once; Parquet files state their own (row groups).
        window: streaming only: chunks of a lane that are shuffled together; a lane holds up to two windows in memory.
        num_workers: streaming only: threads that read ahead; 0 reads when rows are needed.
        label: the label column.
        positive_from: smallest value of the label column that counts as a click; null where the column is 0 or 1.
        features: Parquet only: the id columns. Empty means all that the schema metadata `vocab` names or, where there
            is none, all columns that no other key names and that are not pandas' index; less `drop`.
        drop: Parquet only: columns to leave out of those.
        row_filter: keeps rows, such as "rating != 3"; one comparison of a column with an int.
        dense: Parquet only: columns of dense values.
        pooling: the most ids that a row has of a feature, where that is over one; Parquet's columns of lists are read
            with it, and `plan` takes it for the pooling factor.
        split: Parquet only: a column with 0 train, 1 valid, 2 test; null splits by `split_by`. Streamed row groups must
            lie in one split each; a folder with the folders train, valid and test is streamed as they say.
        split_by: "drawn" draws the split of every row (streaming: of every chunk) by `split_seed`; "order" takes the
            first rows for train, then valid, then test; "last_file" trains on all files but the last, of which the
            first half is valid and the second is test, as MLPerf splits Criteo's 24 days.
        fractions: share of train and valid where the split is drawn or by order; the rest is test.
        split_seed: of the drawn split and of the subsample.
        subsample: share of the rows to keep, drawn by `split_seed`; 1 keeps all.
        subsample_by: column whose ids are kept or left out whole by `subsample`; null draws rows.
        kind_column: kind of negative, for an AUC per kind (0 is the positive); null for none.
        tail_tables: tables whose rare ids make up the tail; empty means all tables over 1,000 rows.
        tail_count: an id seen fewer times than this in train is rare; 0 leaves the tail out, and for streamed data a
            pass over train that counts.
        vocab: rows per table where neither the metadata nor max + 1 is wanted.
        hash_size: Criteo only: ids are taken modulo this, as TorchRec's `hashes`, for all tables or by table; null for
            files of contiguous ids.
        generator: settings of the embedded generator.
        sequence: how rows are grouped into sequences, for the models that read those.
    """

    kind: Literal["generator", "parquet", "criteo"] = "generator"
    path: str | None = None
    streaming: bool = False
    lanes: Positive = 8
    chunk_rows: Positive = 16384
    window: Positive = 4
    num_workers: Natural = 2
    label: str = "label"
    positive_from: Annotated[int, Range()] | None = None
    features: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    row_filter: str | None = None
    dense: list[str] = field(default_factory=list)
    pooling: dict[str, Positive] = field(default_factory=dict)
    split: str | None = "split"
    split_by: Literal["drawn", "order", "last_file"] = "drawn"
    fractions: list[Annotated[float, Range(0, 1, above=True, below=True)]] = field(default_factory=lambda: [0.8, 0.1])
    split_seed: Seed = 0
    subsample: Annotated[float, Range(0, 1, above=True)] = 1.0
    subsample_by: str | None = None
    kind_column: str | None = None
    tail_tables: list[str] = field(default_factory=list)
    tail_count: Natural = 10
    vocab: dict[str, IdRows] = field(default_factory=dict)
    hash_size: IdRows | dict[str, IdRows] | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The recommender over the embeddings.

    Args:
        name: which model; its parts are TorchRec's own modules where those allow it. "dlrm_dcnv2" is MLPerf's; "hstu"
            and "sasrec" read sequences (`data.sequence`) and say which item comes next.
        embedding_dim: width of every table; FBGEMM wants a multiple of 4.
        widths: width by table name where it differs; only DCN-V2 allows that.
        init_scale: tables start uniform in +- this; null is TorchRec's own +- 1 / sqrt(N).
        hidden: widths of the hidden layers of the deep net: "deepfm" has it over all embeddings, "dlrm" over dot
            products and embeddings, "dlrm_dcnv2" over what the cross layers return (MLPerf's top net, less its last
            layer of width 1), "dcnv2" beside the cross layers.
        bottom: widths of the net over dense columns of "dlrm" and "dlrm_dcnv2", the last of which is `embedding_dim`;
            empty is `hidden` and `embedding_dim`.
        dropout: of the hidden layers.
        embedding_dropout: of the embeddings, whatever reads them.
        input_dropout: of what the deep net reads; products of embeddings beside it see all.
        batch_norm: whether hidden layers are batch normalised.
        num_cross_layers: cross layers of "dcnv2" and "dlrm_dcnv2".
        cross_rank: their low rank; null is a quarter of the width, as TorchRec advises.
        bfloat16: whether the deep net's matrix products run in bfloat16; weights and losses stay float32.
        attention: the blocks of "hstu" and "sasrec".
    """

    name: Literal["dlrm", "deepfm", "dcnv2", "dlrm_dcnv2", "hstu", "sasrec"] = "deepfm"
    embedding_dim: Positive = 32
    widths: dict[str, Positive] = field(default_factory=dict)
    init_scale: NonNegative | None = 0.01
    hidden: list[Positive] = field(default_factory=lambda: [256, 128])
    bottom: list[Positive] = field(default_factory=list)
    dropout: Rate = 0.0
    embedding_dropout: Rate = 0.0
    input_dropout: Rate = 0.0
    batch_norm: bool = False
    num_cross_layers: Natural = 3
    cross_rank: Positive | None = None
    bfloat16: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizers of one stage.

    Args:
        tables: optimizer of native tables. All but "adam" run fused in the backward pass; "adam" keeps dense gradients
            (tables are replicated), the only way to a true l2 over whole tables on a CPU.
        table_lr: learning rate of native tables.
        table_l2: l2 of whole tables, as `table_l2 / 2 * sum of squares` in the loss; with "adam" only, since FBGEMM's
            CPU kernels ignore weight decay.
        lookup_l2: l2 of the rows that a batch looks up, as `lookup_l2 / 2 * mean over the batch of their squares`.
        adaptive_l2: the same, each id by the inverse of its share of train, so that what a rare id learns is pulled as
            hard as what a frequent one does: over an epoch what `table_l2` does to whole tables, with any optimizer.
            Training holds a byte an id for it. (Frequency-adaptive regularisation, as in arXiv 2511.06374.)
        average_squares: Adagrad of native tables alone: squares of gradients are averaged over the steps so far, as in
            RMSprop and Adam, not added up, which shortens steps for good: the rate of tables grows with the root of the
            number of steps, and falls by `decay` alone. A batch without an id counts as a gradient of zero, so that one
            which is in a share p of batches takes steps that are 1 / sqrt(p) as long, as with Adam over whole tables.
        dense: optimizer of everything that is not a fused table: the dense net, codebooks, replicated tables.
        dense_lr: learning rate of the dense net.
        dense_l2: l2 of the dense net.
        codebook_lr: learning rate of codebooks and other decoder parameters.
        decay: "linear" falls to 2 % of the rates at the last step; "plateau" divides by 10 when validation stalls.
        decay_patience: validations without a better one that "plateau" lets pass each time; a validation of rows of few
            bits, which are noisy at the first rate, may be worse by chance.
        gradients: what gradients of everything that each rank has a copy of are sent as, with error feedback
            (`sharding.compress_gradients`); one rank sends none.
    """

    tables: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    table_lr: NonNegative = 0.05
    table_l2: NonNegative = 0.0
    lookup_l2: NonNegative = 0.0
    adaptive_l2: NonNegative = 0.0
    average_squares: bool = False
    dense: Literal["adam", "adagrad"] = "adam"
    dense_lr: NonNegative = 1e-3
    dense_l2: NonNegative = 0.0
    codebook_lr: NonNegative = 1e-3
    decay: Literal["none", "linear", "plateau"] = "linear"
    decay_patience: Natural = 0
    gradients: Literal["float32", "bfloat16", "int8", "int4"] = "float32"


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Args:
        epochs: at most so many passes, which may be a fraction; 0 trains nothing, which only `retrain` may after a fit.
        batch_size: rows per step, over all ranks together.
        evals_per_epoch: validations per epoch.
        patience: stop after so many validations without a better one; 0 never stops early.
        monitor: what validation compares; "auc" of clicks, "ndcg10" of sequences.
        train_dense: whether the dense net is trained.
        train_tables: whether native tables are trained.
        train_codebooks: whether codebooks and other decoder parameters are trained.
        dequantize: whether codebooks and hot rows that a fit has stored in few bits are trained too: in float32, which
            training then holds, and rounded at the end; else they are frozen.
        distill_weight: weight of the cross-entropy against the full model's probabilities; the label has the rest.
        start_l2: pulls parameters (not native tables) to where the stage started, as `start_l2 / 2 * squared distance`.
        checkpoint_every: steps between checkpoints besides those at validations; 0 for none.
        keep_checkpoints: newest checkpoints that are kept, besides that of the best validation.
        log_every: steps between lines of the training loss in metrics.jsonl; 0 for none but those at validations.
        skip_bad_batches: batches whose loss is not finite that may be left out, each with a line in metrics.jsonl; at
            one more, and at the first with 0, the training stops.
        optim: the optimizers.
    """

    epochs: NonNegative = 2.0
    batch_size: Positive = 4096
    evals_per_epoch: Positive = 1
    patience: Natural = 2
    monitor: Literal["logloss", "auc", "ndcg10"] = "logloss"
    train_dense: bool = True
    train_tables: bool = True
    train_codebooks: bool = True
    dequantize: bool = False
    distill_weight: Annotated[float, Range(0, 1)] = 0.0
    start_l2: NonNegative = 0.0
    checkpoint_every: Natural = 0
    keep_checkpoints: Positive = 2
    log_every: Natural = 0
    skip_bad_batches: Natural = 0
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class ParallelConfig:
    """How a run uses its ranks; a process without torchrun is one rank, for which all but `timeout` acts too.

    Args:
        device: where the model trains; "auto" is a GPU where there is one.
        timeout: seconds that a rank waits for the others before the job ends with an error.
        sharding_types: allowed sharding types, such as ["row_wise"], by table name, else by the last pattern that fits;
            a table that none fits may be sharded in any way but "data_parallel". On a CPU TorchRec does not offer
            "row_wise" for tables that are not compressed, as the full model's; give both: ["row_wise", "table_wise"].
        init: "host" makes every rank start from the same whole model in its host's memory, so that any number of ranks
            starts with the same weights; "shards" makes each rank draw its own shards on its device, for tables that
            no host can hold.
        profile_steps: training steps of each stage of which every rank writes a profiler trace, after a warm-up of ten;
            0 for none.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Annotated[float, Range(0, 1e9, above=True)] = 600.0
    sharding_types: dict[str, list[str]] = field(default_factory=dict)
    init: Literal["host", "shards"] = "host"
    profile_steps: Natural = 0


@dataclass(frozen=True)
class CompareConfig:
    """Which variants `compare` runs.

    Args:
        variants: overrides of this config by variant name; keys may be dotted, such as "model.embedding_dim".
        seeds: every variant runs once per seed.
        only: names of the variants to run; empty means all.
        num_workers: processes that run at a time.
    """

    variants: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=lambda: [0])
    only: list[str] = field(default_factory=list)
    num_workers: Positive = 2


@dataclass(frozen=True)
class RunConfig:
    """A whole run: pre-train full, compress, train compressed.

    Args:
        output: folder of the run.
        seed: of initialisation, shuffling and fitting.
        num_threads: CPU threads of a process; FBGEMM's CPU kernels are quickest with one.
        tensorboard: whether TensorBoard logs are written.
        start: compress a pre-trained model, or start the compressed tables anew ("scratch").
        compression: {"method": name, options} or such mappings by table name or pattern, see `compression.parse`; a
            mapping with the key "budget_bytes" or "budget_ratio" shares bytes out by `compression.for_budget`, one with
            "trial_epochs" chooses widths by short trainings (`width_trial.WidthTrial`); empty trains the full model
            only.
        pretrain_compression: how tables are stored while stage 1 trains, as `compression`, by methods that train from
            the start ("narrow", "hash"), no budget and no trial; empty is the full table. What `compression` is then
            fitted to, and `retrain` imitates, is that small model, and no full table is ever made.
        curvature_rows: rows of validation over which the curvature of the loss of stage 1's model is measured, once for
            all runs that share it: tables are fitted in that metric where their method can (docs/curvature.md), and the
            rise of the loss is predicted for all; 0 fits to squared error and predicts nothing.
        context: for quantile, LMA and graph codes, the table whose ids are another table's contexts.
        data: the rows.
        model: the recommender.
        pretrain: stage 1, the full model, or the small one of `pretrain_compression`.
        retrain: stage 3, the compressed model; it is the only stage where `start` is "scratch".
        parallel: ranks and devices.
        compare: the variants of `compare`.
    """

    output: str = "runs/default"
    seed: Seed = 0
    num_threads: Annotated[int, Range(1, 1024)] = 1
    tensorboard: bool = True
    start: Literal["pretrained", "scratch"] = "pretrained"
    compression: dict[str, Any] = field(default_factory=dict)
    pretrain_compression: dict[str, Any] = field(default_factory=dict)
    curvature_rows: Natural = 65536
    context: dict[str, str] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: StageConfig = field(default_factory=StageConfig)
    retrain: StageConfig = field(default_factory=lambda: StageConfig(epochs=0.0))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


def of_pattern(values: Mapping[str, Value], table: str) -> Value | None:
    """Return the value of a table by its own name, or by the last pattern that fits, or None.

    Example:
        >>> of_pattern({"[a]": 1, "*": 2}, "[a]"), of_pattern({"a*": 1, "*": 2}, "ab"), of_pattern({}, "a")
        (1, 2, None)
    """
    fitting = [value for pattern, value in values.items() if fnmatch.fnmatchcase(table, pattern)]
    return values.get(table, fitting[-1] if fitting else None)


def needs_pretrained(config: RunConfig) -> bool:
    """Return whether the model of stage 1, full or small, is trained first."""
    return config.start == "pretrained" or not config.compression


def override(config: Config, changes: Mapping[str, Any], where: str = "") -> Config:
    """Return a copy of a config dataclass with some keys changed.

    Args:
        config: any of the dataclasses above.
        changes: values by key; keys may be dotted and values of nested configs may be mappings.
        where: the key that holds the changes, for errors.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), or a value of the wrong type or size.

    Example:
        >>> override(RunConfig(), {"model.embedding_dim": 64, "retrain": {"epochs": 1.0}}).model.embedding_dim
        64
    """
    return build(type(config), changes, where, config)


# keys that earlier versions did not have, which stand for nothing, or the only way there was, where they are left out
_LATER = ("input_dropout", "pretrain_compression", "curvature_rows", "adaptive_l2", "average_squares", "decay_patience")
_LATER += ("dequantize",)
_LATER_WITH = (
    ("gradients", "float32"),
    ("sequence", dataclasses.asdict(SequenceConfig())),
    ("attention", dataclasses.asdict(AttentionConfig())),
)
# how a training is watched and kept, which may change when it resumes
_FREE = ("checkpoint_every", "keep_checkpoints", "log_every", "skip_bad_batches", "num_workers")


def lasting(config: Any) -> dict[str, Any]:
    """Return what of a config decides the outcome, as plain data: all but how the training is watched and kept.

    What a version before a key was there has trained goes on where the key is left out.

    Example:
        >>> lasting(StageConfig(log_every=7)) == lasting(StageConfig())
        True
    """
    plain = dataclasses.asdict(config)
    return {
        key: lasting(getattr(config, key)) if dataclasses.is_dataclass(getattr(config, key)) else value
        for key, value in plain.items()
        if key not in _FREE and not (key in _LATER and not value) and (key, value) not in _LATER_WITH
    }


def fingerprint(*parts: Any) -> str:
    """Return a short hash of configs and plain values, the same on every machine.

    Example:
        >>> fingerprint(RunConfig(), 0) == fingerprint(RunConfig(), 0)
        True
    """
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
