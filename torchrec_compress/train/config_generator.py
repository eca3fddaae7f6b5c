"""What a config says of the embedded click generator.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torchrec_compress.schema import Natural, NonNegative, Range, Seed

TableRows = Annotated[int, Range(2, 2**31)]  # ids are int32 in memory


@dataclass(frozen=True)
class GeneratorConfig:
    """The embedded click generator.

    Args:
        num_rows: clicks over all splits.
        num_users: rows of the user table.
        num_items: rows of the item table.
        num_clusters: latent clusters of users and of items.
        zipf: exponent of the popularity of users and items; bigger is steeper.
        seed: of the whole data set, apart from the seed of the training.
        criteo_rows: over 0 draws the shape of MLPerf's Criteo instead, 26 tables of its sizes but at most so many rows,
            and 13 dense columns; users and items are not used then.
        multi_hot: with `criteo_rows`, whether rows have as many ids of a feature as in MLPerf's set, 214 in all.
    """

    num_rows: Annotated[int, Range(20)] = 1_000_000
    num_users: TableRows = 120_000
    num_items: TableRows = 20_000
    num_clusters: Annotated[int, Range(2)] = 16
    zipf: NonNegative = 1.1
    seed: Seed = 7
    criteo_rows: Natural = 0
    multi_hot: bool = False
