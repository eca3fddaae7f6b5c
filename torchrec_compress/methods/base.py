"""What a compression method is: a frozen config that says how one table is stored, read and fitted."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, BaseEmbeddingConfig, DataType

from torchrec_compress.fit.checks import check_contexts, check_counts, check_seed
from torchrec_compress.methods.decoders import BagDecoder, TableDecoder
from torchrec_compress.methods.storage import Parts
from torchrec_compress.ops import SCALE_BYTES, quantize_rows
from torchrec_compress.schema import check_numbers

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound="MethodConfig")

# how a table is stored at each level of fewer bytes, unless its method says otherwise
CODE_LENGTHS = (16, 8, 4, 2, 1)
_LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int8", {}),
    ("int4", {}),
    *(("pq", {"num_codes": length}) for length in CODE_LENGTHS),
)
NUM_LEVELS = len(_LADDER)
MARK_BYTES = 4  # the flag of a code table, which holds the mark of its integers
METHODS: dict[str, type[MethodConfig]] = {}


def register(config: type[Config]) -> type[Config]:
    """Make a method known by its name to configs, checkpoints and tests (a class decorator)."""
    if config.method in METHODS:
        raise ValueError(f"method {config.method!r} must be registered once, got {config.__qualname__} as well")
    METHODS[config.method] = config
    return config


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


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e15


def check_trained_rows(table: BaseEmbeddingConfig, rows: Tensor) -> None:
    """Raise ValueError unless these are (N, D) finite floating-point rows of the table."""
    where = f"table {table.name!r}"
    if not isinstance(rows, Tensor) or rows.is_meta or rows.layout != torch.strided or rows.dtype not in _FLOATS:
        got = f"{rows.dtype} on {rows.device} ({rows.layout})" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{where}: pre-trained rows must be a tensor of floating-point values, got {got}")
    if rows.shape != (table.num_embeddings, table.embedding_dim):
        raise ValueError(
            f"{where}: the pre-trained table must be {table.num_embeddings} x {table.embedding_dim}, "
            f"got {tuple(rows.shape)}"
        )
    if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
        first = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(f"{where}: pre-trained rows must be finite, got NaN or infinity in the row of id {first}")
    low, high = (float(value) for value in torch.aminmax(rows)) if rows.numel() else (0.0, 0.0)
    if max(-low, high) > _LARGEST:
        raise ValueError(
            f"{where}: pre-trained rows must be at most {_LARGEST:.0e}, whose squares float32 still adds up, got "
            f"{max(-low, high):.3g}"
        )


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
    is_compressed: ClassVar[bool] = True
    """Whether it is another way to store a table than the user's own."""
    makes_rows: ClassVar[bool] = True
    """Whether a float row per id is made before bags are pooled, where no stored tensor is charged for it."""

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter to it: to its fit, or to how its codes are used."""
        return self.needs != "nothing"

    @property
    def codewords(self) -> int:
        """Codewords of a codebook, 0 where rows are no codes."""
        return 0

    @property
    def codewords_per_id(self) -> int:
        """Codewords that a row is made of."""
        return 0

    @property
    def sums_codewords(self) -> bool:
        """Whether a row is the sum of its codewords; else they lie side by side."""
        return False

    @property
    def num_packed(self) -> int:
        """Codes per row where two share a byte, or 0 where every integer is a code."""
        return 0

    def __post_init__(self) -> None:
        """Raise ValueError for a number or a nested config of another type."""
        check_numbers(self)

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether the table has rows enough for it to save any; a smaller one stays dense."""
        return True

    def smaller(self, level: int) -> MethodConfig | None:
        """Return the way to store the same table at a level of fewer bytes, or None where there is none.

        Args:
            level: from 0, the gentlest, to `NUM_LEVELS` - 1.
        """
        name, options = _LADDER[level]
        return METHODS[name](**options)

    def scaled(self, share: float) -> MethodConfig:
        """Return the method for a sample of a table's rows that is this share of them."""
        return self

    def with_finer_head(self) -> MethodConfig | None:
        """Return the method with hot rows in more bits, which changes nothing else of a fit, or None without any."""
        return None

    def serve_finer_head(self, served: Tensor, table: BaseEmbeddingConfig, data: TableData) -> Tensor:
        """Return the rows of `with_finer_head`, (N, D) float32, from those that a fit serves, without a fit."""
        return served

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

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> TableDecoder | BagDecoder | None:
        """Return the table's decoder, a `BagDecoder` for bags, or None where one bag is the embedding already."""
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
        total += sum(native.num_bytes for native in parts.native)
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
    return table.num_embeddings * table.embedding_dim * DATA_TYPE_NUM_BITS[table.data_type] // 8


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


def quantize_table_rows(
    table: BaseEmbeddingConfig, rows: Tensor, dtype: Literal["int8", "int4"], ids: Tensor | None = None
) -> Tensor:
    """Return low-bit rows of a table as `ops.quantize_rows` makes them, (L, bytes per row) uint8.

    Args:
        table: the user's config.
        rows: (L, D) float32.
        dtype: of the result.
        ids: (L,) of the rows; None is all of them.

    Raises:
        ValueError: a row has no float16 scale and bias; the id is named.
    """
    found = quantize_rows(rows, dtype)
    scale, bias = found[:, :SCALE_BYTES].contiguous().view(torch.float16).float().unbind(1)
    wrong = (~(torch.isfinite(scale) & torch.isfinite(bias))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"table {table.name!r}: {dtype} rows must have a float16 scale and bias, got values up to "
            f"{float(rows[row].abs().max()):.3g} in the row of id {row if ids is None else int(ids[row])}; store the "
            "table as codes or dense, or train it smaller"
        )
    # float16 has steps of 2**-24 near zero: there a scale may be off by more than half a value's own step
    levels = {"int8": 255, "int4": 15}[dtype]
    low, high = torch.aminmax(rows, dim=1)
    rough = int(((high > low) & ((high - low) / levels < levels * 2.0**-24)).sum())
    if rough:
        logger.warning(
            "table %r: %d of %d rows vary by less than %.1g, which a float16 scale cannot tell: %s serves them roughly",
            table.name,
            rough,
            len(rows),
            levels**2 * 2.0**-24,
            dtype,
        )
    return found


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
