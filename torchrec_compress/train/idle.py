"""Settings of a run that have nothing to act on: said by `train`, since variants of a comparison may share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.methods import MethodConfig
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import compression_of
from torchrec_compress.train.config import RunConfig, needs_pretrained

_ANY = EmbeddingBagConfig(name="any", num_embeddings=10**6, embedding_dim=64)


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
    methods = _methods(config)
    if methods and not any(method.decoder_bytes(_ANY) for method in methods):
        for key in ("optim.codebook_lr", "train_codebooks"):
            if key in retrain and config.retrain.epochs:
                yield f"retrain.{key}: changes nothing without a table that has codebooks or a projection"
    if config.context and not any(method.needs == "contexts" for method in methods):
        yield "context: changes nothing without a table that is fitted to contexts (quantile)"


def _methods(config: RunConfig) -> list[MethodConfig]:
    """Return the methods that a run names; none for a budget, which chooses."""
    wanted = compression_of(config.compression)
    if wanted is None or isinstance(wanted, Budget):
        return []
    return list(wanted.values()) if isinstance(wanted, Mapping) else [wanted]


def _changed(mine: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys whose values differ."""
    for field in fields(mine):
        value, usual = getattr(mine, field.name), getattr(default, field.name)
        if is_dataclass(value):
            yield from _changed(value, usual, f"{prefix}{field.name}.")
        elif value != usual:
            yield prefix + field.name
