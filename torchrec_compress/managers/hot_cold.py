"""CAFE: rows of their own for the ids that matter most now, shared rows for the rest (arXiv 2312.03256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchrec_compress.managers.manager import Blocks, OwnedTable, RowManager, move_rows
from torchrec_compress.managers.segments import Distinct, distinct, ranked
from torchrec_compress.managers.sketch import UNIT, Found, Sketch
from torchrec_compress.ops import hash_ids

# a hot id gives its row up to one that scores this much more, so that equals do not take turns
_MARGIN = 1.1
_MOST_UNITS = 2.0**40  # of one look-up: a gradient a million times the mean


@dataclass(frozen=True)
class HotColdSizes:
    """Rows, buckets and rules of one block.

    Args:
        hot_rows: each of one id.
        cold_rows: shared by hash.
        medium_rows: shared by another hash, which ids of the middle add to their cold row; 0: none do.
        buckets, slots: of the sketch, and of each bucket.
        importance: of a look-up: the norm of its gradient over the running mean of its block, or 1.
        threshold: the least score of an id that gets a hot row.
        medium_threshold: the least score of an id that adds a medium row.
        decay: factor of all scores in a step.
        every: steps from one round of promotions to the next.
        salt: of the hashes.
    """

    hot_rows: int
    cold_rows: int
    medium_rows: int
    buckets: int
    slots: int
    importance: Literal["gradient", "frequency"]
    threshold: float
    medium_threshold: float
    decay: float
    every: int
    salt: int

    @property
    def rows(self) -> int:
        """Rows of a block: hot, cold, medium, in this order."""
        return self.hot_rows + self.cold_rows + self.medium_rows


class HotCold(RowManager):
    """Give hot rows to the ids with the highest scores of a sketch, and move what was learned along.

    Where the paper normalises gradients over a batch, here it is over the running mean of a block: no rank waits for
    another. An id that is promoted starts from what it was served until then, weight and optimizer state. A hot row
    stays with its id until an id of its block scores a tenth more, or the id has lost its slot in the sketch.

    Args:
        num_blocks: that are held here.
        ids_per_block: places of a block.
        sizes: of a block.
        device: of the buffers.

    Attributes:
        sketch: scores, and the hot rows of ids.
        hot_ids: buffer, (hot rows, 1) integer: place in its block of the id that a row was given to, plus 1.
        norms: buffer, (blocks, 2) float32: decayed sum of gradient norms, and of their number.
    """

    training_only = ("sketch.scores", "hot_ids", "norms")
    hot_ids: Tensor
    norms: Tensor

    def __init__(
        self, num_blocks: int, ids_per_block: int, sizes: HotColdSizes, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.reads = 2 if sizes.medium_rows else 1
        if sizes.medium_rows:  # look-ups read scores too
            self.training_only = ("hot_ids", "norms")
        self._sizes, self._num_blocks, self._ids_per_block = sizes, num_blocks, ids_per_block
        self.sketch = Sketch(num_blocks, ids_per_block, sizes.buckets, sizes.slots, sizes.salt, device)
        shape = (num_blocks * sizes.hot_rows, 1)
        self.register_buffer("hot_ids", torch.zeros(shape, dtype=self.sketch.ids.dtype, device=device))
        if sizes.importance == "gradient":
            self.register_buffer("norms", torch.zeros(num_blocks, 2, dtype=torch.float32, device=device))
        self._noted: list[tuple[Tensor, Tensor | None]] = []

    @property
    def layout(self) -> tuple[int, ...]:
        """Hot, cold and medium rows, buckets and slots of a block, and reads of an id."""
        sizes = self._sizes
        return sizes.hot_rows, sizes.cold_rows, sizes.medium_rows, sizes.buckets, sizes.slots, self.reads

    def remap(self, places: Tensor, *, train: bool) -> Tensor:
        """Return the hot row of an id, or its cold row and, with medium rows, its medium row or -1."""
        found, first = self.sketch.find(places), self._first_row(places)
        hot = first + found.row
        cold = self._cold_row(places)
        rows = torch.where(found.row >= 0, hot, cold)
        if not self._sizes.medium_rows:
            return rows.unsqueeze(1)
        offset = self._sizes.hot_rows + self._sizes.cold_rows
        medium = first + offset + hash_ids(self._in_block(places), self._sizes.medium_rows, self._sizes.salt + 2)
        is_medium = (found.row < 0) & found.is_held & (found.score >= self._sizes.medium_threshold)
        return torch.stack([rows, torch.where(is_medium, medium, -1)], dim=1)

    def profile(self, places: Tensor, gradients: Tensor) -> None:
        """Note the ids of a look-up and, where they count, the norms of its gradients; not finite ones as zeros."""
        norms = None
        if self._sizes.importance == "gradient":
            norms = torch.linalg.vector_norm(gradients.float(), dim=1).nan_to_num(0.0, 0.0, 0.0)
        self._noted.append((places.long(), norms))

    def fault(self) -> str | None:
        """Return what does not hold of hot ids and the sketch; a row of the sketch is that of the hot id there."""
        fault = self.sketch.fault()
        if fault is not None:
            return fault
        if not bool(((self.hot_ids >= 0) & (self.hot_ids <= self._ids_per_block)).all()):
            return f"hot_ids out of [0, {self._ids_per_block}]"
        rows, sizes = self.sketch.rows, self._sizes
        if not bool(((rows >= 0) & (rows <= sizes.hot_rows)).all()):
            return f"sketch.rows out of [0, {sizes.hot_rows}]"
        block = torch.arange(len(rows), device=rows.device).unsqueeze(1) // sizes.buckets
        owner = self.hot_ids[:, 0][(block * sizes.hot_rows + rows - 1).clamp(min=0)] if rows.numel() else rows
        if bool(((rows > 0) & ((owner != self.sketch.ids) | (owner == 0))).any()):
            return "sketch.rows that are not those of hot_ids"
        return None

    def discard(self) -> None:
        """Forget the look-ups since the last step."""
        self._noted = []

    def after_step(self, table: OwnedTable, step: int) -> None:
        """Score the ids of the step and, every so many steps, promote those that now score enough."""
        noted, self._noted = self._noted, []
        if self._sizes.decay < 1:  # of blocks without a look-up too, whichever rank they are on
            self.sketch.scores.mul_(self._sizes.decay)
            if self._sizes.importance == "gradient":
                self.norms.mul_(self._sizes.decay)
        if not sum(len(places) for places, _ in noted):
            return
        places = torch.cat([places for places, _ in noted])
        seen = distinct(places, self._amounts(places, [norms for _, norms in noted if norms is not None]))
        self.sketch.add(seen)
        if (step + 1) % self._sizes.every == 0:
            self._promote(seen, table)

    def fill(self, counts: Tensor) -> None:
        """Take scores from look-ups, and give hot rows to those that score most, without moving any.

        Args:
            counts: (places here,) integer or floating point, finite and >= 0; of a table that holds them as `remap`
                then says.
        """
        # whole blocks, which do not matter to each other, in a few steps: much is made for each place
        blocks = Blocks(len(counts), self._num_blocks)
        for step, mine in enumerate(counts.split(blocks.places_at_once)):
            # the largest first: what float32 scores round to the same stays in the order of the counts
            exact, places = mine.double().sort(descending=True, stable=True)
            places += step * blocks.places_at_once
            seen = Distinct(places, exact * UNIT, torch.ones_like(places, dtype=torch.bool))
            self.sketch.add(seen)
            self._promote(seen, None)

    def _amounts(self, places: Tensor, norms: list[Tensor]) -> Tensor:
        """Return the importance of look-ups, (L,) int64 in `UNIT`s, the same in any order of look-ups."""
        if self._sizes.importance == "frequency":
            return torch.full_like(places, UNIT)
        found = torch.cat(norms)
        block = torch.div(places, self._ids_per_block, rounding_mode="floor")
        # integers of the size of the block's largest add up to the same in any order
        largest = found.new_zeros(self._num_blocks).scatter_reduce_(0, block, found, "amax")
        power = torch.frexp(largest).exponent
        whole = torch.ldexp(found.double(), 30 - power.index_select(0, block)).round().long()
        sums = torch.zeros_like(largest, dtype=torch.int64).index_add_(0, block, whole)
        number = torch.zeros_like(sums).index_add_(0, block, torch.ones_like(block))
        batch = torch.stack([torch.ldexp(sums.double(), power - 30), number.double()], dim=1)
        self.norms.add_(batch.float())
        mean = self.norms[:, 0] / self.norms[:, 1].clamp(min=1e-30)
        relative = found / mean.index_select(0, block).clamp(min=1e-30)
        return (relative.double() * UNIT).clamp(max=_MOST_UNITS).round().long()

    def _promote(self, seen: Distinct, table: OwnedTable | None) -> None:
        """Give hot rows to ids of a batch: rows that are free, then of those who score least."""
        sizes, places = self._sizes, seen.values
        found, block = self.sketch.find(places), torch.div(places, self._ids_per_block, rounding_mode="floor")
        holder, score = self._holders()
        wants = seen.is_valid & found.is_held & (found.row < 0) & (found.score >= sizes.threshold)
        order, _, rank, _ = ranked(torch.where(wants, block, self._num_blocks), found.score)
        # the r-th best of a block asks for the row of its r-th worst holder
        worst = score.view(-1, sizes.hot_rows).sort(dim=1, stable=True).indices
        row = worst[block.index_select(0, order), rank.clamp(max=sizes.hot_rows - 1)]
        hot = block.index_select(0, order) * sizes.hot_rows + row
        asked, score_here = score.index_select(0, hot), found.score.index_select(0, order)
        takes = wants.index_select(0, order) & (rank < sizes.hot_rows) & (score_here > asked * _MARGIN)
        mine = places.index_select(0, order)
        if table is not None:
            cold = self._cold_row(mine)  # no row of a hot id: who takes nothing copies it onto itself
            source = self.remap(mine, train=False)
            kept = torch.full_like(source, -1)
            kept[:, 0] = cold
            source = torch.where(takes.unsqueeze(1), source, kept)
            move_rows(table, "rows", source, torch.where(takes, self._first_row(mine) + row, cold))
        loser = Found(*(each.index_select(0, hot) for each in holder))
        self.sketch.change_rows(loser.bucket, loser.slot, torch.where(takes & loser.is_held, -1 - row, 0))
        taker = Found(*(each.index_select(0, order) for each in found))
        self.sketch.change_rows(taker.bucket, taker.slot, torch.where(takes, 1 + row, 0))
        ids = self.hot_ids[:, 0]
        change = self._in_block(mine) + 1 - ids.index_select(0, hot)
        ids.index_add_(0, hot, torch.where(takes, change, 0).to(ids.dtype))

    def _holders(self) -> tuple[Found, Tensor]:
        """Return where the holder of every hot row is in the sketch, and its score: -1 where the row is free."""
        row = torch.arange(len(self.hot_ids), device=self.hot_ids.device)
        block = torch.div(row, self._sizes.hot_rows, rounding_mode="floor")
        place = (self.hot_ids[:, 0].long() - 1).clamp(min=0) + block * self._ids_per_block
        found = self.sketch.find(place)
        is_held = found.is_held & (found.row == row % self._sizes.hot_rows)
        return found._replace(is_held=is_held), torch.where(is_held, found.score, -1.0)

    def _in_block(self, places: Tensor) -> Tensor:
        return places.long() % self._ids_per_block

    def _first_row(self, places: Tensor) -> Tensor:
        return torch.div(places.long(), self._ids_per_block, rounding_mode="floor") * self._sizes.rows

    def _cold_row(self, places: Tensor) -> Tensor:
        shared = hash_ids(self._in_block(places), self._sizes.cold_rows, self._sizes.salt + 1)
        return self._first_row(places) + self._sizes.hot_rows + shared
