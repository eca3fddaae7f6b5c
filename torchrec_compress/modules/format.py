"""The format of a collection's state dict: its version, and what every table is stored as."""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.methods.base import TableDecoder
from torchrec_compress.methods.learned import TableState
from torchrec_compress.methods.storage import CodePart, NativePart
from torchrec_compress.modules.blueprint import Blueprint
from torchrec_compress.ops import SCALE_BYTES, first_infinite, first_not_finite
from torchrec_compress.seams import local_shards, shape_and_dtype

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# what a checkpoint and a collection must agree on, table by table; their fingerprints are stored
LAYOUT = ("method", "sizes", "seed")
# what rows may be loaded as, whatever they were saved as
_NATIVE_TYPES = (DataType.FP32, DataType.FP16)


class StateFormat:
    """What a state dict must be to fit a collection.

    Args:
        blueprint: of the collection.
        banks: the decoder of every table, or None, by table name.

    Attributes:
        layout: for every table, in the user's order, a fingerprint of each `LAYOUT` field.
    """

    def __init__(self, blueprint: Blueprint, banks: Any) -> None:
        self._blueprint, self._banks = blueprint, banks
        self.layout = [self._fingerprints(table, blueprint.parts[table.name].codes) for table in blueprint.tables]

    def check(self, state_dict: dict, prefix: str) -> None:
        """Raise ValueError when a state dict was written by another version, or for tables stored otherwise.

        Where an earlier version said less of a table, what it left out is put into `state_dict`.
        """
        found = state_dict.get(prefix + "format_version")
        if found is not None and not found.is_meta and int(found) != FORMAT_VERSION:
            raise ValueError(
                f"{prefix}format_version: must be {FORMAT_VERSION}, got {int(found)}; "
                "convert the checkpoint, or load it with the release that wrote it"
            )
        layout = state_dict.get(prefix + "layout")
        if layout is not None and not layout.is_meta:
            if layout.shape[1:] != (len(LAYOUT),):
                raise ValueError(f"{prefix}layout: must be of {len(LAYOUT)} columns, got {tuple(layout.shape)}")
            unsaid, other_type = self._check_layout(layout.tolist(), prefix)
            if unsaid:
                logger.warning(
                    "tables %s: the state dict, of an earlier version, does not say which rows of a block are what "
                    "(hot, cold or medium); taken as those of this compression, unchecked",
                    [self._blueprint.tables[number].name for number in unsaid],
                )
            if unsaid or other_type:
                said = layout.clone()
                for number in unsaid + other_type:
                    said[number] = said.new_tensor(self.layout[number])
                state_dict[prefix + "layout"] = said

    def _check_layout(self, found: list[list[int]], prefix: str) -> tuple[list[int], list[int]]:
        """Raise as `check`; return tables of which an earlier version said less, and those of another data type."""
        if len(found) != len(self.layout):
            raise ValueError(f"{prefix}layout: must be of {len(self.layout)} tables, got {len(found)}")
        if found != self.layout and sorted(found) == sorted(self.layout):
            mine = [table.name for table in self._blueprint.tables]
            theirs = [mine[self.layout.index(each)] for each in found]
            raise ValueError(
                f"{prefix}layout: tables must stand in the order of the checkpoint, {theirs}, got {mine}; build the "
                "collection in that order, or name all tables in 'tables' where the checkpoint was converted"
            )
        unsaid, other_type = [], []
        for number, (table, theirs, ours) in enumerate(zip(self._blueprint.tables, found, self.layout, strict=True)):
            part = self._blueprint.parts[table.name].codes
            num_packed = 0 if part is None else part.num_packed
            if num_packed and theirs == self._fingerprints(table, CodePart(num_packed, torch.uint8)):
                name = f"{prefix.removesuffix('decoder.')}code_tables.banks.{table.name}.codes"
                raise ValueError(
                    f"table {table.name!r}: the checkpoint's codes must be packed, two in a byte, got one in a byte; "
                    f"put ops.pack_codes(codes) in place of its {name}, and this collection's {prefix}layout in place "
                    "of its own"
                )
            if theirs != ours and theirs == self._fingerprints(table, part, low_bit=""):
                raise ValueError(
                    f"table {table.name!r}: the checkpoint's low-bit rows must have scale and bias before the values, "
                    f"got them behind; put rows.roll({SCALE_BYTES}, dims=1) in place of its rows ({prefix}banks."
                    f"{table.name}.hot_rows, or the codes of int8 and int4), and this collection's {prefix}layout in "
                    "place of its own"
                )
            if theirs != ours and theirs == self._fingerprints(table, part, says_layout=False):
                unsaid.append(number)
                continue
            if theirs != ours and theirs in self._of_other_types(table):
                other_type.append(number)
                continue
            differ = [field for field, a, b in zip(LAYOUT, theirs, ours, strict=True) if a != b]
            if differ:
                raise ValueError(
                    f"table {table.name!r}: the checkpoint's {' and '.join(differ)} must be those of "
                    f"{self._blueprint.methods[table.name]} with seed {self._blueprint.seed}, got others; build the "
                    "collection with the compression, table sizes and seed that the checkpoint was saved with"
                )
        return unsaid, other_type

    def _of_other_types(self, table: BaseEmbeddingConfig) -> list[list[int]]:
        """Return the fingerprints of a table whose rows in tables of TorchRec's are of another data type."""
        parts, method = self._blueprint.parts[table.name], self._blueprint.methods[table.name]
        if not parts.native or parts.managed is not None:
            return []
        tables = [copy.copy(table) for _ in _NATIVE_TYPES]
        for each, data_type in zip(tables, _NATIVE_TYPES, strict=True):
            each.data_type = data_type
        others = [method.parts(each, self._blueprint.seed).native for each in tables]
        return [self._fingerprints(table, parts.codes, native=native) for native in others]

    def _fingerprints(
        self,
        table: BaseEmbeddingConfig,
        code_part: CodePart | None,
        low_bit: str = "scale first",
        says_layout: bool = True,
        native: Sequence[NativePart] | None = None,
    ) -> list[int]:
        """Return a hash of each `LAYOUT` field of a table with this code table and format of low-bit rows.

        Without `says_layout` as an earlier version did, which said nothing of the layout of a manager; `native` are
        its rows in tables of TorchRec's, where they are not what the table has.
        """
        parts = self._blueprint.parts[table.name]
        native = parts.native if native is None else native
        bank: TableDecoder | None = self._banks[table.name]
        tensors = [] if bank is None else [*bank.named_parameters(), *bank.named_buffers()]
        codes = None
        if code_part is not None:
            codes = (code_part.row_size, str(code_part.dtype), *([code_part.num_packed] * (code_part.num_packed > 0)))
            codes += () if code_part.num_coded is None else ("coded", code_part.num_coded)
        formats = [low_bit] if low_bit and bank is not None and bank.has_low_bit_rows else []
        decoder = self._blueprint.methods[table.name].shared_decoder(table)
        method = (
            codes is None,
            [(p.name, p.remap.kind, *([p.shared] * (p.shared is not None))) for p in native],
            [name for name, _ in tensors],
            *([] if decoder is None else [decoder.name]),
            *formats,
        )
        sizes = (
            (table.num_embeddings, table.embedding_dim, codes),
            [(p.num_embeddings, p.embedding_dim, p.remap.value, *_half(p)) for p in native],
            [(tuple(tensor.shape), str(tensor.dtype)) for _, tensor in tensors],
        )
        if parts.managed is not None:
            state = parts.managed.state()
            method += tuple(state)
            sizes += (parts.managed.blocks.num_blocks, [tuple(buffer.shape) for buffer in state.values()])
            sizes += (parts.managed.layout,) * says_layout
        if parts.trained is not None:
            method += ("trained",)
            sizes += (parts.trained.width, parts.trained.bits)
        return [zlib.crc32(repr(field).encode()) for field in (method, sizes, [p.remap.salt for p in native])]


