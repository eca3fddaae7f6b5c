"""Which rows are for training, for validation and for the test, where no column says so."""

from __future__ import annotations

import numpy as np

from torchrec_compress.train.config import DataConfig


def split_ends(config: DataConfig, file_sizes: list[int]) -> tuple[int, int]:
    """Return the rows after the last of train and after the last of valid, where splits follow the order of the rows.

    Args:
        config: split_by, which must not be "drawn", and fractions.
        file_sizes: rows per file.

    Raises:
        ValueError: fractions that are none.

    Example:
        >>> split_ends(DataConfig(split_by="last_file"), [2, 5])
        (2, 5)
    """
    total = sum(file_sizes)
    if config.split_by == "last_file":
        start = total - file_sizes[-1]
        # the first half has one row more where the rows are odd, as in TorchRec's reader
        return start, start + -(-file_sizes[-1] // 2)
    train, valid = _fractions(config)
    return round(train * total), round((train + valid) * total)


def draw_split(config: DataConfig, file_sizes: list[int], chunk_sizes: list[int] | None = None) -> np.ndarray:
    """Return the split of every row, or of every chunk: (rows,) or (chunks,) of 0 train, 1 valid, 2 test.

    Args:
        config: split_by, fractions and split_seed.
        file_sizes: rows per file.
        chunk_sizes: rows per chunk, where whole chunks are split; a chunk goes where its first row belongs.

    Raises:
        ValueError: fractions that are none.

    Example:
        >>> draw_split(DataConfig(split_by="last_file"), [2, 4]).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    first = np.arange(sum(file_sizes)) if chunk_sizes is None else np.cumsum([0, *chunk_sizes[:-1]])
    if config.split_by != "drawn":
        return np.searchsorted(split_ends(config, file_sizes), first, side="right")
    shares = np.cumsum(_fractions(config))
    return np.searchsorted(shares, np.random.default_rng(config.split_seed).random(len(first)), side="right")


def check_fractions(config: DataConfig) -> None:
    """Raise ValueError unless `fractions` are shares of train and valid that leave some for the test."""
    shares = config.fractions
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) >= 1:
        raise ValueError(f"data.fractions: must be the shares of train and valid, below 1 in all, got {shares}")


def _fractions(config: DataConfig) -> tuple[float, float]:
    check_fractions(config)
    return config.fractions[0], config.fractions[1]
