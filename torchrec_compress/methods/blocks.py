"""Blocks by popularity: ids that are looked up often have wide rows, rare ones narrow rows (arXiv 2004.13139)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.lookups import is_hottest
from torchrec_compress.methods.base import (
    BagDecoder,
    MethodConfig,
    TableData,
    TableState,
    dense_bytes,
    init_like,
    register,
    spread,
)
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.methods.width import LANES, Directions, check_width, learn_directions, projection_length
from torchrec_compress.ops import coded_ids_bytes, coded_ids_shape, coded_rows, index_coded_ids

logger = logging.getLogger(__name__)


@register
@dataclass(frozen=True, kw_only=True)
class BlocksConfig(MethodConfig):
    """Store ids in blocks by popularity, each block in rows of its own width: row(i) = z_i P_b of the block of i.

    CpRec's adaptive input embeddings (arXiv 2004.13139, section 3.2; adaptive inputs of language models, 1809.10853),
    blocks within a table of mixed dimension embeddings (1909.11810). A block is a stock TorchRec table with the user's
    fused optimizer; its projection P_b comes after the pooling and is trained by the dense optimizer. Blocks as wide as
    the embedding have none. An id is looked up in its own block alone, so as many ids travel as of a full table; of the
    others nothing is sent, and bags of them are zeros. Rows and projections start as those of `NarrowConfig`.

    Bytes: 4 N_b r_b of every block b, 4 r_b D of its projection where r_b < D; with order="counts" another
    N B / 6.4 + 1 for B blocks, which say where an id has its row (1.25 bits an id and block, replicated).

    Args:
        shares: of the ids, that each block but the last holds, the most looked up first; the last has the rest.
        widths: numbers of a row of each block, not ascending, multiples of 4 of at most the embedding's width, the last
            one below it. None: the embedding's, and `ratio` times fewer in every further block, 4 at least.
        ratio: of the widths of one block and the next, where `widths` does not say them.
        order: what says how popular an id is. "counts": look-ups per id, as given to `compress` or `compress_into`
            (without rows, too: `compress_into(collection, {}, counts=...)` before a training from the start). Until
            then blocks are cut in the order of ids, which a log line says at the first look-up. "ids": ids are sorted
            already, 0 the most looked up; nothing is stored for it.

    Example:
        >>> BlocksConfig(shares=(0.1, 0.3)).to_dict()
        {'method': 'blocks', 'shares': (0.1, 0.3), 'widths': None, 'ratio': 2, 'order': 'counts'}
        >>> from torchrec import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=1000, embedding_dim=64)
        >>> BlocksConfig(shares=(0.1, 0.3), order="ids").sizes(table)
        [(100, 64), (300, 32), (600, 16)]
    """

    method: ClassVar[str] = "blocks"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its untrained row, of the last block"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "sample"
    shares: tuple[float, ...] = (0.1, 0.3)
    widths: tuple[int, ...] | None = None
    ratio: int = 2
    order: Literal["counts", "ids"] = "counts"

    def __post_init__(self) -> None:
        """Raise ValueError for shares and widths that no table can have."""
        super().__post_init__()
        if self.order not in ("counts", "ids"):
            raise ValueError(f"blocks: order must be 'counts' or 'ids', got {self.order!r}")
        if not self.shares or min(self.shares) <= 0 or sum(self.shares) >= 1:
            raise ValueError(
                f"blocks: shares must be above 0 and sum up to less than 1, one at least, got {self.shares}; the last "
                "block has the rest"
            )
        if self.ratio < 2:
            raise ValueError(f"blocks: ratio must be at least 2, got {self.ratio}")
        if self.widths is None:
            return
        if self.ratio != 2:
            raise ValueError(f"blocks: ratio must be left out with widths, got {self.ratio} and {self.widths}")
        if len(self.widths) != len(self.shares) + 1:
            raise ValueError(
                f"blocks: widths must be one more than shares, as the last block has the rest, got {self.widths} and "
                f"{self.shares}"
            )
        if any(wide < narrow for wide, narrow in pairwise(self.widths)):
            raise ValueError(f"blocks: widths must not ascend, since popular ids come first, got {self.widths}")

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless every block has rows, and widths that a table of TorchRec's can have."""
        super().check(table)
        if table.embedding_dim % LANES or table.embedding_dim <= LANES:
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be a multiple of {LANES} above {LANES} with blocks of "
                f"narrower rows, got {table.embedding_dim}; leave the table dense"
            )
        sizes = self.sizes(table)
        if min(rows for rows, _ in sizes) < 1:
            raise ValueError(
                f"table {table.name!r}: every block must have a row, got {[rows for rows, _ in sizes]} of "
                f"{table.num_embeddings} ids; change shares, or leave the table dense"
            )
        for _, width in sizes[:-1]:
            check_width(table, width, table.embedding_dim, "rows of a block")
        check_width(table, sizes[-1][1], table.embedding_dim - 1, "rows of the last block")

    def sizes(self, table: BaseEmbeddingConfig) -> list[tuple[int, int]]:
        """Return rows and width of every block."""
        ends = self._ends(table.num_embeddings)
        widths = self.widths
        if widths is None:
            rule = (table.embedding_dim // self.ratio**block // LANES * LANES for block in range(len(ends)))
            widths = tuple(max(LANES, width) for width in rule)
        return [(end - first, width) for first, end, width in zip([0, *ends], ends, widths, strict=False)]

    def _ends(self, num_ids: int) -> list[int]:
        """Return how many ids there are up to the end of every block, the most popular first."""
        ends, before = [], 0
        for share in self.shares:
            before += max(1, round(share * num_ids))
            ends.append(before)
        return [*ends, num_ids]

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: to which block an id is in, and to a fit, which weighs rows by them."""
        return True

    @property
    def uses_curvature(self) -> bool:
        """Whether errors count as the loss feels them: where directions are left out, in their choice."""
        return True

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether all blocks have rows, and save some; a width too large is an error instead."""
        if table.embedding_dim % LANES or any(width % LANES or width < LANES for _, width in self.sizes(table)):
            return True
        if min(rows for rows, _ in self.sizes(table)) < 1:
            return False
        return self.sizes(table)[-1][1] >= table.embedding_dim or self.stored_bytes(table) < dense_bytes(table)

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of ids in the first block, and shares of the others to scale."""
        most = int(table.num_embeddings * self.shares[0] / sum(self.shares))
        for number in spread(most):
            scale = number / (table.num_embeddings * self.shares[0])
            shares = tuple(share * scale for share in self.shares)
            if sum(shares) < 1:
                yield replace(self, shares=shares)

    def rank(self, table: BaseEmbeddingConfig) -> int:
        """Return how many directions all rows lie in, at most."""
        return min(table.embedding_dim, sum(width for _, width in self.sizes(table)))

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return a table of rows for every block."""
        found, first, sizes = [], 0, self.sizes(table)
        for block, (rows, width) in enumerate(sizes):
            remap = Remap("range", first, base=rows)
            if self.order == "counts":
                remap = Remap("ranked", block, base=len(sizes))
            start = partial(_init_rows, table)
            found.append(NativePart(f"block_{block}", rows, width, remap, start, data_type=native_type(table)))
            first += rows
        return Parts(bags=tuple(found))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> BlockSum:
        """Return the projections of all blocks, and where ids have their rows."""
        num_ids = table.num_embeddings
        ends = self._ends(num_ids) if self.order == "counts" else None
        return BlockSum([width for _, width in self.sizes(table)], table.embedding_dim, num_ids, ends, device)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of projections, and of what says where ids have their rows."""
        widths = [width for _, width in self.sizes(table)]
        projections = sum(4 * width * table.embedding_dim for width in widths if width < table.embedding_dim)
        if self.order == "ids":
            return projections
        return projections + len(widths) * coded_ids_bytes(table.num_embeddings) + 1

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where a fit would fail; ordered by counts, it needs them."""
        super().check_fit(table, data)
        if self.order == "counts" and data.counts is None:
            raise ValueError(
                f"table {table.name!r}: a fit of {self.method!r} with order='counts' must be given look-ups per id, "
                "got no counts; pass counts={table: (N,) look-ups}, or order='ids' where ids are sorted by them"
            )

    def start(self, table: BaseEmbeddingConfig, data: TableData) -> TableState | None:
        """Return the blocks of ids by their look-ups, where they are given."""
        if self.order != "counts" or data.counts is None:
            return None
        self.check_fit(table, data)
        return TableState(decoder=_given(_index(self._among(table, data.counts))))

    def _among(self, table: BaseEmbeddingConfig, counts: Tensor | None) -> list[Tensor]:
        """Return which ids each block holds, (N,) bool."""
        ends = self._ends(table.num_embeddings)
        if self.order == "ids":
            return _in_order(ends)
        assert counts is not None
        upto = [torch.zeros(table.num_embeddings, dtype=torch.bool), *(is_hottest(counts, end) for end in ends)]
        return [later & ~before for before, later in pairwise(upto)]

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> BlockTable:
        """Find the directions that hold most of the rows of every block, as `NarrowConfig` does of all."""
        self.check_fit(table, data)
        among = self._among(table, data.counts)
        directions = [
            None if width == table.embedding_dim else learn_directions(table, data, width, among=mine)
            for (_, width), mine in zip(self.sizes(table), among, strict=True)
        ]
        return BlockTable(table, [rows for rows, _ in self.sizes(table)], directions, among, self.order == "counts")


class BlockTable(Learned):
    """Project rows to the directions of their block.

    Args:
        table: the user's config.
        sizes: rows of every block.
        directions: that rows of a block keep, or None: they are kept whole.
        among: (N,) bool, the ids of every block.
        keeps_places: whether which ids these are is stored.
    """

    def __init__(
        self,
        table: BaseEmbeddingConfig,
        sizes: list[int],
        directions: list[Directions | None],
        among: list[Tensor],
        keeps_places: bool,
    ) -> None:
        super().__init__(table)
        self._directions, self._index, self._keeps_places = directions, _index(among), keeps_places
        widths = [table.embedding_dim if each is None else each.matrix.shape[0] for each in directions]
        self._rows = [torch.zeros(rows, width) for rows, width in zip(sizes, widths, strict=True)]

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        places = self._index.view(len(self._rows), -1, self._index.shape[1])
        for mine, directions, kept in zip(places, self._directions, self._rows, strict=True):
            numbers = coded_rows(mine, ids)
            found = rows[numbers > 0]
            kept[numbers[numbers > 0] - 1] = found if directions is None else directions.narrow(found)

    def _sums(self) -> list[Tensor]:
        """Return the rows of all blocks: each of one rank, zeros of the others."""
        return self._rows

    def _finish(self) -> TableState:
        """Return rows, projections and, where they are stored, places."""
        found = {f"projection_{block}": d.projection for block, d in enumerate(self._directions) if d is not None}
        if self._keeps_places:
            found |= _given(self._index)
        return TableState(decoder=found, native={f"block_{block}": rows for block, rows in enumerate(self._rows)})


@torch.no_grad()
def _init_rows(table: BaseEmbeddingConfig, weight: Tensor) -> None:
    """Initialise narrow rows in place, so that projected ones have the spread of the user's table."""
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)