@contextmanager
def noting_faults(collection: nn.Module) -> Iterator[None]:
    """Enclose the checks of a state dict, whose ValueError sharded parts note: all ranks raise it with the next batch.

    Other ranks may have loaded what this one has not.
    """
    sharded: list[Any] = [part for part in collection.modules() if isinstance(part, ShardedModule)]
    fault = None
    try:
        yield
    except ValueError as error:
        fault = str(error)
        raise
    finally:
        for part in sharded:
            part.load_fault = fault


def check_loaded_fit(module: nn.Module, state_dict: dict, prefix: str) -> None:
    """Raise ValueError where a parameter, or a manager's score, would be NaN or infinite; say what is rounded.

    Args:
        module: that is loaded.
        state_dict: of any other dtypes.
        prefix: of its names there.
    """
    rounded = []
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        found = state_dict.get(prefix + name)
        if isinstance(found, Tensor) and parameter.is_floating_point():
            dtype = shape_and_dtype(found)[1]
            if dtype.is_complex:
                raise ValueError(f"{prefix}{name}: must be real numbers, got {dtype}; load a checkpoint not damaged")
            if torch.promote_types(dtype, parameter.dtype) != parameter.dtype:
                rounded.append(name)
            for local, _ in local_shards(found):
                check_fits(prefix + name, local, parameter.dtype)
    if rounded:
        logger.warning("%s: the state dict has wider numbers than these, which are rounded as they are loaded", rounded)


def check_table(where: str, name: object, known: Collection[str], *states: object) -> None:
    """Raise ValueError unless something is the name of a table, and each of the others what a fit returns for one."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where}: must name one of {sorted(known)}, got {name!r}")
    for state in states:
        if not isinstance(state, TableState):
            raise ValueError(f"{where}: table {name!r}: must be given what a fit returns, got {type(state).__name__}")


def check_fits(where: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where values are NaN or infinite, or would be in the dtype of what they are copied to."""
    if not values.is_floating_point() or not dtype.is_floating_point or values.is_meta:
        return
    if not values.numel():
        return
    rows = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
    if (row := first_not_finite(rows)) is not None:
        raise ValueError(
            f"{where}: values must be finite, got NaN or infinity in row {row}; take a checkpoint from before the "
            "training or the fit went wrong"
        )
    if (found := first_infinite(rows, dtype)) is not None:
        raise ValueError(
            f"{where}: values must be in +-{torch.finfo(dtype).max:.0f} to be stored as {dtype}, got {found[1]:g} in "
            f"row {found[0]}; give the table data_type FP32"
        )


def check_scales(where: str, rows: Tensor) -> None:
    """Raise ValueError where a row of few bits has a scale or bias that is not finite.

    Args:
        where: names the rows in errors.
        rows: (n, bytes per row) uint8, as `ops.quantize_rows` makes them.
    """
    scales = rows[:, :SCALE_BYTES].contiguous().view(torch.float16)
    if (row := first_not_finite(scales)) is not None:
        raise ValueError(
            f"{where}: scales and biases of rows must be finite, got NaN or infinity in row {row}; make rows by "
            "ops.quantize_rows"
        )


def _half(part: NativePart) -> list[str]:
    """Return what tells a part in half precision from one in float32, of which nothing is said."""
    return [] if part.data_type == DataType.FP32 else [part.data_type.value]
