"""Which collection and which model a config names: of clicks over pooled tables, or of sequences over unpooled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.compression import Compression
from torchrec_compress.train.config import ModelConfig
from torchrec_compress.train.config_sequence import SEQUENCE_MODELS
from torchrec_compress.train.data.sequences import SequenceData
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.models import click
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.models.sequence import SequenceModel, item_table

CompressedTables: TypeAlias = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection


def make_tables(config: ModelConfig, data: ClickSource) -> list[Any]:
    """Return the configs of the model's tables; see `tables_of`."""
    return tables_of(config, dict(zip(data.features, data.vocab, strict=True)))


def tables_of(config: ModelConfig, rows: Mapping[str, int]) -> list[Any]:
    """Return a table per name, of pooled embeddings or, of a model of sequences, of unpooled ones.

    Args:
        config: of the model.
        rows: by name.

    Raises:
        ValueError: a width that FBGEMM or the model does not allow, or a width for an unknown table.
    """
    if config.name in SEQUENCE_MODELS:
        return [item_table(config, name, size) for name, size in rows.items()]
    return click.tables_of(config, rows)


def full_tables(config: ModelConfig, tables: list[Any], device: torch.device | None = None) -> Any:
    """Return TorchRec's own collection of tables."""
    if config.name in SEQUENCE_MODELS:
        return EmbeddingCollection(tables=tables, device=device)
    return EmbeddingBagCollection(tables=tables, device=device)


def compressed_tables(
    config: ModelConfig, tables: list[Any], chosen: Compression, seed: int, device: torch.device | None = None
) -> CompressedTables:
    """Return a compressed collection of tables, not fitted yet."""
    kind: Any = CompressedEmbeddingCollection if config.name in SEQUENCE_MODELS else CompressedEmbeddingBagCollection
    return kind(tables, device=device, compression=chosen, seed=seed)


def make_model(config: ModelConfig, embeddings: Any, data: ClickSource) -> Recommender:
    """Build the model that a config names over a collection.

    Raises:
        ValueError: settings that the model refuses, or data of the other kind.
    """
    is_sequence = isinstance(data, SequenceData)
    if is_sequence != (config.name in SEQUENCE_MODELS):
        read = "sequences" if is_sequence else "clicks"
        raise ValueError(f"model.name: must be a model of {read}, which the data are, got {config.name!r}")
    if isinstance(data, SequenceData):
        return SequenceModel(embeddings, data.config.max_length, config)
    return click.make_model(embeddings, data.num_dense, config)
