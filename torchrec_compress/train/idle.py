"""Settings of a run that have nothing to act on: said by `train`, since variants of a comparison may share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.methods import MethodConfig
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import compression_of
from torchrec_compress.train.config import ModelConfig, RunConfig, StageConfig, needs_pretrained
from torchrec_compress.train.sized import Sized
from torchrec_compress.train.width_trial import WidthTrial


def idle_settings(config: RunConfig) -> list[str]:
    """Return a line for each setting that is not the default and changes nothing in this run.

    Example:
        >>> from torchrec_compress.train.config import StageConfig
        >>> idle_settings(RunConfig(pretrain=StageConfig(patience=7), start="scratch", compression={"method": "int8"}))
        ["pretrain.patience: changes nothing with start = 'scratch', which has no stage pretrain"]
    """
    return list(_lines(config))


def _lines(config: RunConfig) -> Iterator[str]:
    default = RunConfig()
    if not needs_pretrained(config):
        for key in _changed(config.pretrain, default.pretrain):
            yield f"pretrain.{key}: changes nothing with start = 'scratch', which has no stage pretrain"
    retrain = [key for key in _changed(config.retrain, default.retrain) if key != "epochs"]
    if not config.compression or not config.retrain.epochs:
        reason = "retrain.epochs = 0" if config.compression else "no compression, which has no stage retrain"
        yield from (f"retrain.{key}: changes nothing with {reason}" for key in retrain)
    methods = _methods(config.compression)
    without = "without a table that has codebooks or a projection"
    if needs_pretrained(config):
        small = _methods(config.pretrain_compression)
        why = without if small else "in the full model, which has no codebooks"
        yield from _stage_lines("pretrain", config.pretrain, _has_decoders(small, config.model), why)
        if config.pretrain.dequantize:
            yield "pretrain.dequantize: changes nothing in stage 1, where nothing was fitted yet"
    if config.compression and config.retrain.epochs:
        # a budget or a trial may choose what has them
        trained = [method.dequantized() for method in methods] if config.retrain.dequantize else methods
        if config.retrain.dequantize and (why := _why_not_dequantized(config, not methods or trained != methods)):
            yield f"retrain.dequantize: changes nothing {why}"
        has_decoders = not methods or _has_decoders(trained, config.model)
        yield from _stage_lines("retrain", config.retrain, has_decoders, without)
    if config.model.cross_rank is not None and not config.model.num_cross_layers:
        yield "model.cross_rank: changes nothing with model.num_cross_layers = 0"
    if config.context and not any(method.needs == "contexts" for method in methods):
        yield "context: changes nothing without a table that is fitted to contexts (quantile, lma, graph)"


def _stage_lines(name: str, stage: StageConfig, has_decoders: bool, without: str) -> Iterator[str]:
    """Yield what is idle in a stage that trains, of a model with codebooks or other decoders, or `without`."""
    changed, reasons = set(_changed(stage, StageConfig(epochs=stage.epochs))), {}
    if not stage.train_tables:
        keys = ["optim.table_lr", "optim.table_l2", "optim.average_squares"]
        if stage.optim.tables != "adam":  # which says how tables are laid out too
            keys.append("optim.tables")
        if not (has_decoders and stage.train_codebooks):
            keys += ["optim.lookup_l2", "optim.adaptive_l2"]
        reasons |= dict.fromkeys(keys, f"with {name}.train_tables = false")
    if not stage.train_dense:
        reasons |= dict.fromkeys(("optim.dense_lr", "optim.dense_l2"), f"with {name}.train_dense = false")
    if stage.optim.decay != "plateau":
        reasons["optim.decay_patience"] = f"with {name}.optim.decay = {stage.optim.decay!r}"
    if not has_decoders:
        reasons |= dict.fromkeys(("optim.codebook_lr", "train_codebooks"), without)
    elif not stage.train_codebooks:
        reasons["optim.codebook_lr"] = f"with {name}.train_codebooks = false"
    yield from (f"{name}.{key}: changes nothing {reason}" for key, reason in reasons.items() if key in changed)


def _why_not_dequantized(config: RunConfig, is_low_bit: bool) -> str:
    """Return why stage 3 has nothing in few bits to train, or "" where it has."""
    if not needs_pretrained(config):
        return "with start = 'scratch', which fits nothing"
    if not config.retrain.train_codebooks:
        return "with retrain.train_codebooks = false"
    return "" if is_low_bit else "without a table whose codebooks or hot rows are stored in few bits"


def _has_decoders(methods: list[MethodConfig], model: ModelConfig) -> bool:
    """Return whether some method trains a decoder; of the widest table, as narrow rows of its width have none."""
    width = max([model.embedding_dim, *model.widths.values()])
    table = EmbeddingBagConfig(name="any", num_embeddings=10**6, embedding_dim=width)
    return any(method.trains_decoder(table) for method in methods)


def _methods(compression: Mapping[str, Any]) -> list[MethodConfig]:
    """Return the methods that are named; none for a budget or a trial, which chooses."""
    wanted = compression_of(compression)
    if wanted is None or isinstance(wanted, Budget | WidthTrial):
        return []
    if isinstance(wanted, Sized):
        return [wanted.method]
    return list(wanted.values()) if isinstance(wanted, Mapping) else [wanted]


def _changed(mine: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys whose values differ."""
    for field in fields(mine):
        value, usual = getattr(mine, field.name), getattr(default, field.name)
        if is_dataclass(value):
            yield from _changed(value, usual, f"{prefix}{field.name}.")
        elif value != usual:
            yield prefix + field.name
