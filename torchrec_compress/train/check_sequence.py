"""What a config says of sequences, as far as that can be checked without reading any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.config_sequence import SEQUENCE_MODELS
from torchrec_compress.train.models.attention import check_heads
from torchrec_compress.train.sized import Sized
from torchrec_compress.train.width_trial import WidthTrial

# what sequences have no use for: rows of clicks, the nets that read them, and what is asked of their logits
_UNUSED = (
    *("data.label", "data.positive_from", "data.features", "data.drop", "data.dense", "data.pooling", "data.split"),
    *("data.split_by", "data.fractions", "data.kind_column", "data.tail_tables", "data.tail_count", "data.hash_size"),
    *("data.streaming", "model.widths", "model.hidden", "model.bottom", "model.input_dropout", "model.batch_norm"),
    *("model.bfloat16", "context"),
    *(f"{stage}.{key}" for stage in ("pretrain", "retrain") for key in ("distill_weight", "optim.lookup_l2")),
    *(f"{stage}.optim.adaptive_l2" for stage in ("pretrain", "retrain")),
)


def check_sequence(config: RunConfig, wanted: Any) -> None:
    """Raise ValueError for settings of sequences and of their models that cannot work, or that do nothing.

    Args:
        config: of a run.
        wanted: what its `compression` asks for, as `compression_of` returns it.
    """
    default = RunConfig()
    is_model, is_data = config.model.name in SEQUENCE_MODELS, config.data.sequence.by is not None
    if is_model != is_data:
        needs = "name the column of sequences" if is_model else "be null"
        raise ValueError(
            f"data.sequence.by: must {needs} with model.name = {config.model.name!r}, got "
            f"{config.data.sequence.by!r}; models of sequences are {list(SEQUENCE_MODELS)}"
        )
    unused = _idle_of_sequences(config) if is_model else _idle_of_clicks()
    for key, reason in unused:
        got = attrgetter(key)(config)
        if got != attrgetter(key)(default):
            raise ValueError(f"{key}: has no meaning {reason}, got {got!r}")
    for stage in ("pretrain", "retrain"):
        monitor = attrgetter(f"{stage}.monitor")(config)
        if monitor == ("auc" if is_model else "ndcg10"):
            told = "sequences, which have no AUC" if is_model else "clicks, which have no nDCG"
            raise ValueError(f"{stage}.monitor: must be another for a model of {told}, got {monitor!r}")
    if is_model:
        _check_model(config)
        _check_compression(config, wanted)


def _check_compression(config: RunConfig, wanted: Any) -> None:
    """Raise ValueError for what asks more of the data than items by their counts."""
    reason = f"with model.name = {config.model.name!r}"
    if isinstance(wanted, Budget | WidthTrial):
        what = "a budget to share out" if isinstance(wanted, Budget) else "a trial"
        raise ValueError(f"compression: must name methods {reason}, got {what}; a budget with a method is none")
    methods = (
        wanted.values() if isinstance(wanted, Mapping) else [wanted.method if isinstance(wanted, Sized) else wanted]
    )
    for method in methods:
        if method is not None and method.needs == "contexts":
            raise ValueError(f"compression: must not need contexts {reason}, got {method.method!r}; there is one table")


def _check_model(config: RunConfig) -> None:
    sequence, reason = config.data.sequence, f"with model.name = {config.model.name!r}"
    if config.data.kind == "criteo":
        raise ValueError(f"data.kind: must be 'parquet' or 'generator' {reason}, got 'criteo'")
    if sequence.by == sequence.item:
        raise ValueError(f"data.sequence.by: must be another column than data.sequence.item, got {sequence.by!r} twice")
    check_heads(config.model.embedding_dim, config.model.attention.num_heads)
    if config.curvature_rows and config.compression and config.start == "pretrained":
        raise ValueError(
            f"curvature_rows: must be 0 {reason}, got {config.curvature_rows}; tables of sequences are fitted to "
            "squared error"
        )


def _idle_of_sequences(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield from ((key, f"with model.name = {config.model.name!r}, which reads sequences") for key in _UNUSED)
    if config.data.sequence.order == "file":
        yield "data.sequence.order_seed", "with data.sequence.order = 'file'"


def _idle_of_clicks() -> Iterator[tuple[str, Any]]:
    reason = "without a model of sequences (model.name)"
    yield from ((f"data.sequence.{key}", reason) for key in ("item", "max_length", "order", "order_seed"))
    yield "data.sequence.num_negatives", reason
    yield "model.attention", reason
