"""A sketch of the ids that matter most: SpaceSaving in every bucket of a hash table, many ids at a time.

Metwally, Agrawal and El Abbadi 2005 for one id at a time; buckets as in CAFE's HotSketch (arXiv 2312.03256, section
3.2). A batch is an exact summary of itself, so that merging it needs no order of its ids: ids of the batch add to what
their slots hold, others come with the smallest score of their bucket on top of their own, and the largest stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_compress.managers.segments import Distinct, ranked
from torchrec_compress.ops import hash_ids

UNIT = 2**20
"""Amounts are integers of this many to one: they add up to the same in any order."""


class Found(NamedTuple):
    """Where ids are in the sketch.

    Args:
        bucket: (L,) int64.
        slot: (L,) int64 place in the bucket; any where an id has none.
        is_held: (L,) bool, whether it has one.
        score: (L,) float32; zero without one.
        row: (L,) int64 hot row of its block; -1 without one.
    """

    bucket: Tensor
    slot: Tensor
    is_held: Tensor
    score: Tensor
    row: Tensor


class Sketch(nn.Module):
    """Hold scores of some ids of every block.

    In a bucket of c slots no score is too small, none is too large by more than the smallest of its bucket, and that is
    at most 1/c of all that the bucket was given. So an id that got more than 1/c of it has a slot.

    Args:
        num_blocks: blocks that are held here.
        ids_per_block: places of a block.
        num_buckets: of a block.
        num_slots: of a bucket, c.
        salt: of the hash.
        device: of the buffers.

    Attributes:
        ids: buffer, (buckets, c) integer: place in the block, plus 1; 0 is an empty slot.
        scores: buffer, (buckets, c) float32.
        rows: buffer, (buckets, c) int32: hot row of the block, plus 1; 0 is none.
    """

    ids: Tensor
    scores: Tensor
    rows: Tensor

    def __init__(
        self,
        num_blocks: int,
        ids_per_block: int,
        num_buckets: int,
        num_slots: int,
        salt: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._ids_per_block, self._num_buckets, self._salt = ids_per_block, num_buckets, salt
        shape = (num_blocks * num_buckets, num_slots)
        of_ids = torch.int32 if ids_per_block < 2**31 else torch.int64
        self.register_buffer("ids", torch.zeros(shape, dtype=of_ids, device=device))
        self.register_buffer("scores", torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("rows", torch.zeros(shape, dtype=torch.int32, device=device))

    def find(self, places: Tensor) -> Found:
        """Return where ids are: (L,) integer places, counted from the first that is held here."""
        bucket, name = self._buckets(places)
        is_mine = self.ids.index_select(0, bucket) == name.unsqueeze(1)
        slot, is_held = is_mine.to(torch.uint8).argmax(1), is_mine.any(1)
        score = torch.where(is_mine, self.scores.index_select(0, bucket), 0.0).sum(1)
        row = torch.where(is_mine, self.rows.index_select(0, bucket), 0).sum(1)
        return Found(bucket, slot, is_held, score, row - 1)

    def add(self, seen: Distinct) -> None:
        """Add what a batch says of its ids: totals in `UNIT`s."""
        bucket, name = self._buckets(seen.values)
        floor = self.scores.index_select(0, bucket).amin(1)
        found = self.find(seen.values)
        is_hit = found.is_held & seen.is_valid
        gain = seen.totals.float() / UNIT
        hits = torch.where(is_hit, gain, 0.0)
        self.scores.index_put_((bucket, found.slot), hits, accumulate=True)  # what is no hit adds nothing
        is_new = seen.is_valid & ~found.is_held
        none = torch.full_like(bucket, self.ids.shape[0])
        self._admit(torch.where(is_new, bucket, none), name, gain, floor)

    def fault(self) -> str | None:
        """Return what does not hold of ids: each is of its block, in the bucket of its hash, and in it once."""
        if not bool(((self.ids >= 0) & (self.ids <= self._ids_per_block)).all()):
            return f"sketch.ids out of [0, {self._ids_per_block}]"
        bucket = torch.arange(len(self.ids), device=self.ids.device).unsqueeze(1) % self._num_buckets
        is_held, ids = self.ids > 0, self.ids.long()
        if bool((is_held & (hash_ids(ids - 1, self._num_buckets, self._salt) != bucket)).any()):
            return "sketch.ids in buckets of others"
        ordered = ids.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any()):
            return "one of sketch.ids twice"
        return None

    def change_rows(self, bucket: Tensor, slot: Tensor, change: Tensor) -> None:
        """Change the hot rows of slots by (L,) differences; slots that stay as they are may be named often, by 0."""
        self.rows.index_put_((bucket, slot), change.to(torch.int32), accumulate=True)

    def _admit(self, bucket: Tensor, name: Tensor, gain: Tensor, floor: Tensor) -> None:
        """Give newcomers slots where they score more than who holds them.

        Args:
            bucket: (L,) of each newcomer; the number of buckets for what is none.
            name: (L,) place in the block, plus 1.
            gain: (L,) float32 what the batch says of it.
            floor: (L,) float32 smallest score of its bucket before the batch, which it may have had and lost.
        """
        num_buckets, num_slots = self.ids.shape
        order, group, rank, key = ranked(bucket, gain)
        # groups of one bucket each, padded to L; what does not fit in goes to the one cell behind
        behind = len(order) * num_slots
        cell = torch.where((key < num_buckets) & (rank < num_slots), group * num_slots + rank, behind)
        ids = name.new_zeros(behind + 1).scatter_(0, cell, name.index_select(0, order))[:-1].view(-1, num_slots)
        scores = (floor + gain).index_select(0, order)
        scores = scores.new_full((behind + 1,), -1.0).scatter_(0, cell, scores)[:-1].view(-1, num_slots)
        target = torch.full_like(key, num_buckets).scatter_(0, group, key)
        # padding repeats the first group, so that equal writes meet
        source = torch.where(target < num_buckets, torch.arange(len(key), device=key.device), 0)
        target, ids, scores = (each.index_select(0, source) for each in (target, ids, scores))
        target = target.clamp(max=num_buckets - 1)
        scores = torch.where(ids > 0, scores, torch.full_like(scores, -1.0))
        held = [each.index_select(0, target) for each in (self.ids, self.scores, self.rows)]
        both = [torch.cat(pair, dim=1) for pair in zip(held, (ids, scores, torch.zeros_like(held[2])), strict=True)]
        # stable: of equal scores who holds the slot keeps it, then the first in the order of ids
        best = both[1].sort(dim=1, descending=True, stable=True).indices[:, :num_slots]
        # without newcomers some bucket, which hangs on what this rank holds, is written: as it is
        as_it_is = torch.arange(num_slots, device=best.device)
        best = torch.where((ids > 0).any(1, keepdim=True), best, as_it_is)
        for buffer, values in zip((self.ids, self.scores, self.rows), both, strict=True):
            buffer.index_copy_(0, target, values.gather(1, best))

    def _buckets(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buckets of places, (L,) int64, and their names there, (L,) in the dtype of `ids`."""
        places = places.long()
        in_block = places % self._ids_per_block
        block = torch.div(places, self._ids_per_block, rounding_mode="floor")
        bucket = block * self._num_buckets + hash_ids(in_block, self._num_buckets, self._salt)
        return bucket, (in_block + 1).to(self.ids.dtype)
