"""What one table is stored as: the parts that modules, sharding and the planner are made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, BaseEmbeddingConfig, DataType

from torchrec_compress.managers import Blocks, CodeManager, RowManager
from torchrec_compress.methods.start import SeededInit
from torchrec_compress.ops import TrainedFormat, TrainedOptimizer, coded_rows, hash_ids

NO_ROW = -1  # of an id that a native table has none for


@dataclass(frozen=True)
class Remap:
    """How an id of the user's table becomes a row number of a native table.

    "identity": id; "mod": id % value; "div": id // value; "digit": id // value % base; "hash": seeded hash of the id
    into `value` buckets. Two give a row to some ids alone: "range": id - value, of ids in [value, value + base);
    "ranked": how many ids come before it in the one numbered `value` of `base` sets, of which the table's decoder holds
    the indexes (`ops.index_coded_ids`), one below the other, as its buffer `places`. An id without a row is not looked
    up there, and adds zeros.

    Example:
        >>> Remap("div", 4)(torch.tensor([3, 4, 9]))
        tensor([0, 1, 2])
        >>> Remap("range", 4, base=3)(torch.tensor([3, 4, 6, 7]))
        tensor([-1,  0,  2, -1])
    """

    kind: Literal["identity", "mod", "div", "digit", "hash", "range", "ranked"] = "identity"
    value: int = 1
    salt: int = 0
    base: int = 1

    @property
    def is_partial(self) -> bool:
        """Whether some ids have no row."""
        return self.kind in ("range", "ranked")

    def __call__(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Return the row numbers: (L,) integer -> (L,), same dtype; `NO_ROW` for an id that has none.

        Args:
            ids: of the user's table.
            places: (base * N / 128, 20) uint8 for "ranked", which alone reads it.
        """
        if self.kind == "range":
            return torch.where((ids >= self.value) & (ids < self.value + self.base), ids - self.value, NO_ROW)
        if self.kind == "ranked":
            assert places is not None
            mine = places.view(self.base, -1, places.shape[1])[self.value]
            return (coded_rows(mine, ids) + NO_ROW).to(ids.dtype)
        if self.kind == "mod":
            return ids % self.value
        if self.kind in ("div", "digit"):
            found = torch.div(ids, self.value, rounding_mode="floor")
            return found if self.kind == "div" else found % self.base
        if self.kind == "hash":
            return hash_ids(ids, self.value, self.salt).to(ids.dtype)
        return ids


@dataclass(frozen=True)
class CodePart:
    """A code table: integers [rows, row_size], not trained by gradient.

    Args:
        row_size: integers per row.
        dtype: of the table.
        start: row numbers (L,) int64 -> start codes (L, row_size), or None where only fitting or a checkpoint fills it.
        num_packed: codes per row where an integer holds two of them (see `ops.pack_codes`), else 0.
        unfitted: what start codes serve until a fit replaces them, said once when they are looked up; "" where they
            need no fit.
        manager: what changes the codes while the table trains, or None.
        num_coded: ids that have a row of their own, of which the decoder's `coded_ids` says; all others share the first
            row. None: every id has one.
    """

    row_size: int
    dtype: torch.dtype
    start: Callable[[Tensor], Tensor] | None = None
    num_packed: int = 0
    unfitted: str = ""
    manager: CodeManager | None = None
    num_coded: int | None = None

    def num_rows(self, num_ids: int) -> int:
        """Return the rows of the code table of so many ids."""
        return num_ids if self.num_coded is None else self.num_coded + 1


# what TorchRec's tables train in
_NATIVE_TYPES = (DataType.FP32, DataType.FP16)


def native_type(table: BaseEmbeddingConfig) -> DataType:
    """Return the data type of a table's rows where they lie in a table of TorchRec's.

    Raises:
        ValueError: TorchRec would change it without a word.
    """
    if table.data_type not in _NATIVE_TYPES:
        raise ValueError(
            f"table {table.name!r}: data_type must be FP32 or FP16 where rows lie in a table of TorchRec's, got "
            f"{table.data_type.value}; TorchRec would silently store it as FP16"
        )
    return table.data_type


