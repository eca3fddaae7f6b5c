"""Open the data that a config asks for, in whichever format it is."""

from __future__ import annotations

from dataclasses import replace

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.source import ClickSource


def open_data(config: DataConfig, pin_memory: bool = False) -> ClickSource:
    """Return the data that a config asks for: in memory, or read as it is needed where `data.streaming` is set.

    Sequences, which `data.sequence.by` asks for, are held in memory.

    Args:
        config: which data.
        pin_memory: whether batches are put into page-locked memory, for a GPU.

    Raises:
        ValueError: a file that is missing, empty or malformed, see the readers.
    """
    if config.sequence.by is not None:
        check_source(config)
        from torchrec_compress.train.data.sequence_files import open_sequences

        return open_sequences(config, pin_memory)
    if not config.streaming:
        return replace(load_data(config), pin_memory=pin_memory)
    check_source(config)
    if config.kind == "criteo":
        from torchrec_compress.train.data.criteo import stream_criteo

        return stream_criteo(config, pin_memory)
    from torchrec_compress.train.data.parquet_stream import stream_parquet

    return stream_parquet(config, pin_memory)


def check_source(config: DataConfig) -> None:
    """Raise ValueError where a config names no files, or wants clicks streamed that are generated in memory."""
    if config.kind == "generator":
        if config.streaming:
            raise ValueError("data.streaming: must be false with data.kind = 'generator', got true")
    elif not config.path:
        raise ValueError(
            f"data.path: must be set with data.kind = {config.kind!r}, got {config.path!r}; pass --data.path FILE"
        )


def load_data(config: DataConfig) -> ClickData:
    """Read or generate the data that a config asks for, all of it in memory.

    Raises:
        ValueError: a file that is missing, empty or malformed, see the readers, or data that is to be streamed.

    Example:
        >>> from torchrec_compress.train.config import GeneratorConfig
        >>> small = GeneratorConfig(num_rows=2000, num_users=100, num_items=50)
        >>> len(load_data(DataConfig(generator=small)).train)
        1600
    """
    if config.streaming:
        raise ValueError("data.streaming: must be false to hold all rows in memory, got true")
    if config.kind == "generator":
        from torchrec_compress.train.data.generator import generate

        return generate(config.generator)
    check_source(config)
    if config.kind == "criteo":
        from torchrec_compress.train.data.criteo import read_criteo

        return read_criteo(config)
    from torchrec_compress.train.data.parquet import read_parquet

    return read_parquet(config)
