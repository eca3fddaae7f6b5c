"""What a fit reads and what it leaves: `learn` what all rows share, then `encode` them block by block."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.fit.contexts import Contexts
from torchrec_compress.fit.kmeans import sample_points
from torchrec_compress.methods.storage import NativePart
from torchrec_compress.ops import first_infinite, first_not_finite

# Rows that are encoded at once. A multiple of every block that rows are compared with codewords in.
BLOCK_ROWS = 65536
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e15

# rows of a table by ids, (L,) int64: (L, D) floating point, made for the call, of a table that never lies there whole
RowReader: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TableData:
    """What a method may learn from when it is fitted to a table.

    Args:
        rows: (N, D) float32 pre-trained table, or (S, D) of a sample of its ids, or None.
        counts: (N,) how often each id was looked up in training, or None.
        contexts: ((P,), (P,)) int64: pairs (id, context id) seen together, or a sketch of them, or None.
        seed: of everything random.
        progress: whether to show a progress bar.
        ids: (S,) int64 distinct ids of the rows, ascending; None: they are all rows.
        weights: (S,) float32 >= 0, what each row of a sample stands for (`fit.kmeans.sample_points` draws both); None:
            as much as its own id.
        curvature: (D, D) float64 of the loss in a row, the metric that errors are counted in; None: squared error.
    """

    rows: Tensor | None
    counts: Tensor | None = None
    contexts: Contexts | None = None
    seed: int = 0
    progress: bool = False
    ids: Tensor | None = None
    weights: Tensor | None = None
    curvature: Tensor | None = None

    def trained_rows(self, table: BaseEmbeddingConfig) -> Tensor:
        """Return the pre-trained rows.

        Raises:
            ValueError: there are none, their shape or dtype is not the table's, or one is not finite.
        """
        if self.rows is None:
            raise _without_rows(table)
        check_trained_rows(table, self.rows, self.ids)
        return self.rows.detach().float()

    def all_rows(self, table: BaseEmbeddingConfig) -> Tensor:
        """Return the pre-trained rows, (N, D) float32, or raise ValueError as `trained_rows` and for a sample."""
        if self.ids is not None:
            raise ValueError(
                f"table {table.name!r}: this method must learn from all {table.num_embeddings} rows, got a sample of "
                f"{len(self.ids)}"
            )
        return self.trained_rows(table)

    def row_ids(self, table: BaseEmbeddingConfig) -> Tensor:
        """Return the ids of the rows, (N,) or (S,) int64."""
        return torch.arange(table.num_embeddings) if self.ids is None else self.ids

    def row_weights(self, weights: Tensor) -> Tensor:
        """Return what each row weighs in the learning, (N,) or (S,), given the weight of each id, (N,) float32.

        An id that weighs nothing weighs nothing in a sample either.
        """
        if self.ids is None:
            return weights
        mine = weights[self.ids]
        return mine if self.weights is None else torch.where(mine > 0, self.weights.detach().to(mine.dtype), 0.0)


def with_sample(data: TableData, weights: Tensor, num_rows: int, read: RowReader) -> TableData:
    """Return the data of a fit with a weighted sample of the rows, or with all of them where they are no more.

    Args:
        data: without rows.
        weights: (N,) float32 >= 0, of every id in what is learned.
        num_rows: of the sample, S.
        read: the rows, read in blocks.
    """
    ids, mine = None, None
    if len(weights) > num_rows:
        ids, mine = sample_points(weights, num_rows, torch.Generator().manual_seed(data.seed))
    wanted = torch.arange(len(weights)) if ids is None else ids
    rows = torch.cat([_floats(read(block)) for block in wanted.split(BLOCK_ROWS)])
    return dataclasses.replace(data, rows=rows, ids=ids, weights=mine)


def _floats(block: object) -> Tensor:
    if not isinstance(block, Tensor):
        raise ValueError(f"rows: a function of ids must return a tensor, (L, D), got {type(block).__name__}")
    return block.detach().float()


def check_sample(table: BaseEmbeddingConfig, data: TableData) -> None:
    """Raise ValueError unless ids and weights of a sample are what `TableData` says."""
    where = f"table {table.name!r}"
    ids, weights = data.ids, data.weights
    if ids is None:
        if weights is not None:
            raise ValueError(f"{where}: weights must come with the ids of a sample, got none")
        return
    check_block_ids(where, ids, table.num_embeddings)
    if not len(ids) or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError(f"{where}: ids of a sample must ascend, one at least")
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.layout != torch.strided or weights.dtype not in _FLOATS:
        got = f"{weights.dtype} ({weights.layout})" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{where}: weights of a sample must be a tensor of floating-point numbers, got {got}")
    if weights.shape != ids.shape or weights.is_meta or not bool(((weights >= 0) & (weights <= 2**53)).all()):
        raise ValueError(f"{where}: weights of a sample must be {len(ids)} numbers in [0, 2**53], one for each id")
    if not bool((weights > 0).any()):
        raise ValueError(f"{where}: at least one weight of a sample must be above 0, got all zeros")


def check_block_ids(where: str, ids: object, num_rows: int) -> None:
    """Raise ValueError unless ids are a vector of int64 in [0, N), in the host's memory."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1 or ids.layout != torch.strided:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{where}: ids must be a vector of int64, got {got}")
    if ids.device.type != "cpu":
        raise ValueError(f"{where}: ids must be on the cpu, where tables are fitted, got {ids.device}")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_rows):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"{where}: ids must be in [0, {num_rows}), got {wrong}")