@dataclass(frozen=True)
class NativePart:
    """A stock TorchRec table, trained as any other, whose ids are rewritten first.

    Args:
        name: of the part; the physical table is called "<table>__<name>".
        num_embeddings, embedding_dim: its size.
        remap: from the user's ids to its rows.
        init_fn: initialises its weight in place; None: as the user's table.
        decay: whether l2 may pull it towards zero.
        data_type: of the stored weight, FP32 or FP16; what is looked up is float32 all the same.
        shared: name of the physical table where several of a collection's tables, or several parts of one, look up the
            same rows; its parts agree in all but name and remap. It starts from the collection's seed and this name
            alone, without init_fn as TorchRec starts a table of its size, and no fit of one table fills it.

    Raises:
        ValueError: a name that is no identifier; another data type, which TorchRec would store as FP16.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    remap: Remap
    init_fn: Callable[[Tensor], Tensor | None] | None = None
    decay: bool = True
    data_type: DataType = DataType.FP32
    shared: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a name unfit for a module, or a data type that TorchRec's tables do not have."""
        if not self.name.isidentifier():
            raise ValueError(f"native part {self.name!r}: name must be an identifier, which module names are made of")
        if self.data_type not in _NATIVE_TYPES:
            raise ValueError(
                f"native part {self.name!r}: data_type must be FP32 or FP16, which TorchRec's tables train in, got "
                f"{self.data_type.value}"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of its weight."""
        return self.num_embeddings * self.embedding_dim * DATA_TYPE_NUM_BITS[self.data_type] // 8


@dataclass(frozen=True)
class ManagedPart:
    """A native table whose rows an id is given, and loses, while it is trained; unpooled rows go to the decoder.

    Args:
        rows: the table; as many rows for each block, and `rows.remap` says no more than its salt.
        blocks: of its ids.
        manager: number of blocks and device -> what manages them.

    Raises:
        ValueError: the table is not of float32 rows, which managers move and score.
    """

    rows: NativePart
    blocks: Blocks
    manager: Callable[[int, torch.device | None], RowManager]

    def __post_init__(self) -> None:
        """Raise ValueError unless rows are float32."""
        if self.rows.shared is not None:
            raise ValueError(f"managed part {self.rows.name!r}: must not be shared, got {self.rows.shared!r}")
        if self.rows.data_type != DataType.FP32:
            raise ValueError(
                f"managed part {self.rows.name!r}: data_type must be FP32, got {self.rows.data_type.value}"
            )

    @property
    def rows_per_block(self) -> int:
        """Rows of the native table that belong to a block."""
        return self.rows.num_embeddings // self.blocks.num_blocks

    def state(self) -> dict[str, Tensor]:
        """Return the buffers of the whole table's manager by name, on the meta device."""
        return dict(self.manager(self.blocks.num_blocks, torch.device("meta")).named_buffers())

    @property
    def layout(self) -> tuple[int, ...]:
        """What its manager says of the rows and buffers of a block."""
        return self.manager(0, torch.device("meta")).layout

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
class TrainedPart:
    """Rows of a few bits that are trained where they lie, in their backward, by kernels of ours; pooled like bags.

    Args:
        width: numbers per row.
        bits: of a number, 8 or 4.
        start: what the rows start from, as float32.
        optimizer: that trains them, or None for the one that the user gives native tables.
        state_bits: of a value of the optimizer's state, 32 or 8.
    """

    width: int
    bits: Literal[8, 4]
    start: SeededInit
    optimizer: TrainedOptimizer | None = None
    state_bits: Literal[32, 8] = 32

    def format(self, optimizer: TrainedOptimizer = "sgd") -> TrainedFormat:
        """Return what kernels know of the rows, and of the state that an optimizer keeps beside them."""
        return TrainedFormat(self.width, self.bits, optimizer, self.state_bits)


@dataclass(frozen=True)
class Parts:
    """What one table is stored as.

    Args:
        codes: its code table.
        bags: native tables that are pooled natively; a `BagDecoder` makes embeddings of them, or one is the embedding
            already.
        rows: native tables whose unpooled rows go to the decoder.
        managed: a native table whose ids get rows while they are trained.
        trained: rows of a few bits that train where they lie, pooled; a `BagDecoder` makes embeddings of the bags, or
            they are the embedding already.
        dense: the user's own table, untouched.

    Raises:
        ValueError: bags or trained rows beside other parts, or two parts of one name.
    """

    codes: CodePart | None = None
    bags: tuple[NativePart, ...] = ()
    rows: tuple[NativePart, ...] = ()
    managed: ManagedPart | None = None
    trained: TrainedPart | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for parts that do not go together."""
        names = [part.name for part in self.native]
        if len(set(names)) < len(names):
            raise ValueError(f"parts: names of native parts must differ, got {names}")
        others = self.codes or self.rows or self.managed or self.dense
        if (self.bags and (others or self.trained)) or (self.trained and others):
            raise ValueError(f"parts: bags are pooled without other parts, got others beside {names or 'trained rows'}")

    @property
    def are_bags(self) -> bool:
        """Whether the table is pooled first and decoded, if at all, afterwards."""
        return bool(self.bags) or self.trained is not None

    @property
    def native(self) -> tuple[NativePart, ...]:
        """All native parts."""
        return self.bags + self.rows + (() if self.managed is None else (self.managed.rows,))

    @property
    def shared(self) -> dict[str, NativePart]:
        """One part of every physical table that may be shared with other tables, by its name."""
        return {part.shared: part for part in self.native if part.shared is not None}

    @property
    def native_bytes(self) -> int:
        """Bytes of native tables: what is shared is counted once, and whole."""
        own = sum(part.num_bytes for part in self.native if part.shared is None)
        return own + sum(part.num_bytes for part in self.shared.values())
