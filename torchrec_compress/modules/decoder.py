"""The decoder of a collection: everything small and replicated, from codes and native rows to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import process_pooled_embeddings, reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.methods import Parts
from torchrec_compress.modules.blueprint import Blueprint, Lookup
from torchrec_compress.modules.codes import Codes, pool_codes, pool_low_bit, row_codes, unpooled_codes
from torchrec_compress.modules.features import split_features
from torchrec_compress.modules.format import FORMAT_VERSION, StateFormat
from torchrec_compress.modules.remapped import FoundRows, found_rows
from torchrec_compress.modules.replicated import strip_where_replicated
from torchrec_compress.modules.turn import Turn
from torchrec_compress.ops import BagLookup, keep_integers

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")
torch.fx.wrap("bag_means")
torch.fx.wrap("found_rows")
torch.fx.wrap("interleave_columns")
torch.fx.wrap("pool_codes")
torch.fx.wrap("pool_low_bit")
torch.fx.wrap("project")
torch.fx.wrap("project_columns")
torch.fx.wrap("row_codes")
torch.fx.wrap("split_features")
torch.fx.wrap("unpooled_codes")


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


def project(parts: Sequence[Tensor], projections: Sequence[Tensor | None]) -> list[Tensor]:
    """Multiply the values of look-ups, (., width) each, by their projections, (width, D); None leaves them."""
    pairs = zip(parts, projections, strict=True)
    return [part if projection is None else part @ projection for part, projection in pairs]


def project_columns(pooled: Tensor, widths: list[int], projections: Sequence[Tensor | None]) -> Tensor:
    """Do the same to the columns of look-ups side by side, `widths` each."""
    return torch.cat(project(pooled.split(widths, dim=1), projections), dim=1)


class Decoder(nn.Module):
    """Decode the look-ups of all tables that have a decoder.

    Attributes:
        banks: the table decoders by table name, shared ones by their own, see `bank`.
        format_version: buffer, (1,) int64: version of the state dict's format.
        layout: buffer, (tables, 3) int64: fingerprints of what each table is stored as, see `LAYOUT`.
    """

    def __init__(self, blueprint: Blueprint, is_weighted: bool, device: torch.device | None) -> None:
        super().__init__()
        self.blueprint, self._is_weighted = blueprint, is_weighted
        self.banks: Any = nn.ModuleDict()  # Any: a ModuleDict forgets the type of its values
        for table in blueprint.tables:
            name = blueprint.banks[table.name]
            bank = self.banks[name] if name in self.banks else blueprint.methods[table.name].decoder(table, device)
            if bank is not None:
                self.banks[name] = bank
            else:
                _check_is_embedding(table, blueprint.parts[table.name])
        self._format = StateFormat(blueprint, {table.name: self.bank(table.name) for table in blueprint.tables})
        self.register_buffer("format_version", torch.full((1,), FORMAT_VERSION, device=device))
        self.register_buffer("layout", torch.tensor(self._format.layout, dtype=torch.int64, device=device))
        mine = [lookup for lookup in blueprint.lookups if self.bank(lookup.table.name) is not None]
        self._decoded = [lookup for lookup in mine if not blueprint.parts[lookup.table.name].are_bags]
        self._bagged = [
            lookup
            for lookup in blueprint.lookups
            for parts in (blueprint.parts[lookup.table.name],)
            if parts.trained is not None or (parts.are_bags and self.bank(lookup.table.name) is not None)
        ]
        self._bag_lookups: list[BagLookup] = []
        self._coded_keys: list[str] = []
        self._coded_tables: list[str] = []
        self._coded_widths: list[int] = []  # before any projection
        self._is_projected = False
        self._is_coded: list[bool] = []
        self._others: list[Lookup] = []
        self._turns: dict[str, Turn] = {}
        for lookup in self._decoded:
            bag = self._bag_lookup(lookup)
            self._is_coded.append(bag is not None)
            if bag is None:
                self._others.append(lookup)
            else:
                self._bag_lookups.append(bag)
                self._coded_keys.append(lookup.key)
                projection = self.banks[lookup.table.name].projection
                self._coded_widths.append(lookup.table.embedding_dim if projection is None else len(projection))
                self._is_projected |= projection is not None

    def _bag_lookup(self, lookup: Lookup) -> BagLookup | None:
        """Return the look-up of codes that a table's decoder shares with others, or None where it decodes by itself."""
        name, tables = lookup.table.name, self._coded_tables
        number = tables.index(name) if name in tables else len(tables)
        found = self.banks[name].bag_lookup(number, lookup.feature, _where(lookup), _is_mean(lookup.table))
        if found is not None and number == len(tables):
            tables.append(name)
        return found

    def bank(self, table: str) -> Any:
        """Return the decoder of one of the user's tables, shared or its own, or None."""
        name, has = self.blueprint.banks[table], self.banks.keys()
        return self.banks[name] if name in has else None

    @property
    def lookups(self) -> list[Lookup]:
        """The look-ups that `forward` and `unpooled` decode, in the order of their outputs."""
        return self._decoded

    @property
    def on_meta(self) -> bool:
        """Whether tables have no values yet."""
        return self.get_buffer("layout").is_meta

    @property
    def bagged(self) -> list[Lookup]:
        """The look-ups that `decode_bags` returns."""
        return self._bagged

    def reset_parameters(self) -> None:
        """Initialise every table's decoder; call it after materialising from the meta device."""
        for bank in self.banks.values():
            bank.reset_parameters()  # type: ignore[operator]
        self._write_constants()

    def _write_constants(self) -> None:
        """Restore the buffers that never change; DistributedModelParallel takes them off the meta device as zeros."""
        if self.format_version.device.type != "meta":
            self.format_version.fill_(FORMAT_VERSION)  # type: ignore[operator]
            self.layout.copy_(torch.tensor(self._format.layout))  # type: ignore[operator]

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
        self._format.check(state_dict, prefix)

    def forward(
        self,
        features: KeyedJaggedTensor,
        codes: dict[str, Codes] | None,
        rows: dict[str, dict[str, FoundRows]],
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
            if self._is_projected:
                coded = project_columns(coded, self._coded_widths, self._projections())
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
        self,
        features: KeyedJaggedTensor,
        codes: dict[str, Codes] | None,
        rows: dict[str, dict[str, FoundRows]],
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Return one (L, D) per look-up; arguments as in `forward`.

        `dtype` is what the caller casts to, None for any: rows of codes are cast call by call, so that those of a whole
        batch never lie there in float32.
        """
        coded = []
        if self._bag_lookups:
            wanted = None if self._is_projected else dtype
            coded = unpooled_codes(features, self._bag_lookups, *self._coded(codes), wanted)
        if self._is_projected:
            coded = project(coded, self._projections())
        jagged = split_features(features)
        numbers = iter(range(len(self._bag_lookups)))
        return [
            coded[next(numbers)]
            if mine
            else self._decode(lookup, jagged[lookup.feature].values(), None, None, codes, rows)
            for lookup, mine in zip(self._decoded, self._is_coded, strict=True)
        ]

    def decode_bags(self, bags: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the embeddings of the tables that are decoded after they were pooled, by look-up key.

        Args:
            bags: (B, width), or unpooled (L, width), by the keys of native look-ups.
            trained: the same, of tables of trained rows; those without a decoder are returned as they are.
        """
        found = {}
        for lookup in self._bagged:
            name = lookup.table.name
            source = bags if self.blueprint.parts[name].trained is None else trained
            mine = [source[key] for key in self.blueprint.bag_keys(lookup)]
            bank = self.bank(name)
            found[lookup.key] = mine[0] if bank is None else decode_pooled(bank, mine)
        return found

    def _coded(self, codes: dict[str, Codes] | None) -> tuple[list[Codes], list[Tensor], list[Tensor | None]]:
        """Return the codes of every look-up of codes, and the codewords and hot rows of their tables."""
        assert codes is not None
        banks = [self.banks[name] for name in self._coded_tables]
        found = [codes[key] for key in self._coded_keys]
        return found, [bank.codewords() for bank in banks], [bank.hot_rows for bank in banks]

    def _projections(self) -> list[Tensor | None]:
        """Return the projection of every look-up of codes, or None."""
        return [self.banks[self._coded_tables[lookup.table]].projection for lookup in self._bag_lookups]

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
        if bank.row_dtype is not None:
            assert codes is not None
            return pool_low_bit(codes[lookup.key], bank.row_dtype, ids, offsets, weights, _where(lookup))
        found = None
        if codes is not None and self.blueprint.parts[table].codes is not None:
            found = row_codes(codes[lookup.key], ids, _where(lookup))
        native = [found_rows(rows[group][key]) for group, key in self.blueprint.found_rows(lookup)]
        decoded = bank(ids, offsets, weights, found, native)
        part = self.blueprint.parts[table].codes
        if part is not None and part.manager is not None and self.training and torch.is_grad_enabled():
            self._watch(table, decoded)
        return decoded

    def _watch(self, table: str, decoded: Tensor) -> None:
        """Have a look-up's backward come within its step, whose end must be told: codes may change there.

        Raises:
            RuntimeError: long after the last end that was told; in the backward, where one came before it.
            ValueError: it is traced in training.
        """
        if torch.compiler.is_compiling():
            return
        if isinstance(decoded, torch.fx.Proxy):
            raise ValueError(
                f"table {table!r}: a table whose codes change must be traced in evaluation mode, got it in training; "
                "call eval() first"
            )
        turn = self._turns.setdefault(table, Turn())
        turn.check_told(table, len(self.blueprint.by_table[table]))
        if decoded.requires_grad:
            decoded.register_hook(partial(_note_backward, table, turn))

    def end_turn(self, table: str) -> None:
        """Note that a step has ended, so that codes may have changed."""
        if table in self._turns:
            self._turns.pop(table).is_over = True

    def discard_turn(self, table: str) -> None:
        """Forget the look-ups since the last step."""
        if table in self._turns:
            self._turns.pop(table).is_discarded = True


def _note_backward(table: str, turn: Turn, _gradients: Tensor) -> None:
    turn.check_open(table)
    turn.backwards += 1


def decode_pooled(bank: nn.Module, bags: list[Tensor]) -> Tensor:
    """Return the embeddings, (B, D), of pooled bags, (B, width) each, cast to what the decoder's parameters are."""
    dtype = next((parameter.dtype for parameter in bank.parameters()), torch.float32)
    return bank([bag.to(dtype) for bag in bags])


def _check_is_embedding(table: BaseEmbeddingConfig, parts: Parts) -> None:
    """Raise ValueError where bags without a decoder are not the embedding already."""
    widths = {part.name: part.embedding_dim for part in parts.bags}
    if parts.trained is not None:
        widths["trained"] = parts.trained.width
    if parts.are_bags and [*widths.values()] != [table.embedding_dim]:
        raise ValueError(
            f"table {table.name!r}: a method without a decoder must have one bag of width {table.embedding_dim}, got "
            f"{widths}; return a BagDecoder"
        )


def _is_mean(table: BaseEmbeddingConfig) -> bool:
    return isinstance(table, EmbeddingBagConfig) and table.pooling == PoolingType.MEAN


def _where(lookup: Lookup) -> str:
    return f"table {lookup.table.name!r}, feature {lookup.feature!r}"
