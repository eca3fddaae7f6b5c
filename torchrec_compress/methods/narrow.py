"""Narrow rows: few numbers per id, and one projection for all ids behind the pooling (factorised embeddings)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import (
    NO_PROJECTION,
    BagDecoder,
    MethodConfig,
    SharedDecoder,
    TableData,
    TableState,
    dense_bytes,
    init_like,
    register,
    shared_bytes,
)
from torchrec_compress.methods.dense import DenseConfig
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.start import SeededInit
from torchrec_compress.methods.storage import NativePart, Parts, Remap, TrainedPart, native_type
from torchrec_compress.methods.width import LANES, Directions, check_width, learn_directions, projection_length
from torchrec_compress.ops import TrainedOptimizer, encode_trained, stable_salt

_OPTIMIZERS = get_args(TrainedOptimizer)


@register
@dataclass(frozen=True, kw_only=True)
class NarrowConfig(MethodConfig):
    """Store `width` numbers per id and a projection to the embedding's width: row(i) = z_i P.

    Trained from the start: what one id teaches the projection serves all (MLET, arXiv 2309.15881; per table as in mixed
    dimension embeddings, arXiv 1909.11810). Rows are a stock TorchRec table with a fused optimizer, pooled and sent as
    `width` numbers; sums, means and weights commute with the projection, which comes after them and is trained by the
    dense optimizer.

    P starts with orthogonal rows of length sqrt(D / r) and z like rows of the user's table, so embeddings have the
    spread of that table, and a step of z moves them as far as it would move rows of full width with an optimizer that
    scales gradients to the learning rate (Adagrad, Adam): the rows' rate is that of a full table. With SGD a step is
    D / r times as long in the r directions that are left. `rate` makes P shorter and z longer, hence steps shorter.

    With 8 or 4 bits a number, rows are trained where they lie: decoded, pooled, updated and rounded again, up or down
    with the probability that makes the expected value right (2010.11305), by kernels of ours.

    Bytes: 4 N r + 4 r D, with few bits N (r bits / 8 + 1) + 4 r D. Held in training beside them: 4 N r by an
    element-wise Adagrad, 4 N by a row-wise one; with state_bits=8, N (r + 2) and N. Adam takes as much twice over, or
    once of each with a second moment a row.

    Args:
        width: numbers per id, r; a multiple of 4 below the embedding's width, with few bits also that width, of which
            there is no projection then.
        bits: of a number, 32 (float32 in a stock table, or what the table's data type says), 8 or 4.
        optimizer: of rows of few bits, "sgd", "adagrad", "rowwise_adagrad", "adam" or "partial_rowwise_adam"; None:
            the one that the user gives tables. The learning rate is the user's in any case, so it must be one of the
            same kind.
        state_bits: of a value of the optimizer's state beside rows of few bits, 32 or 8.
        rate: how far a step moves an embedding, by what it would move a row of full width; SGD's: the square of it.
            sqrt(r / D) is a P with orthonormal rows. Rows that are seen many times want less, see docs/small.md.
        shared: name of a projection that all tables of a collection that give it have together: stored once, trained
            by the sum of their gradients, from the start, since no fit of one table may change it. They agree in width,
            embedding_dim and rate. None: the table's own.

    Example:
        >>> NarrowConfig(width=16, bits=8, state_bits=8).to_dict()
        {'method': 'narrow', 'width': 16, 'bits': 8, 'optimizer': None, 'state_bits': 8, 'rate': 1.0, 'shared': None}
    """

    method: ClassVar[str] = "narrow"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its untrained row"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "sample"
    width: int
    bits: Literal[32, 8, 4] = 32
    optimizer: TrainedOptimizer | None = None
    state_bits: Literal[32, 8] = 32
    rate: float = 1.0
    shared: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for settings that do nothing beside the others."""
        super().__post_init__()
        for name, allowed in (("bits", (32, 8, 4)), ("state_bits", (32, 8)), ("optimizer", (None, *_OPTIMIZERS))):
            if getattr(self, name) not in allowed or isinstance(getattr(self, name), float):  # 8.0 == 8
                raise ValueError(f"narrow: {name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        if not 1e-3 <= self.rate <= 1e3:
            raise ValueError(f"narrow: rate must be in [0.001, 1000], got {self.rate!r}")
        idle = {"optimizer": self.optimizer is not None, "state_bits": self.state_bits != 32}
        if self.bits == 32 and any(idle.values()):
            name = next(name for name, given in idle.items() if given)
            raise ValueError(
                f"narrow: {name} must be left out with bits=32, whose rows are a stock table with the optimizer that "
                f"tables are given, got {getattr(self, name)!r}; set bits to 8 or 4"
            )
        if self.optimizer == "sgd" and self.state_bits != 32:
            raise ValueError(
                f"narrow: state_bits must be left out with optimizer='sgd', which keeps no state, got {self.state_bits}"
            )

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless the width is a multiple of 4 below the embedding's, and name the nearest one."""
        super().check(table)
        most = table.embedding_dim - (self.bits == 32)  # with few bits the whole width saves too
        if most < LANES:
            at_least = "above" if self.bits == 32 else "at least"
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be {at_least} {LANES} with narrow rows, got "
                f"{table.embedding_dim}; leave the table dense"
            )
        check_width(table, self.width, most, f"bits={self.bits}")
        for name, given in (("rate", self.rate != 1), ("shared", self.shared is not None)):
            if self.width == table.embedding_dim and given:
                raise ValueError(
                    f"table {table.name!r}: {name} must be left out with rows of the embedding's width, {self.width}, "
                    f"which have no projection, got {getattr(self, name)}"
                )

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError for a projection that is shared, too."""
        super().check_fit(table, data)
        if self.shared is not None:
            raise ValueError(
                f"table {table.name!r}: shared must be left out of a fit, which finds a projection for one table, got "
                f"{self.shared!r}; train from the start, or fit each table with its own"
            )

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: to a fit, which weighs rows by them."""
        return True

    @property
    def uses_curvature(self) -> bool:
        """Whether errors count as the loss feels them: where directions are left out, in their choice."""
        return True

    def fits_by_counts(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether look-ups change the fit: where directions are left out, in their choice."""
        return self.width < table.embedding_dim

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough to make up for the projection; a width too large is an error instead."""
        if self.width > table.embedding_dim or self.width % LANES or self.width < LANES:
            return True
        own = self.stored_bytes(table) - sum(shared_bytes(self, table).values())
        return own < dense_bytes(table) or self.width * self.bits == table.embedding_dim * 32

    def rank(self, table: BaseEmbeddingConfig) -> int:
        """Return the width."""
        return self.width

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same at any width."""
        return (replace(self, width=width) for width in range(LANES, table.embedding_dim + 1, LANES))

    def smaller(self, level: int) -> NarrowConfig | None:
        """Return the same at half the width, a quarter, and so on."""
        width = (self.width >> (level + 1)) // LANES * LANES
        return replace(self, width=width, shared=None) if width >= LANES else None

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the narrow rows."""
        start = partial(_init_rows, table, self.rate)
        if self.bits != 32:
            whole = SeededInit(stable_salt(seed, table.name), table.num_embeddings, self.width, start)
            return Parts(trained=TrainedPart(self.width, self.bits, whole, self.optimizer, self.state_bits))
        size = (table.num_embeddings, self.width)
        return Parts(bags=(NativePart("rows", *size, Remap(), start, data_type=native_type(table)),))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> Projection | None:
        """Return the projection; rows of the embedding's width need none."""
        if self.width == table.embedding_dim:
            return None
        return Projection(self.width, table.embedding_dim, device, self.rate)

    def shared_decoder(self, table: BaseEmbeddingConfig) -> SharedDecoder | None:
        """Return the projection by its name, where it is shared."""
        terms = {"width": self.width, "embedding_dim": table.embedding_dim, "rate": self.rate}
        return None if self.shared is None else SharedDecoder(self.shared, terms)

    def projected_width(self, table: BaseEmbeddingConfig) -> int | None:
        """Return the numbers of a row, where they are fewer than the embedding's."""
        return None if self.width == table.embedding_dim else self.width

    def unprojected(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return rows of the whole width of a narrower table: dense ones, or with few bits the same without a rate."""
        if self.bits == 32:
            return DenseConfig(), TableState(native={"": state.native["rows"]})
        return replace(self, rate=1.0, shared=None), TableState(trained=state.trained)

    def why_unfolded(self, table: BaseEmbeddingConfig, in_float32: bool) -> str | None:
        """Return that the decoder is nothing but the projection."""
        if self.projected_width(table) is None:
            return NO_PROJECTION
        return (
            f"its {self.width} numbers an id would become the {table.embedding_dim} of the whole table, which "
            "decompress() makes; fold_into_linear() leaves them as they are"
        )

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the projection."""
        return 0 if self.width == table.embedding_dim else 4 * self.width * table.embedding_dim

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> NarrowTable:
        """Find the directions that hold most of the rows, weighted by counts: their leading right singular vectors.

        They are stored as long as a projection starts, so that rows train on at the same rate.
        In a metric, of whitened rows: those of least error as the loss feels it.
        """
        self.check_fit(table, data)
        if self.width == table.embedding_dim:  # nothing to choose
            return NarrowTable(table, None, self.parts(table, data.seed).trained)
        directions = learn_directions(table, data, self.width, self.rate)
        return NarrowTable(table, directions, self.parts(table, data.seed).trained)


class NarrowTable(Learned):
    """Project rows to the directions that were learned.

    Args:
        table: the user's config.
        directions: that rows keep, or None: they are kept whole.
        trained: how rows of few bits are stored, or None for float32 ones.
    """

    def __init__(self, table: BaseEmbeddingConfig, directions: Directions | None, trained: TrainedPart | None) -> None:
        super().__init__(table)
        self._directions, self._trained = directions, trained
        self.kept_as = ("native" if trained is None else "trained", "rows")

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        narrow = rows if self._directions is None else self._directions.narrow(rows)
        if self._trained is None:
            return narrow
        return encode_trained(narrow, self._trained.format(), f"table {self._table.name!r}", ids)

    def _finish(self) -> TableState:
        """Return the projection."""
        return TableState(decoder={} if self._directions is None else {"projection": self._directions.projection})


@torch.no_grad()
def _init_rows(table: BaseEmbeddingConfig, rate: float, weight: Tensor) -> None:
    """Initialise narrow rows in place, so that projected ones have the spread of the user's table."""
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)
        weight /= rate


class Projection(BagDecoder):
    """Multiply pooled narrow rows by a matrix.

    Args:
        width: r.
        embedding_dim: D.
        device: of the parameter.
        rate: of `NarrowConfig`.

    Attributes:
        projection: parameter, (r, D) float32.
    """

    def __init__(self, width: int, embedding_dim: int, device: torch.device | None, rate: float) -> None:
        super().__init__()
        self._length = projection_length(width, embedding_dim, rate)
        self.projection = nn.Parameter(torch.empty(width, embedding_dim, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a matrix with orthogonal rows of one length."""
        if not self.projection.is_meta:
            nn.init.orthogonal_(self.projection, self._length)

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return embeddings, (B, D), of one (B, r)."""
        (pooled,) = bags
        return pooled @ self.projection
