"""What a compression method is: a frozen config that says how one table is stored, read and fitted."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.fit.checks import check_contexts, check_counts, check_seed
from torchrec_compress.managers import Blocks, RowManager
from torchrec_compress.ops import Rows, hash_ids

Config = TypeVar("Config", bound="MethodConfig")

MARK_BYTES = 4  # the flag of a code table, which holds the mark of its integers
METHODS: dict[str, type[MethodConfig]] = {}


def register(config: type[Config]) -> type[Config]:
    """Make a method known by its name to configs, checkpoints and tests (a class decorator)."""
    if config.method in METHODS:
        raise ValueError(f"method {config.method!r} must be registered once, got {config.__qualname__} as well")
    METHODS[config.method] = config
    return config


@dataclass(frozen=True)
class Remap:
    """How an id of the user's table becomes a row number of a native table.

    "identity": id; "mod": id % value; "div": id // value; "hash": seeded hash of the id into `value` buckets.

    Example:
        >>> Remap("div", 4)(torch.tensor([3, 4, 9]))
        tensor([0, 1, 2])
    """

    kind: Literal["identity", "mod", "div", "hash"] = "identity"
    value: int = 1
    salt: int = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the row numbers: (L,) integer -> (L,), same dtype."""
        if self.kind == "mod":
            return ids % self.value
        if self.kind == "div":
            return torch.div(ids, self.value, rounding_mode="floor")
        if self.kind == "hash":
            return hash_ids(ids, self.value, self.salt).to(ids.dtype)
        return ids


@dataclass(frozen=True)
class CodePart:
    """A code table: integers [num_embeddings, row_size], not trained by gradient.

    Args:
        row_size: integers per row.
        dtype: of the table.
        start: row numbers (L,) int64 -> start codes (L, row_size), or None where only fitting or a checkpoint fills it.
        num_packed: codes per row where an integer holds two of them (see `ops.pack_codes`), else 0.
        unfitted: what start codes serve until a fit replaces them, said once when they are looked up; "" where they
            need no fit.
    """

    row_size: int
    dtype: torch.dtype
    start: Callable[[Tensor], Tensor] | None = None
    num_packed: int = 0
    unfitted: str = ""


@dataclass(frozen=True)
class NativePart:
    """A stock TorchRec table, trained as any other, whose ids are rewritten first.

    Args:
        name: of the part; the physical table is called "<table>__<name>".
        num_embeddings, embedding_dim: its size.
        remap: from the user's ids to its rows.
        init_fn: initialises its weight in place; None: as the user's table.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    remap: Remap
    init_fn: Callable[[Tensor], Tensor | None] | None = None


@dataclass(frozen=True)
class ManagedPart:
    """A native table whose rows an id is given, and loses, while it is trained; unpooled rows go to the decoder.

    Args:
        rows: the table; as many rows for each block, and `rows.remap` says no more than its salt.
        blocks: of its ids.
        manager: number of blocks and device -> what manages them.
    """

    rows: NativePart
    blocks: Blocks
    manager: Callable[[int, torch.device | None], RowManager]

    @property
    def rows_per_block(self) -> int:
        """Rows of the native table that belong to a block."""
        return self.rows.num_embeddings // self.blocks.num_blocks

    def state(self) -> dict[str, Tensor]:
        """Return the buffers of the whole table's manager by name, on the meta device."""
        return dict(self.manager(self.blocks.num_blocks, torch.device("meta")).named_buffers())

    @property
    def state_bytes(self) -> int:
        """Bytes that the manager of the whole table keeps."""
        return sum(buffer.nbytes for buffer in self.state().values())

    @property
    def training_bytes(self) -> int:
        """Of `state_bytes`, those that no look-up of a trained model reads."""
        names = self.manager(0, torch.device("meta")).training_only
        return sum(buffer.nbytes for name, buffer in self.state().items() if name in names)