def _in_order(ends: list[int]) -> list[Tensor]:
    """Return which ids each block holds, (N,) bool, where they are cut in the order of ids."""
    ids = torch.arange(ends[-1])
    return [(ids >= first) & (ids < end) for first, end in zip([0, *ends], ends, strict=False)]


def _index(among: list[Tensor]) -> Tensor:
    """Return where ids have their rows, (B N / 128, 20) uint8, as `Remap` reads it."""
    return torch.cat([index_coded_ids(mine) for mine in among])


def _given(index: Tensor) -> dict[str, Tensor]:
    """Return the buffers of `BlockSum` for blocks that look-ups said."""
    return {"places": index, "are_given": torch.ones(1, dtype=torch.uint8)}


class BlockSum(BagDecoder):
    """Project the bags of all blocks and add them.

    Args:
        widths: of the rows of every block.
        embedding_dim: D.
        num_ids: N.
        ends: ids up to the end of every block, where the table says which these are; None: their order does.
        device: of the parameters.

    Attributes:
        projection_0, projection_1, ...: parameters, (r_b, D) float32, of the blocks that have one.
        places: buffer, (B N / 128, 20) uint8, the ids of every block; absent where they are in order.
        are_given: buffer, (1,) uint8, 1 once look-ups have said which these are; absent as well.
    """

    def __init__(
        self, widths: list[int], embedding_dim: int, num_ids: int, ends: list[int] | None, device: torch.device | None
    ) -> None:
        super().__init__()
        self._ends, self._names = ends, []
        for block, width in enumerate(widths):
            self._names.append(None if width == embedding_dim else f"projection_{block}")
            if self._names[-1]:
                matrix = torch.empty(width, embedding_dim, dtype=torch.float32, device=device)
                self.register_parameter(self._names[-1], nn.Parameter(matrix))
        if ends is not None:
            blocks, row_bytes = coded_ids_shape(num_ids)
            places = torch.zeros(len(widths) * blocks, row_bytes, dtype=torch.uint8, device=device)
            self.register_buffer("places", places)
            self.register_buffer("are_given", torch.zeros(1, dtype=torch.uint8, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices as `NarrowConfig` does, and cut blocks in the order of ids."""
        for parameter in self.parameters():
            if not parameter.is_meta:
                nn.init.orthogonal_(parameter, projection_length(*parameter.shape))
        self._cut_in_order()

    def _cut_in_order(self) -> None:
        places, are_given = self._buffers.get("places"), self._buffers.get("are_given")
        if self._ends is not None and places is not None and are_given is not None and not places.is_meta:
            places.copy_(_index(_in_order(self._ends)))
            are_given.zero_()

    def make_ready(self, where: str) -> None:
        """Log where blocks are cut in the order of ids, though counts should say how.

        DistributedModelParallel takes buffers off the meta device as zeros: they are cut so then.
        """
        are_given = self._buffers.get("are_given")
        if are_given is not None and not are_given.is_meta and not bool(are_given):
            self._cut_in_order()
            logger.warning(
                "%s: its blocks are cut in the order of ids, as if 0 were the most looked up: fit it with counts, or "
                "before a training from the start call compress_into(collection, {}, counts=...)",
                where,
            )

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return embeddings, (B, D), of (B, r_b) of every block."""
        found = [
            bag if name is None else bag @ getattr(self, name) for bag, name in zip(bags, self._names, strict=True)
        ]
        return torch.stack(found).sum(0)
