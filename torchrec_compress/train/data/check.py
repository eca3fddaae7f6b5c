"""What a config says of its data, as far as that can be checked without reading any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from operator import attrgetter

from torchrec_compress.train.config import DataConfig, GeneratorConfig
from torchrec_compress.train.data.open import check_source
from torchrec_compress.train.data.splits import check_fractions

# what a kind of data has no use for; a value there would be lost without a word
_UNUSED = {
    "generator": (
        *("path", "label", "features", "drop", "row_filter", "dense", "positive_from", "pooling", "split", "split_by"),
        *("fractions", "split_seed", "subsample", "subsample_by", "kind_column", "vocab", "hash_size"),
    ),
    "criteo": ("split", "features", "drop", "row_filter", "dense", "positive_from", "subsample_by", "kind_column"),
    "parquet": ("hash_size",),
}


def check_data(config: DataConfig) -> None:
    """Raise ValueError for settings of `data` that cannot work, or that do nothing beside the others."""
    check_source(config)
    default = DataConfig()
    for key, reason in _idle(config):
        got = attrgetter(key)(config)
        if got != attrgetter(key)(default):
            raise ValueError(f"data.{key}: has no meaning {reason}, got {got!r}")
    if config.generator.multi_hot and not config.generator.criteo_rows:
        raise ValueError("data.generator.multi_hot: must be false without data.generator.criteo_rows, got true")
    check_fractions(config)
    if config.row_filter:
        from torchrec_compress.train.data.parquet_schema import parse_filter  # needs pyarrow

        parse_filter(config.row_filter)
    for key, names in _lists(config):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"data.{key}: names must differ, got {twice[0]!r} twice")


def _idle(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys of `data` that do nothing beside other keys, and why; a value there would be lost."""
    kind = f"with data.kind = {config.kind!r}"
    yield from ((key, kind) for key in _UNUSED[config.kind])
    if config.kind != "generator":
        yield from ((f"generator.{key.name}", kind) for key in fields(GeneratorConfig))
    elif config.generator.criteo_rows:
        yield from ((f"generator.{key}", "with data.generator.criteo_rows") for key in ("num_users", "num_items"))
    if not config.streaming:
        yield from ((key, "without data.streaming") for key in ("lanes", "chunk_rows", "window", "num_workers"))
    elif config.kind == "parquet":
        yield "chunk_rows", "with streamed Parquet files, which state their own row groups"
    if config.subsample == 1:
        yield "subsample_by", "with data.subsample = 1"
    if config.tail_count == 0:
        yield "tail_tables", "with data.tail_count = 0"
    yield from _idle_of_split(config)


def _idle_of_split(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys that draw a split where nothing is drawn, and why."""
    if config.kind == "parquet" and config.split is not None:
        reason = f"beside the column data.split = {config.split!r}; set that to null for a split without a column"
        yield from (("split_by", reason), ("fractions", reason))
    else:
        reason = f"with data.split_by = {config.split_by!r}"
    if config.split_by == "last_file":
        yield "fractions", reason
    is_drawn = config.split_by == "drawn" and (config.kind != "parquet" or config.split is None)
    if not is_drawn and config.subsample == 1:
        yield "split_seed", reason


def _lists(config: DataConfig) -> Iterator[tuple[str, list[str]]]:
    for key in ("features", "drop", "dense", "tail_tables"):
        yield key, getattr(config, key)
