"""The decoder of a collection: everything small and replicated, from codes and native rows to embeddings."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import process_pooled_embeddings, reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.methods.base import CodePart
from torchrec_compress.methods.codebook import CodebookDecoder
from torchrec_compress.methods.lowbit import LowBitDecoder
from torchrec_compress.modules.backward import strip_where_replicated
from torchrec_compress.modules.codes import Codes, pool_codes, pool_low_bit, row_codes, unpooled_codes
from torchrec_compress.modules.features import split_features
from torchrec_compress.modules.plan import CollectionPlan, Lookup
from torchrec_compress.modules.tables import FoundRows, found_rows
from torchrec_compress.ops import SCALE_BYTES, BagLookup, keep_integers

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")
torch.fx.wrap("bag_means")
torch.fx.wrap("found_rows")
torch.fx.wrap("interleave_columns")
torch.fx.wrap("pool_codes")
torch.fx.wrap("pool_low_bit")
torch.fx.wrap("row_codes")
torch.fx.wrap("split_features")
torch.fx.wrap("unpooled_codes")

FORMAT_VERSION = 1
# what a checkpoint and a collection must agree on, table by table; their fingerprints are stored
LAYOUT = ("method", "sizes", "seed")


def bag_means(sums: Tensor, lengths: Tensor) -> Tensor:
    """Divide the sums of bags, (B, D), by their lengths, (B,); an empty bag stays zeros."""
    return sums / lengths.clamp(min=1).unsqueeze(1)


def interleave_columns(first: Tensor, second: Tensor, is_first: list[bool], widths: list[int]) -> Tensor:
    """Merge the columns of look-ups, `widths` each, of which (B, .) `first` and `second` hold some each, in order."""
    parts = {
        of_first: iter(
            values.split([width for width, mine in zip(widths, is_first, strict=True) if mine == of_first], dim=1)
        )
        for of_first, values in ((True, first), (False, second))
    }
    return torch.cat([next(parts[mine]) for mine in is_first], dim=1)


class Decoder(nn.Module):
    """Decode the look-ups of all tables that have a decoder.

    Attributes:
        banks: the table decoders by table name.
        format_version: buffer, (1,) int64: version of the state dict's format.
        layout: buffer, (tables, 3) int64: fingerprints of what each table is stored as, see `LAYOUT`.
    """

    def __init__(self, plan: CollectionPlan, is_weighted: bool, device: torch.device | None) -> None:
        super().__init__()
        self._plan, self._is_weighted = plan, is_weighted
        self.banks: Any = nn.ModuleDict()  # Any: a ModuleDict forgets the type of its values
        for table in plan.tables:
            bank = plan.methods[table.name].decoder(table, device)
            if bank is not None:
                self.banks[table.name] = bank
        self.register_buffer("format_version", torch.full((1,), FORMAT_VERSION, device=device))
        self._layout = [self._fingerprints(table, plan.parts[table.name].codes) for table in plan.tables]
        self.register_buffer("layout", torch.tensor(self._layout, dtype=torch.int64, device=device))
        self._decoded = [lookup for lookup in plan.lookups if lookup.table.name in self.banks]
        self._is_coded = [isinstance(self.banks[lookup.table.name], CodebookDecoder) for lookup in self._decoded]
        coded = [lookup for lookup, mine in zip(self._decoded, self._is_coded, strict=True) if mine]
        self._others = [lookup for lookup, mine in zip(self._decoded, self._is_coded, strict=True) if not mine]
        self._coded_keys = [lookup.key for lookup in coded]
        self._coded_tables = list(dict.fromkeys(lookup.table.name for lookup in coded))
        self._bag_lookups = [
            BagLookup(
                self._coded_tables.index(lookup.table.name),
                lookup.feature,
                _where(lookup),
                self.banks[lookup.table.name].structure,
                _is_mean(lookup.table),
                self.banks[lookup.table.name].num_packed,
            )
            for lookup in coded
        ]

    @property
    def lookups(self) -> list[Lookup]:
        """The look-ups that this module decodes, in the order of its outputs."""
        return self._decoded

    def reset_parameters(self) -> None:
        """Initialise every table's decoder; call it after materialising from the meta device."""
        for bank in self.banks.values():
            bank.reset_parameters()  # type: ignore[operator]
        self._write_constants()

    def _fingerprints(
        self, table: BaseEmbeddingConfig, code_part: CodePart | None, low_bit: str = "scale first"
    ) -> list[int]:
        """Return a hash of each `LAYOUT` field of a table with this code table and format of low-bit rows."""
        parts = self._plan.parts[table.name]
        native = parts.native
        bank = self.banks[table.name] if table.name in self.banks else nn.Module()
        tensors = [*bank.named_parameters(), *bank.named_buffers()]
        codes = None
        if code_part is not None:
            codes = (code_part.row_size, str(code_part.dtype), *([code_part.num_packed] * (code_part.num_packed > 0)))
        formats = [low_bit] if low_bit and getattr(bank, "has_low_bit_rows", False) else []
        method = (codes is None, [(p.name, p.remap.kind) for p in native], [name for name, _ in tensors], *formats)
        sizes = (
            (table.num_embeddings, table.embedding_dim, codes),
            [(p.num_embeddings, p.embedding_dim, p.remap.value) for p in native],
            [(tuple(tensor.shape), str(tensor.dtype)) for _, tensor in tensors],
        )
        if parts.managed is not None:
            state = parts.managed.state()
            method += tuple(state)
            sizes += (parts.managed.blocks.num_blocks, [tuple(buffer.shape) for buffer in state.values()])
        return [zlib.crc32(repr(field).encode()) for field in (method, sizes, [p.remap.salt for p in native])]

    def _write_constants(self) -> None:
        """Restore the buffers that never change; DistributedModelParallel takes them off the meta device as zeros."""
        if self.format_version.device.type != "meta":
            self.format_version.fill_(FORMAT_VERSION)  # type: ignore[operator]
            self.layout.copy_(torch.tensor(self._layout))  # type: ignore[operator]

    def replicated_tensors(self) -> dict[str, Tensor]:
        """Return the codebooks, hot rows and other two-dimensional tensors by "table.tensor"."""
        tensors = [*self.banks.named_parameters(), *self.banks.named_buffers()]
        return {name: tensor for name, tensor in tensors if tensor.dim() == 2}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        # the last call before DistributedDataParallel wraps a decoder that no sharder of ours has seen
        strip_where_replicated(self)
        return super()._apply(keep_integers(fn, "decoder"), recurse)  # type: ignore[return-value]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self._write_constants()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def check_format(self, state_dict: dict, prefix: str) -> None:
        """Raise ValueError when a state dict was written by another version, or for tables stored otherwise."""
        found = state_dict.get(prefix + "format_version")
        if found is not None and int(found) != FORMAT_VERSION:
            raise ValueError(
                f"{prefix}format_version: must be {FORMAT_VERSION}, got {int(found)}; "
                "convert the checkpoint, or load it with the release that wrote it"
            )
        layout = state_dict.get(prefix + "layout")
        if layout is not None:
            self._check_layout(layout.tolist(), prefix)

    def _check_layout(self, found: list[list[int]], prefix: str) -> None:
        if len(found) != len(self._layout):
            raise ValueError(f"{prefix}layout: must be of {len(self._layout)} tables, got {len(found)}")
        for table, theirs, ours in zip(self._plan.tables, found, self._layout, strict=True):
            part = self._plan.parts[table.name].codes
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
            differ = [field for field, a, b in zip(LAYOUT, theirs, ours, strict=True) if a != b]
            if differ:
                raise ValueError(
                    f"table {table.name!r}: the checkpoint's {' and '.join(differ)} must be those of "
                    f"{self._plan.methods[table.name]} with seed {self._plan.seed}, got others; build the collection "
                    "with the compression, table sizes and seed that the checkpoint was saved with"
                )

    def forward(
        self, features: KeyedJaggedTensor, codes: dict[str, Codes] | None, rows: dict[str, dict[str, FoundRows]]
    ) -> Tensor:
        """Return the pooled embeddings of all look-ups, side by side.

        Args:
            features: the batch; its weights, if any, are taken as they are.
            codes: by look-up key a whole code table, or (L, row_size) integer codes of its ids; None without any.
            rows: per group of native tables, (L, width) by look-up key, or where they are.

        Returns:
            (B, sum of widths).
        """
        coded = None
        if self._bag_lookups:
            coded = pool_codes(features, self._bag_lookups, *self._coded(codes), self._is_weighted)
        if coded is not None and not self._others:
            return coded
        jagged = split_features(features)
        pooled = []
        for lookup in self._others:
            bags = jagged[lookup.feature]
            weights = bags.weights() if self._is_weighted else None
            sums = self._decode(lookup, bags.values(), bags.offsets(), weights, codes, rows)
            pooled.append(bag_means(sums, bags.lengths()) if _is_mean(lookup.table) else sums)
        inverse = reorder_inverse_indices(
            inverse_indices=features.inverse_indices_or_none(),
            feature_names=[lookup.feature for lookup in self._others],
        )
        decoded = process_pooled_embeddings(pooled_embeddings=pooled, inverse_indices=inverse)
        if coded is None:
            return decoded
        widths = [lookup.table.embedding_dim for lookup in self._decoded]
        return interleave_columns(coded, decoded, self._is_coded, widths)

    def unpooled(
        self, features: KeyedJaggedTensor, codes: dict[str, Codes] | None, rows: dict[str, dict[str, FoundRows]]
    ) -> list[Tensor]:
        """Return one (L, D) per look-up; arguments as in `forward`."""
        coded = unpooled_codes(features, self._bag_lookups, *self._coded(codes)) if self._bag_lookups else []
        jagged = split_features(features)
        numbers = iter(range(len(self._bag_lookups)))
        return [
            coded[next(numbers)]
            if mine
            else self._decode(lookup, jagged[lookup.feature].values(), None, None, codes, rows)
            for lookup, mine in zip(self._decoded, self._is_coded, strict=True)
        ]

    def _coded(self, codes: dict[str, Codes] | None) -> tuple[list[Codes], list[Tensor], list[Tensor | None]]:
        """Return the codes of every look-up of codes, and the codebooks and hot rows of their tables."""
        assert codes is not None
        banks = [self.banks[name] for name in self._coded_tables]
        found = [codes[key] for key in self._coded_keys]
        return found, [bank.codebooks for bank in banks], [bank.hot_rows for bank in banks]

    def _decode(
        self,
        lookup: Lookup,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        codes: dict[str, Codes] | None,
        rows: dict[str, dict[str, FoundRows]],
    ) -> Tensor:
        table = lookup.table.name
        bank = self.banks[table]
        if isinstance(bank, LowBitDecoder):
            assert codes is not None
            return pool_low_bit(codes[lookup.key], bank.dtype, ids, offsets, weights, _where(lookup))
        found = None
        if codes is not None and self._plan.parts[table].codes is not None:
            found = row_codes(codes[lookup.key], ids, _where(lookup))
        native = [found_rows(rows[group][lookup.key]) for group in self._plan.row_groups(table)]
        return bank(ids, offsets, weights, found, native)


def _is_mean(table: BaseEmbeddingConfig) -> bool:
    return isinstance(table, EmbeddingBagConfig) and table.pooling == PoolingType.MEAN


def _where(lookup: Lookup) -> str:
    return f"table {lookup.table.name!r}, feature {lookup.feature!r}"
