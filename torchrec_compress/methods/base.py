"""What a compression method is: a frozen config that says how one table is stored, read and fitted."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, BaseEmbeddingConfig, DataType

from torchrec_compress.fit.checks import check_contexts, check_counts, check_seed
from torchrec_compress.fit.contexts import ContextSketch
from torchrec_compress.fit.curvature import check_matrix, is_flat
from torchrec_compress.fit.kmeans import train_size
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods.decoders import BagDecoder, SharedDecoder, TableDecoder
from torchrec_compress.methods.learned import Learned, RowReader, TableData, TableState, check_sample, with_sample
from torchrec_compress.methods.storage import Parts
from torchrec_compress.schema import settle_numbers

Config = TypeVar("Config", bound="MethodConfig")

# how a table is stored at each level of fewer bytes, unless its method says otherwise
CODE_LENGTHS = (16, 8, 4, 2, 1)
_LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int8", {}),
    ("int4", {}),
    *(("pq", {"num_codes": length}) for length in CODE_LENGTHS),
)
NUM_LEVELS = len(_LADDER)
_POINTS_PER_CODEWORD = 256  # of a sample that is learned from
NO_PROJECTION = "it has no projection"  # of a table that none can be folded of
MARK_BYTES = 4  # the flag of a code table, which holds the mark of its integers
METHODS: dict[str, type[MethodConfig]] = {}


def register(config: type[Config]) -> type[Config]:
    """Make a method known by its name to configs, checkpoints and tests (a class decorator)."""
    if config.method in METHODS:
        raise ValueError(f"method {config.method!r} must be registered once, got {config.__qualname__} as well")
    METHODS[config.method] = config
    return config


_FLOAT_TYPES = (DataType.FP32, DataType.FP16, DataType.BF16)


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
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "nothing"
    """Which pre-trained rows `learn` must have: none, where rows are encoded one by one, a sample, or all of them."""

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter to it: to its fit, or to how its codes are used."""
        return self.needs != "nothing"

    @property
    def uses_curvature(self) -> bool:
        """Whether its fit counts errors in the metric of the loss, where it is given one."""
        return False

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
        """Raise ValueError for a number or a nested config of another type; NumPy's integers become ints."""
        settle_numbers(self)

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether the table has rows enough for it to save any; a smaller one stays dense."""
        return True

    def rank(self, table: BaseEmbeddingConfig) -> int:
        """Return how many directions all rows lie in, at most the embedding's width."""
        return table.embedding_dim

    def smaller(self, level: int) -> MethodConfig | None:
        """Return the way to store the same table at a level of fewer bytes, or None where there is none.

        Args:
            level: from 0, the gentlest, to `NUM_LEVELS` - 1.
        """
        name, options = _LADDER[level]
        return METHODS[name](**options)

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same method at all sizes that a budget may pick from, this one's own where it has no other.

        Not all of them can store the table.
        """
        yield self

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError when the table cannot be stored this way.

        Its data type is that of rows which lie in tables of TorchRec's (`native_type`); codebooks, projections and
        numbers of one id are float32, rows of few bits what they are.
        """
        if table.data_type not in _FLOAT_TYPES:
            raise ValueError(
                f"table {table.name!r}: data_type must be one of {[each.value for each in _FLOAT_TYPES]}, got "
                f"{table.data_type.value}; compressed tables are trained in floating point"
            )

    @abstractmethod
    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return what the table is stored as."""

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> TableDecoder | BagDecoder | None:
        """Return the table's decoder, a `BagDecoder` for bags, or None where one bag is the embedding already."""
        return None

    def shared_decoder(self, table: BaseEmbeddingConfig) -> SharedDecoder | None:
        """Return the `BagDecoder` that the table shares with others of its collection, or None where it has its own."""
        return None

    @abstractmethod
    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> Learned:
        """Learn what all rows share, from all rows or a sample of them. It begins with `check_fit`."""

    def fit(self, table: BaseEmbeddingConfig, data: TableData) -> TableState:
        """Learn the stored tensors from a whole pre-trained table: `learn`, then encode it block by block."""
        if data.ids is not None:
            raise ValueError(
                f"table {table.name!r}: a fit must be given all rows, got those of {len(data.ids)} ids; call learn() "
                "with a sample, and encode() with every row"
            )
        return self.learn(table, data).encode_all(data.rows)

    def start(self, table: BaseEmbeddingConfig, data: TableData) -> TableState | None:
        """Return what a table that trains from the start takes of look-ups per id, or None where it takes nothing."""
        return None

    def fit_blocks(self, table: BaseEmbeddingConfig, data: TableData, read: RowReader) -> TableState:
        """Learn the stored tensors from a sample of rows, then encode all: the table never lies there whole."""
        return self.learn_blocks(table, data, read).encode_all(read)

    def learn_blocks(self, table: BaseEmbeddingConfig, data: TableData, read: RowReader) -> Learned:
        """Learn what all rows share from a sample of them.

        Args:
            table: the user's config.
            data: without rows.
            read: the rows.

        Raises:
            ValueError: as `check_blocks`, and as `fit`.
        """
        self.check_blocks(table)
        self.check_fit(table, data)
        if self.learns_from != "nothing":
            data = with_sample(data, self.learning_weights(table, data), self._sample_size, read)
        return self.learn(table, data)

    def check_blocks(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError where the table is too large to be learned from rows that are read block by block."""
        if self.learns_from == "all" and table.num_embeddings > self._sample_size:
            raise ValueError(
                f"table {table.name!r}: method {self.method!r} must learn from all {table.num_embeddings} rows at "
                f"once, got rows that are read in blocks, of which at most {self._sample_size} are held; decompress() "
                "the source first, or choose another method"
            )

    @property
    def _sample_size(self) -> int:
        return train_size(self.codewords, _POINTS_PER_CODEWORD)

    def learning_weights(self, table: BaseEmbeddingConfig, data: TableData) -> Tensor:
        """Return what each id weighs in `learn`, (N,) float32, by which a sample is drawn: its look-ups."""
        return popularity_weights(data.counts, "none" if data.counts is None else "count", table.num_embeddings)

    def fits_by_counts(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether look-ups per id change the fit of a table, where there are some."""
        return True

    def check_fit(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError where a fit to counts, contexts and seed would fail; rows are checked as they are read.

        So what is wrong with the last of many tables shows before the first is fitted.
        """
        where = f"table {table.name!r}"
        check_seed(where, data.seed)
        if data.counts is not None:
            check_counts(where, data.counts, table.num_embeddings)
        if data.contexts is not None:
            self.check_contexts(table, data)
        if data.curvature is not None:
            check_matrix(f"{where}: curvature", data.curvature)
            if len(data.curvature) != table.embedding_dim:
                raise ValueError(
                    f"{where}: curvature must be of {table.embedding_dim} columns, got {len(data.curvature)}"
                )
            if is_flat(data.curvature):
                raise ValueError(f"{where}: curvature must have a trace above 0, got none; leave it out")
        check_sample(table, data)

    def check_contexts(self, table: BaseEmbeddingConfig, data: TableData) -> None:
        """Raise ValueError unless contexts, which are there, are pairs of the table's ids and others."""
        check_contexts(f"table {table.name!r}", data.contexts, table.num_embeddings)

    def sketch(self, table: BaseEmbeddingConfig, seed: int) -> ContextSketch | None:
        """Return what a stream of pairs is added to, all that a fit needs of them; None: it needs the pairs."""
        return None

    def sketch_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of that, which a fit holds beside the table."""
        return 0

    def projected_width(self, table: BaseEmbeddingConfig) -> int | None:
        """Return the numbers per row that a projection behind the pooling turns into embeddings; None without one.

        Where there is one, the decoder holds it by the name "projection", (r, D) float32.
        """
        return None

    def unprojected(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return how the same rows are stored without their projection, in a table of `projected_width` numbers.

        Args:
            table: the user's config.
            state: the stored tensors; what is returned holds the same ones.
        """
        return self, state

    def why_unfolded(self, table: BaseEmbeddingConfig, in_float32: bool) -> str | None:
        """Return why the projection cannot be multiplied into the rest of the decoder, or None where it can.

        Args:
            table: the user's config.
            in_float32: whether rows of few bits may become float32 ones.
        """
        return NO_PROJECTION

    def folded(self, table: BaseEmbeddingConfig, state: TableState) -> tuple[MethodConfig, TableState]:
        """Return how the table is stored, and its tensors, once the projection is multiplied into the decoder.

        Arguments as in `unprojected`; asked only where `why_unfolded` is None.
        """
        return self, state

    def dequantized(self) -> MethodConfig:
        """Return how the table is stored while what its decoder holds in few bits trains: in float32, codes as ever."""
        return self

    def stored_as(self, table: BaseEmbeddingConfig, state: TableState, other: MethodConfig) -> TableState:
        """Return the tensors as another method stores them: of the same `dequantized`, or `exported`.

        Raises:
            ValueError: rows have no scale in few bits.
        """
        return state

    def exported(self) -> MethodConfig:
        """Return how the table is stored once trained: as it trains, or what serves the same rows in fewer bytes.

        `stored_as` makes that of it; whether a table saves bytes is asked of it, not of what trains.
        """
        return self

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of the decoder's tensors."""
        return 0

    def trains_decoder(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether anything of the decoder is trained, by the dense optimizer: all of it, if there is one."""
        return self.decoder_bytes(table) > 0

    def stored_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return all bytes that storing the table takes, from its config alone: as if it shared nothing with others.

        Codes, native rows, codebooks and hot rows; the four-byte mark of a code table's integers, and what a manager
        keeps for training alone, too.
        """
        parts = self.parts(table, seed=0)
        total = self.decoder_bytes(table)
        if parts.codes is not None:
            rows = parts.codes.num_rows(table.num_embeddings)
            total += rows * parts.codes.row_size * parts.codes.dtype.itemsize + MARK_BYTES
        total += parts.native_bytes
        total += 0 if parts.trained is None else table.num_embeddings * parts.trained.format().row_bytes
        total += 0 if parts.managed is None else parts.managed.state_bytes
        return total + (dense_bytes(table) if parts.dense else 0)

    def served_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes that look-ups of a trained table read: `stored_bytes` without what only training needs."""
        if self.exported() != self:
            return self.exported().served_bytes(table)
        managed = self.parts(table, seed=0).managed
        return self.stored_bytes(table) - (0 if managed is None else managed.training_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data, with the method's name; `torchrec_compress.compression.parse` reads it."""
        return {"method": self.method, **dataclasses.asdict(self)}


def spread(most: int) -> list[int]:
    """Return numbers from 1 to `most`, ascending, each at most a fiftieth above the one before, or one.

    Example:
        >>> spread(7), len(spread(10**9))
        ([1, 2, 3, 4, 5, 6, 7], 928)
    """
    found, number = [], 1
    while number < most:
        found.append(number)
        number = max(number + 1, number + number // 50)
    return [*found, most] if most >= 1 else []


def dense_bytes(table: BaseEmbeddingConfig) -> int:
    """Return the bytes of the user's own table."""
    return table.num_embeddings * table.embedding_dim * DATA_TYPE_NUM_BITS[table.data_type] // 8


def stored_together(methods: Iterable[tuple[MethodConfig, BaseEmbeddingConfig]]) -> int:
    """Return all bytes that storing tables of one collection takes: what they share is counted once."""
    total, shared = 0, {}
    for method, table in methods:
        mine = shared_bytes(method, table)
        total += method.stored_bytes(table) - sum(mine.values())
        shared |= mine
    return total + sum(shared.values())


def shared_bytes(method: MethodConfig, table: BaseEmbeddingConfig) -> dict[str, int]:
    """Return the bytes of what a table may share with others of its collection, by name: native tables, its decoder."""
    found = {name: part.num_bytes for name, part in method.parts(table, seed=0).shared.items()}
    decoder = method.shared_decoder(table)
    return found if decoder is None else {**found, decoder.name: method.decoder_bytes(table)}


def init_like(table: BaseEmbeddingConfig, weight: Tensor) -> None:
    """Initialise a weight in place the way the user's table would have been."""
    if table.init_fn is not None:
        table.init_fn(weight)
    else:
        nn.init.uniform_(weight, table.get_weight_init_min(), table.get_weight_init_max())