def check_trained_rows(table: BaseEmbeddingConfig, rows: Tensor, ids: Tensor | None = None) -> None:
    """Raise ValueError unless these are finite floating-point rows of the table, (N, D), or (L, D) of `ids`."""
    where = f"table {table.name!r}"
    if not isinstance(rows, Tensor) or rows.is_meta or rows.layout != torch.strided or rows.dtype not in _FLOATS:
        got = f"{rows.dtype} on {rows.device} ({rows.layout})" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{where}: pre-trained rows must be a tensor of floating-point values, got {got}")
    rows = rows.detach()
    num_rows = table.num_embeddings if ids is None else len(ids)
    if rows.shape != (num_rows, table.embedding_dim):
        raise ValueError(
            f"{where}: the pre-trained table must be {num_rows} x {table.embedding_dim}, got {tuple(rows.shape)}"
        )
    if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
        first = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        found = first if ids is None else int(ids[first])
        raise ValueError(f"{where}: pre-trained rows must be finite, got NaN or infinity in the row of id {found}")
    low, high = (float(value) for value in torch.aminmax(rows)) if rows.numel() else (0.0, 0.0)
    if max(-low, high) > _LARGEST:
        raise ValueError(
            f"{where}: pre-trained rows must be at most {_LARGEST:.0e}, whose squares float32 still adds up, got "
            f"{max(-low, high):.3g}"
        )


def _without_rows(table: BaseEmbeddingConfig) -> ValueError:
    return ValueError(f"table {table.name!r}: this method must be fitted to a pre-trained table, got none")


@dataclass(frozen=True)
class TableState:
    """The stored tensors of one fitted table.

    Args:
        codes: (rows, row_size) integer, or None.
        decoder: parameters and buffers of the decoder by name.
        native: weights of native parts by part name ("" is the dense table).
        managed: buffers of the manager by name.
        trained: the rows of a trained part, (N, bytes per row) uint8, by the name "rows".
    """

    codes: Tensor | None = None
    decoder: dict[str, Tensor] = field(default_factory=dict)
    native: dict[str, Tensor] = field(default_factory=dict)
    managed: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)


