"""CAFE: rows of their own for the ids that matter most now, shared rows for the rest (arXiv 2312.03256)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.managers import Blocks, HotCold, HotColdSizes
from torchrec_compress.methods.base import (
    NO_PROJECTION,
    MethodConfig,
    TableData,
    TableDecoder,
    TableState,
    init_like,
    register,
    spread,
)
from torchrec_compress.methods.buckets import BucketSums
from torchrec_compress.methods.learned import BLOCK_ROWS, Learned
from torchrec_compress.methods.storage import ManagedPart, NativePart, Parts, Remap
from torchrec_compress.methods.width import Directions, check_width, learn_directions, projection_length
from torchrec_compress.ops import Rows, gathered, pool_rows, stable_salt

_SLOTS_PER_HOT_ROW = 4  # the paper's


@register
@dataclass(frozen=True, kw_only=True)
class CafeConfig(MethodConfig):
    """Store `num_hot_rows` rows of one id each and `num_cold_rows` that ids share by hash; a sketch says who is hot.

    It is trained from the start, with a call of `torchrec_compress.after_step(model, step)` after every step of the
    optimizers, which promotes ids with all that their row has learned. Ids are dealt to `num_blocks` blocks, which are
    never cut over ranks; a block has an equal share of everything, so that all sizes are multiples of it.

    With a `width` rows of all kinds are of fewer numbers, pooled and sent as they are, and one projection follows the
    pooling, trained by the dense optimizer, as `NarrowConfig` has it. With importance="frequency", decay=1 and a
    threshold of k an id gets a row of its own at its k-th look-up, while there are free ones: admission.

    Bytes: 4 D (hot + cold + medium rows) + 4 hot rows + 12 slots of the sketch + 8 num_blocks, of which a trained
    table's look-ups read rows and 8 (with medium rows 12) bytes per slot. With a width r, r for D and 4 r D more.

    Args:
        num_hot_rows: rows of one id each, H.
        num_cold_rows: rows that the others share, C.
        num_medium_rows: rows of the two-level variant, which ids with a score of at least `medium_threshold` add to
            their cold row; 0: one level.
        num_blocks: a multiple of the number of ranks that share a table.
        num_sketch_slots: ids with a score; None: four for each hot row.
        slots_per_bucket: of the sketch; an id with more than one part in this many of what its bucket is given has a
            slot for certain.
        importance: what a look-up adds to the score of its id: "gradient", the norm of its gradient over the mean of
            its block, or "frequency", 1. Both work with any optimizer: gradients are seen before it steps.
        threshold: the least score of an id that gets a hot row.
        medium_threshold: the least score of an id that adds a medium row.
        decay: factor of all scores in a step.
        every: steps from one round of promotions to the next.
        width: numbers per row, r, a multiple of 4 below the embedding's width; None: that width, and no projection.
            Gradients are then seen, and scored, as far as rows of r numbers feel them.
        rate: of rows of a width, how far a step moves an embedding by what it would move a row of full width, as in
            `NarrowConfig`.

    Example:
        >>> CafeConfig(num_hot_rows=64, num_cold_rows=320).to_dict()["importance"]
        'gradient'
        >>> admission = CafeConfig(
        ...     num_hot_rows=512, num_cold_rows=320, importance="frequency", threshold=3, decay=1, width=8
        ... )
        >>> admission.threshold, admission.width
        (3.0, 8)
    """

    method: ClassVar[str] = "cafe"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the row of its bucket, until it matters enough for one of its own"
    num_hot_rows: int
    num_cold_rows: int
    num_medium_rows: int = 0
    num_blocks: int = 16
    num_sketch_slots: int | None = None
    slots_per_bucket: int = 4
    importance: Literal["gradient", "frequency"] = "gradient"
    threshold: float = 2.0
    medium_threshold: float = 1.0
    decay: float = 0.999
    every: int = 1
    width: int | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for a rate that no row has, or that does nothing."""
        super().__post_init__()
        if not 1e-3 <= self.rate <= 1e3:
            raise ValueError(f"cafe: rate must be in [0.001, 1000], got {self.rate!r}")
        if self.width is None and self.rate != 1:
            raise ValueError(
                f"cafe: rate must be left out without a width, as there is no projection then, got {self.rate!r}"
            )

    @property
    def learns_from(self) -> Literal["nothing", "sample", "all"]:  # type: ignore[override]
        """Which rows `learn` must have: a sample where directions are left out, to choose them."""
        return "nothing" if self.width is None else "sample"

    @property
    def uses_curvature(self) -> bool:
        """Whether errors count as the loss feels them: where directions are left out, in their choice."""
        return self.width is not None

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless every block gets as many rows and slots as any other, and rules are numbers."""
        super().check(table)
        if table.data_type != DataType.FP32:
            raise ValueError(
                f"table {table.name!r}: data_type must be FP32 with method {self.method!r}, whose manager moves and "
                f"scores float32 rows, got {table.data_type.value}"
            )
        where = f"table {table.name!r}"
        if self.width is not None:
            check_width(table, self.width, table.embedding_dim - 1, f"method {self.method!r}")
        if self.num_blocks < 1 or self.slots_per_bucket < 1 or self.every < 1:
            raise ValueError(
                f"{where}: num_blocks, slots_per_bucket and every must be at least 1, got {self.num_blocks}, "
                f"{self.slots_per_bucket} and {self.every}"
            )
        for name, size, least in (
            ("num_hot_rows", self.num_hot_rows, self.num_blocks),
            ("num_cold_rows", self.num_cold_rows, self.num_blocks),
            ("num_medium_rows", self.num_medium_rows, 0),
        ):
            _check_multiple(f"{where}: {name}", size, self.num_blocks, least)
        if self.num_sketch_slots is not None:
            multiple = self.num_blocks * self.slots_per_bucket
            _check_multiple(f"{where}: num_sketch_slots", self.num_sketch_slots, multiple, multiple)
        if self.importance not in ("gradient", "frequency"):
            raise ValueError(f"{where}: importance must be 'gradient' or 'frequency', got {self.importance!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"{where}: decay must be in (0, 1], got {self.decay}")
        for name, value in (("threshold", self.threshold), ("medium_threshold", self.medium_threshold)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{where}: {name} must be a finite score of at least 0, got {value}")

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of hot rows in a block, and as many cold and medium ones for each of them."""
        for number in spread(table.num_embeddings // self.num_blocks):
            scale = number * self.num_blocks / self.num_hot_rows
            cold, medium = (
                round(rows * scale / self.num_blocks) * self.num_blocks
                for rows in (self.num_cold_rows, self.num_medium_rows)
            )
            yield replace(
                self,
                num_hot_rows=number * self.num_blocks,
                num_cold_rows=max(self.num_blocks, cold),
                num_medium_rows=medium,
                num_sketch_slots=None,
            )

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the rows of all blocks and their manager."""
        blocks = Blocks(table.num_embeddings, self.num_blocks)
        sizes = self._sizes(stable_salt(seed, table.name))
        rows = NativePart(
            "rows",
            self.num_blocks * sizes.rows,
            self.rank(table),
            Remap(salt=sizes.salt),
            partial(_init_rows, table, sizes, self.rate),
        )
        return Parts(managed=ManagedPart(rows, blocks, partial(_manager, blocks, sizes)))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> ManagedRowsDecoder:
        """Return the pooling of rows, and with a width the projection behind it."""
        return ManagedRowsDecoder(self.width, table.embedding_dim, device, self.rate)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the projection."""
        return 0 if self.width is None else 4 * self.width * table.embedding_dim

    def rank(self, table: BaseEmbeddingConfig) -> int:
        """Return the numbers of a row: the width, or the embedding's."""
        return table.embedding_dim if self.width is None else self.width

    def projected_width(self, table: BaseEmbeddingConfig) -> int | None:
        """Return the width, if there is one."""
        return self.width

    def unprojected(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return the same rows, and their manager, as those of a table of `width` numbers."""
        return replace(self, width=None, rate=1.0), TableState(native=state.native, managed=state.managed)

    def why_unfolded(self, table: BaseEmbeddingConfig, in_float32: bool) -> str | None:
        """Return that rows would be as wide as without a projection."""
        if self.width is None:
            return NO_PROJECTION
        return (
            f"its rows of {self.width} numbers would become ones of {table.embedding_dim}; fold_into_linear() leaves "
            "them as they are"
        )

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where a fit would fail; it needs counts to know which ids are hot."""
        super().check_fit(table, data)
        if data.counts is None:
            raise ValueError(
                f"table {table.name!r}: a fit of {self.method!r} must be given look-ups per id, got no counts; pass "
                "counts={table: (N,) look-ups}, or train the collection from the start"
            )

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> ManagedTable:
        """Give hot rows to the ids with the most look-ups; with a width, find the directions that rows keep.

        These are those of `NarrowConfig`: of least error over all ids, as look-ups and a curvature weigh it.
        """
        self.check_fit(table, data)
        assert data.counts is not None
        counts, part = data.counts, self.parts(table, data.seed).managed
        assert part is not None
        directions = None if self.width is None else learn_directions(table, data, self.width, self.rate)
        sizes = self._sizes(stable_salt(data.seed, table.name))
        manager = _manager(part.blocks, sizes, self.num_blocks, None)
        placed = counts.new_zeros(part.blocks.num_places)
        for first in range(0, len(counts), BLOCK_ROWS):
            mine = counts[first : first + BLOCK_ROWS]
            placed[part.blocks.places(torch.arange(first, first + len(mine)))] = mine
        manager.fill(placed)
        return ManagedTable(table, part, sizes, manager, counts, directions)

    def _sizes(self, salt: int) -> HotColdSizes:
        """Return the share of a block."""
        slots = self.num_sketch_slots
        if slots is None:
            slots = self.num_blocks * _round_up(
                _SLOTS_PER_HOT_ROW * self.num_hot_rows // self.num_blocks, self.slots_per_bucket
            )
        return HotColdSizes(
            hot_rows=self.num_hot_rows // self.num_blocks,
            cold_rows=self.num_cold_rows // self.num_blocks,
            medium_rows=self.num_medium_rows // self.num_blocks,
            buckets=slots // (self.num_blocks * self.slots_per_bucket),
            slots=self.slots_per_bucket,
            importance=self.importance,
            threshold=self.threshold,
            medium_threshold=self.medium_threshold,
            decay=self.decay,
            every=self.every,
            salt=salt,
        )


class ManagedTable(Learned):
    """Keep the rows of hot ids, and fill the cold ones with the mean of their ids.

    Args:
        table: the user's config.
        part: blocks and rows.
        sizes: of a block.
        manager: of all blocks, which knows who is hot.
        counts: (N,) look-ups per id.
        directions: that rows keep, or None: they are kept whole.
    """

    def __init__(
        self,
        table: BaseEmbeddingConfig,
        part: ManagedPart,
        sizes: HotColdSizes,
        manager: HotCold,
        counts: Tensor,
        directions: Directions | None,
    ) -> None:
        super().__init__(table)
        self._blocks, self._sizes, self._manager, self._counts = part.blocks, sizes, manager, counts
        self._directions = directions
        self._cold = BucketSums(part.rows.num_embeddings, part.rows.embedding_dim)
        self._hot = torch.zeros(part.rows.num_embeddings, part.rows.embedding_dim)

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        rows = rows if self._directions is None else self._directions.narrow(rows)
        found = self._manager.remap(self._blocks.places(ids), train=False)[:, 0]
        is_hot = found % self._sizes.rows < self._sizes.hot_rows
        self._cold.add(rows[~is_hot], found[~is_hot], self._counts[ids[~is_hot]])
        self._hot[found[is_hot]] = rows[is_hot]

    def _sums(self) -> list[Tensor]:
        """Return the sums of cold rows, and hot ones: each of one rank, zeros of the others."""
        return [*self._cold.sums(), self._hot]

    def _finish(self) -> TableState:
        """Return the rows, the manager's buffers and the projection."""
        weight = self._cold.means() + self._hot  # of which a row has one
        decoder = {} if self._directions is None else {"projection": self._directions.projection}
        return TableState(decoder=decoder, native={"rows": weight}, managed=dict(self._manager.named_buffers()))


def _check_multiple(where: str, size: int, multiple: int, least: int) -> None:
    if size < least or size % multiple:
        nearest = max(least, multiple * round(size / multiple))
        raise ValueError(f"{where} must be a multiple of {multiple} and at least {least}, got {size}; take {nearest}")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _manager(blocks: Blocks, sizes: HotColdSizes, num_blocks: int, device: torch.device | None) -> HotCold:
    return HotCold(num_blocks, blocks.ids_per_block, sizes, device)


@torch.no_grad()
def _init_rows(table: BaseEmbeddingConfig, sizes: HotColdSizes, rate: float, weight: Tensor) -> None:
    """Initialise the rows of whole blocks in place: as the user's table, and medium rows as zeros.

    So an id that comes to add its medium row, which none has trained yet, is served what it was. Projected rows have
    the spread of the user's table too, whatever the rate makes the projection.
    """
    if not weight.numel():  # of a rank that holds none, without a shape
        return
    init_like(table, weight)
    weight /= rate
    weight.view(-1, sizes.rows, weight.shape[1])[:, sizes.hot_rows + sizes.cold_rows :].zero_()


class ManagedRowsDecoder(TableDecoder):
    """Pool rows, and multiply bags by the projection, where there is one.

    Args:
        width: r, or None: rows are embeddings already.
        embedding_dim: D.
        device: of the parameter.
        rate: of `CafeConfig`.

    Attributes:
        projection: parameter, (r, D) float32; None without a width.
    """

    def __init__(self, width: int | None, embedding_dim: int, device: torch.device | None, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.projection: Tensor | None = None
        if width is not None:
            self.projection = nn.Parameter(torch.empty(width, embedding_dim, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a projection with orthogonal rows of one length, that of `NarrowConfig`."""
        if self.projection is not None and not self.projection.is_meta:
            width, embedding_dim = self.projection.shape
            nn.init.orthogonal_(self.projection, projection_length(width, embedding_dim, self._rate))

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags, (B, D); `rows` are one (L, r), or (L, D)."""
        pooled = pool_managed(offsets, weights, rows)
        return pooled if self.projection is None else pooled.to(self.projection.dtype) @ self.projection


@torch.fx.wrap
def pool_managed(offsets: Tensor | None, weights: Tensor | None, rows: list[Rows]) -> Tensor:
    """Return the sums over bags, (B, width of the rows); arguments as in `TableDecoder.forward`."""
    (found,) = gathered(rows)
    return pool_rows(found, offsets, weights)
