"""What a look-up of codes is told: the words that every tier shares."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Structure = Literal["product", "residual"]
# how a look-up is told to a kernel; see csrc/codebook_bags.h
RESIDUAL, MEAN, GATHERED, PACKED, ODD = 1, 2, 4, 8, 16


class BagLookup(NamedTuple):
    """One feature in one table: what is known before any batch.

    Args:
        table: number of its codebooks.
        feature: name of the feature.
        where: names table and feature in errors.
        structure: "product" or "residual".
        is_mean: whether sums are divided by the ids of a bag.
        num_packed: codes per row, M, where a byte of the code table holds two of them (see `pack_codes`); 0 where every
            integer is a code.
    """

    table: int
    feature: str
    where: str
    structure: Structure = "product"
    is_mean: bool = False
    num_packed: int = 0


class Span(NamedTuple):
    """Where the bags and the ids of a look-up are in a batch.

    Args:
        first_bag: of the batch.
        num_bags: of the look-up.
        first_id: of the batch.
        num_ids: of the look-up.
        is_gathered: whether the look-up's codes are those of its ids, gathered before; else a whole code table.
    """

    first_bag: int
    num_bags: int
    first_id: int
    num_ids: int
    is_gathered: bool = False


class IdBags(NamedTuple):
    """The ids of all features of a batch, one feature after another.

    Args:
        ids: (L,) int32 or int64; needed where codes are not gathered.
        offsets: (bags + 1,) int32 or int64, from 0 up to L; bag b is the ids [offsets[b], offsets[b + 1]). None: every
            id is a bag of its own.
        weights: (L,) floating point factors of the ids, or None.
        is_flat: whether look-ups may differ in their numbers of bags.
    """

    ids: Tensor | None = None
    offsets: Tensor | None = None
    weights: Tensor | None = None
    is_flat: bool = False
