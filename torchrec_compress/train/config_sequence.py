"""What a config says of models of what comes next: how rows become sequences, and the blocks that read them.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchrec_compress.schema import Positive, Seed

# names of `model.name` that read sequences; all others read clicks
SEQUENCE_MODELS = ("hstu", "sasrec")


@dataclass(frozen=True)
class SequenceConfig:
    """The sequences of items that rows are grouped into, each split by its end: the last is test, the one before valid.

    Args:
        by: column whose ids tell sequences apart, such as a user or a session; null: rows are clicks, not sequences.
        item: column of the items, which have the one table.
        max_length: items that are read at once, the last ones where there are more; a longer sequence trains in windows
            of so many pairs, cut from its end.
        order: "file" keeps the order of the rows; "drawn" draws one for each sequence by `order_seed`, for files that
            do not tell when a row was: what comes next is then any other item of the sequence.
        order_seed: of the drawn order.
        num_negatives: items that are drawn for each batch, uniformly and with replacement, with which each next item of
            the batch is contrasted (sampled softmax); where one is that item itself, it does not count.
    """

    by: str | None = None
    item: str = "item"
    max_length: Positive = 50
    order: Literal["file", "drawn"] = "file"
    order_seed: Seed = 0
    num_negatives: Positive = 512


@dataclass(frozen=True)
class AttentionConfig:
    """The blocks of "hstu" and "sasrec".

    Args:
        num_blocks: blocks one after the other.
        num_heads: heads of each, which divide `embedding_dim`.
    """

    num_blocks: Positive = 2
    num_heads: Positive = 1