class Learned(ABC):
    """A table that has learned what its rows share and encodes them, block by block.

    Every id is encoded once, in blocks of any size, one after another; then `finish` returns what is stored beside the
    codes. Nothing of the size of the table is held but what is stored for it.

    Args:
        table: the user's config.

    On many ranks each may encode ids of its own: then all of them call `add_up` before `finish`.

    Attributes:
        needs_rows: whether blocks have rows; else codes are made of ids alone.
        kept_as: where the rows that `encode` returns belong in a `TableState`: its field, and the name there.
        kept_in_float32: names of native parts that are float32 whatever the table's data type, such as scalars of ids.
    """

    needs_rows = True
    kept_in_float32: tuple[str, ...] = ()
    kept_as: tuple[Literal["codes", "native", "trained"], str] = ("codes", "")

    def __init__(self, table: BaseEmbeddingConfig) -> None:
        self._table = table
        self._is_encoded = torch.zeros(table.num_embeddings, dtype=torch.bool)
        self._is_finished = False

    @property
    def num_rows(self) -> int:
        """Rows of what is kept of the table by id, its code table as a rule."""
        return self._table.num_embeddings

    def row_numbers(self, ids: Tensor) -> Tensor:
        """Return which of these rows ids have, (L,) int64 -> (L,) int64; several may share one."""
        return ids

    def encode(self, ids: Tensor, rows: Tensor | None) -> Tensor | None:
        """Return what is kept of ids, or None where nothing is kept by id.

        Args:
            ids: (L,) int64 distinct ids.
            rows: (L, D) floating-point pre-trained rows of these ids, or None.

        Returns:
            (L, row_size) in the dtype that is stored.

        Raises:
            ValueError: there are no rows, or one is not finite; ids are out of range, repeated or encoded before.
        """
        self._check_new(ids)
        if self.needs_rows:
            if rows is None:
                raise _without_rows(self._table)
            check_trained_rows(self._table, rows, ids)
            rows = rows.detach().float()
        self._is_encoded[ids] = True
        kept = self._encode(ids, rows)
        if kept is not None and self.kept_as[0] == "native":
            self._check_range(self.kept_as[1], kept, lambda row: f"in the row of id {int(ids[row])}")
        return kept

    def _check_range(self, name: str, values: Tensor, where: Callable[[int], str]) -> None:
        """Raise ValueError where a part of FP16 would hold an infinity."""
        is_half = self._table.data_type == DataType.FP16 and name not in self.kept_in_float32
        found = first_infinite(values, torch.float16) if is_half else None
        if found is not None:
            raise ValueError(
                f"table {self._table.name!r}: pre-trained values must be in +-{torch.finfo(torch.float16).max:.0f} for "
                f"data_type FP16, got {found[1]:g} {where(found[0])}; use FP32, or scale the table"
            )

    def _check_new(self, ids: Tensor) -> None:
        """Raise ValueError unless these are ids of the table of which none was encoded yet."""
        where = f"table {self._table.name!r}"
        check_block_ids(where, ids, self._table.num_embeddings)
        if self._is_finished:
            raise ValueError(f"{where}: rows must be encoded before finish(); learn() again")
        ordered = ids.sort().values
        twice = self._is_encoded[ordered]
        twice[1:] |= ordered[1:] == ordered[:-1]
        if bool(twice.any()):
            raise ValueError(f"{where}: each id must be encoded once, got {int(ordered[twice][0])} twice")

    @abstractmethod
    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor | None:
        """Encode a block; arguments and result as in `encode`, rows checked and float32."""

    def finish(self) -> TableState:
        """Return what is stored beside the rows that `encode` returned.

        Raises:
            ValueError: not every id was encoded once, or a learned value is not finite, or not in FP16.
        """
        if not bool(self._is_encoded.all()):
            missing = int((~self._is_encoded).sum())
            raise ValueError(
                f"table {self._table.name!r}: each of {self._table.num_embeddings} ids must be encoded once before "
                f"finish(), got all but {missing}"
            )
        self._is_finished = True
        state = self._finish()
        for name, values in {**state.decoder, **state.native}.items():
            row = first_not_finite(values) if values.is_floating_point() else None
            if row is not None:
                raise ValueError(
                    f"table {self._table.name!r}: what was learned must be finite, got NaN or infinity in row {row} of "
                    f"{name!r}; lower the learning rates of the fit, or scale the table"
                )
        for name, values in state.native.items():
            self._check_range(name, values, lambda row, name=name: f"in row {row} of {name!r}")
        return state

    @abstractmethod
    def _finish(self) -> TableState:
        """Return what is stored beside the codes."""

    def add_up(self, add: Callable[[Tensor], None]) -> None:
        """Take what other ranks have summed up over the ids that they encoded.

        Args:
            add: makes a tensor, in place, the sum of this one on all ranks; each has called it for the same before.
        """
        encoded = self._is_encoded.to(torch.uint8)
        for each in (encoded, *self._sums()):
            add(each)
        self._is_encoded = encoded > 0

    def _sums(self) -> list[Tensor]:
        """Return what is summed up over encoded rows, live; zeros before the first."""
        return []

    def encode_all(self, rows: Tensor | RowReader | None) -> TableState:
        """Encode the whole table, (N, D), read by blocks or None, in one pass, and finish."""
        num_rows, kept = self._table.num_embeddings, None
        for first in range(0, max(num_rows, 1), BLOCK_ROWS):
            ids = torch.arange(first, min(first + BLOCK_ROWS, num_rows))
            given = rows[first : first + BLOCK_ROWS] if isinstance(rows, Tensor) else rows and rows(ids)
            block = self.encode(ids, given)
            if block is not None:
                kept = block.new_empty(self.num_rows, block.shape[1]) if kept is None else kept
                kept[self.row_numbers(ids)] = block
        state = self.finish()
        return state if kept is None else self.with_rows(state, kept)

    def with_rows(self, state: TableState, kept: Tensor) -> TableState:
        """Return a state with all the rows that `encode` returned, by their numbers, where they belong."""
        field, name = self.kept_as
        return dataclasses.replace(
            state, **{field: kept if field == "codes" else {**getattr(state, field), name: kept}}
        )


class LearnedWhole(Learned):
    """A table of which everything that is stored was learned at once, from all rows.

    Args:
        table: the user's config.
        state: what is stored.
        parts: that native tensors are of, where some are float32 in tables of FP16, too.
    """

    needs_rows = False

    def __init__(self, table: BaseEmbeddingConfig, state: TableState, parts: Iterable[NativePart] = ()) -> None:
        super().__init__(table)
        self._state = state
        self.kept_in_float32 = tuple(part.name for part in parts if part.data_type == DataType.FP32)

    def _encode(self, ids: Tensor, rows: Tensor | None) -> None:
        return None

    def _finish(self) -> TableState:
        """Return what was learned."""
        return self._state