@dataclass(frozen=True)
class Parts:
    """What one table is stored as.

    Args:
        codes: its code table.
        bag: a native table that is pooled natively and is the embedding already.
        rows: native tables whose unpooled rows go to the decoder.
        managed: a native table whose ids get rows while they are trained.
        dense: the user's own table, untouched.
    """

    codes: CodePart | None = None
    bag: NativePart | None = None
    rows: tuple[NativePart, ...] = ()
    managed: ManagedPart | None = None
    dense: bool = False

    @property
    def native(self) -> tuple[NativePart, ...]:
        """All native parts."""
        bag = () if self.bag is None else (self.bag,)
        return bag + self.rows + (() if self.managed is None else (self.managed.rows,))


class TableDecoder(nn.Module, ABC):
    """The small replicated part of a compressed table: turns codes and native rows into pooled embeddings.

    Attributes:
        has_low_bit_rows: whether bytes of the table are rows of `ops.quantize_rows`.
    """

    has_low_bit_rows = False

    @abstractmethod
    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags.

        Args:
            ids: (L,) integer.
            offsets: (B + 1,) integer, or None for one bag per id.
            weights: (L,) factors, or None.
            codes: (L, row_size) integer, or None where the method has no code table.
            rows: per native row part (L, dim), or where to find them.

        Returns:
            (B, D) floating point.
        """

    def reset_parameters(self) -> None:
        """Initialise what is trained; called at construction and after a move from the meta device."""


@dataclass(frozen=True)
class TableData:
    """What a method may learn from when it is fitted to a table.

    Args:
        rows: (N, D) float32 pre-trained table, or None.
        counts: (N,) how often each id was looked up in training, or None.
        contexts: ((P,), (P,)) int64: pairs (id, context id) seen together, or None.
        seed: of everything random.
        progress: whether to show a progress bar.
    """

    rows: Tensor | None
    counts: Tensor | None = None
    contexts: tuple[Tensor, Tensor] | None = None
    seed: int = 0
    progress: bool = False

    def trained_rows(self, table: BaseEmbeddingConfig) -> Tensor:
        """Return the pre-trained rows.

        Raises:
            ValueError: there are none, their shape or dtype is not the table's, or one is not finite.
        """
        if self.rows is None:
            raise ValueError(f"table {table.name!r}: this method must be fitted to a pre-trained table, got none")
        check_trained_rows(table, self.rows)
        return self.rows.detach().float()


def check_trained_rows(table: BaseEmbeddingConfig, rows: Tensor) -> None:
    """Raise ValueError unless these are (N, D) finite floating-point rows of the table."""
    where = f"table {table.name!r}"
    if not isinstance(rows, Tensor) or rows.is_meta or not rows.dtype.is_floating_point:
        got = f"{rows.dtype} on {rows.device}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{where}: pre-trained rows must be a tensor of floating-point values, got {got}")
    if rows.shape != (table.num_embeddings, table.embedding_dim):
        raise ValueError(
            f"{where}: the pre-trained table must be {table.num_embeddings} x {table.embedding_dim}, "
            f"got {tuple(rows.shape)}"
        )
    if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
        first = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(f"{where}: pre-trained rows must be finite, got NaN or infinity in the row of id {first}")


@dataclass(frozen=True)
class TableState:
    """The stored tensors of one fitted table.

    Args:
        codes: (N, row_size) integer, or None.
        decoder: parameters and buffers of the decoder by name.
        native: weights of native parts by part name ("" is the dense table).
        managed: buffers of the manager by name.
    """

    codes: Tensor | None = None
    decoder: dict[str, Tensor] = field(default_factory=dict)
    native: dict[str, Tensor] = field(default_factory=dict)
    managed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """How one table is compressed. Configs are values: frozen, comparable, independent of the table they serve."""

    method: ClassVar[str]
    unpooled: ClassVar[bool] = True
    """Whether the method also serves `CompressedEmbeddingCollection`."""
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "rows"
    """What its stored state must be fitted to before it means anything; "nothing" can be trained from the start."""
    new_ids: ClassVar[str]
    """What an id that the fit never saw is served."""

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError when the table cannot be stored this way."""
        if table.data_type != DataType.FP32:
            raise ValueError(
                f"table {table.name!r}: data_type must be FP32 with method {self.method!r}, got "
                f"{table.data_type.value}; compressed tables are trained in float32"
            )

    @abstractmethod
    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return what the table is stored as."""

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> TableDecoder | None:
        """Return the table's decoder, or None where its native bag is the embedding already."""
        return None

    @abstractmethod
    def fit(self, table: BaseEmbeddingConfig, data: TableData) -> TableState:
        """Learn the stored tensors from a pre-trained table. It begins with `check_fit`."""

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where a fit to counts, contexts and seed would fail; rows are checked as they are read.

        So what is wrong with the last of many tables shows before the first is fitted.
        """
        where = f"table {table.name!r}"
        check_seed(where, data.seed)
        if data.counts is not None:
            check_counts(where, data.counts, table.num_embeddings)
        if data.contexts is not None:
            check_contexts(where, data.contexts, table.num_embeddings)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the decoder's tensors."""
        return 0

    def stored_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return all bytes that storing the table takes, from its config alone.

        Codes, native rows, codebooks and hot rows; the four-byte mark of a code table's integers, and what a manager
        keeps for training alone, too.
        """
        parts = self.parts(table, seed=0)
        total = self.decoder_bytes(table)
        if parts.codes is not None:
            total += table.num_embeddings * parts.codes.row_size * parts.codes.dtype.itemsize + MARK_BYTES
        total += sum(native.num_embeddings * native.embedding_dim * 4 for native in parts.native)
        total += 0 if parts.managed is None else parts.managed.state_bytes
        return total + (dense_bytes(table) if parts.dense else 0)

    def served_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes that look-ups of a trained table read: `stored_bytes` without what only training needs."""
        managed = self.parts(table, seed=0).managed
        return self.stored_bytes(table) - (0 if managed is None else managed.training_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data, with the method's name; `torchrec_compress.compression.parse` reads it."""
        return {"method": self.method, **dataclasses.asdict(self)}


def dense_bytes(table: BaseEmbeddingConfig) -> int:
    """Return the bytes of the user's own table."""
    return table.num_embeddings * table.embedding_dim * (2 if table.data_type == DataType.FP16 else 4)


def init_like(table: BaseEmbeddingConfig, weight: Tensor) -> None:
    """Initialise a weight in place the way the user's table would have been."""
    if table.init_fn is not None:
        table.init_fn(weight)
    else:
        nn.init.uniform_(weight, table.get_weight_init_min(), table.get_weight_init_max())


def check_low_bit_width(table: BaseEmbeddingConfig, dtype: str) -> None:
    """Raise ValueError where quantised rows would not end on the two-byte boundary that FBGEMM asks for."""
    multiple = {"int8": 2, "int4": 4}.get(dtype, 1)
    if table.embedding_dim % multiple:
        raise ValueError(
            f"table {table.name!r}: embedding_dim must be a multiple of {multiple} for {dtype} rows, "
            f"got {table.embedding_dim}"
        )


def bucket_means(rows: Tensor, buckets: Tensor, num_buckets: int, counts: Tensor | None) -> Tensor:
    """Return the count-weighted mean row of each bucket.

    Args:
        rows: (N, D) float32.
        buckets: (N,) int64 in [0, num_buckets).
        num_buckets: number of buckets.
        counts: (N,) or None for equal weights; an id never seen counts a thousandth of a look-up.

    Returns:
        (num_buckets, D) float32; an empty bucket is zeros.

    Example:
        >>> bucket_means(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 2, None).tolist()
        [[2.0], [0.0]]
    """
    weights = torch.ones(rows.shape[0]) if counts is None else counts.float().clamp(min=1e-3)
    sums = rows.new_zeros(num_buckets, rows.shape[1]).index_add_(0, buckets, rows * weights.unsqueeze(1))
    totals = rows.new_zeros(num_buckets).index_add_(0, buckets, weights)
    return sums / totals.clamp(min=1e-12).unsqueeze(1)
