"""The parts that pooled and unpooled compressed collections are both made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress.methods import MethodConfig, TableState
from torchrec_compress.modules.blueprint import MANAGED, Blueprint
from torchrec_compress.modules.code_tables import CodeTableCollection
from torchrec_compress.modules.decoder import Decoder, decode_pooled
from torchrec_compress.modules.features import IdRange, check_here
from torchrec_compress.modules.footprint import Footprint, count
from torchrec_compress.modules.format import check_fits, check_loaded_fit, check_scales, check_table, noting_faults
from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.modules.outputs import output_dtype
from torchrec_compress.modules.partial_rows import some_rows
from torchrec_compress.modules.remapped import RemappedEmbeddingCollection, found_rows
from torchrec_compress.modules.replicated import strip_where_replicated
from torchrec_compress.modules.trained import TrainedCollection
from torchrec_compress.ops import NOT_SUMMED, TableRows, check_filled, check_ids, lookup_codes
from torchrec_compress.seams import shape_and_dtype

logger = logging.getLogger(__name__)


# where stock collections keep their tables
_STOCK = ("embedding_bags", "embeddings")


class CompressedParts(nn.Module):
    """Build, initialise, fill and measure the parts of a compressed collection; its heirs define the forward.

    Attributes:
        code_tables: code tables, or None.
        rows: groups of native tables whose rows come back unpooled.
        managed: tables with managers, or None.
        trained: tables of trained rows, or None.
        decoder: codebooks and other small parameters.
    """

    blueprint: Blueprint
    dense: Any  # a stock collection, what DistributedModelParallel puts in its place, or None
    _rows_kind: ClassVar[type[RemappedEmbeddingCollection]] = RemappedEmbeddingCollection
    _managed_kind: ClassVar[type[ManagedCollection]] = ManagedCollection
    _trained_kind: ClassVar[type[TrainedCollection]] = TrainedCollection

    def _build_shared(
        self, blueprint: Blueprint, is_weighted: bool, device: torch.device | None, will_fit: bool
    ) -> None:
        """Make the code tables, the unpooled native tables and the decoder."""
        self.blueprint, self._device = blueprint, torch.get_default_device() if device is None else torch.device(device)
        code_tables = blueprint.code_tables(will_fit)
        self.code_tables = CodeTableCollection(code_tables, device) if code_tables else None
        rows, managed = blueprint.rows(), blueprint.managed()
        self.rows = nn.ModuleDict({group: self._rows_kind(*members, device) for group, members in rows.items()})
        self.managed = self._managed_kind(managed, device) if managed else None
        trained = blueprint.trained()
        self.trained = self._trained_kind(trained, is_weighted, device) if trained else None
        self.decoder = Decoder(blueprint, is_weighted, device)
        for name, bank in self._code_banks().items():
            if name in self.decoder.banks:
                bank.stand_beside(self.decoder.banks[name])
        for group in self.rows.values():
            group.stand_beside(dict(self.decoder.banks.items()))  # type: ignore[operator]
        self.register_load_state_dict_post_hook(_check_loaded)

    def _unpooled_rows(self, features: Any) -> dict[str, Any]:
        """Return the rows of a batch by group, and by look-up key."""
        rows = {group: module(features) for group, module in self.rows.items()}
        if self.managed is not None:
            rows[MANAGED] = self.managed(features)
        return rows

    def _output_dtype(self) -> torch.dtype | None:
        """Return the dtype of embeddings that the sharders of the parts were told, or None."""
        parts = [self.code_tables, *self.rows.values(), self.managed, self.trained, getattr(self, "bags", None)]
        return output_dtype(parts, self.dense)

    def _code_banks(self) -> dict[str, Any]:
        """Return the code tables of this rank, whole or not, by table name."""
        return dict(self.code_tables.banks.items()) if self.code_tables is not None else {}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        with noting_faults(self):
            self._refuse_others(state_dict, prefix)  # before any part takes its tensors
            self.decoder.check_format(state_dict, prefix + "decoder.")
            check_loaded_fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedParts:
        # the last call before DistributedDataParallel wraps tables that no sharder has taken
        if type(self.dense) in (EmbeddingBagCollection, EmbeddingCollection):
            strip_where_replicated(self.dense)
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def _refuse_others(self, state_dict: dict, prefix: str) -> None:
        """Raise ValueError for anything but integers in place of integers; say which codes carry no mark."""
        for name, buffer in self.named_buffers():
            found = state_dict.get(prefix + name)
            if found is None or buffer.dtype.is_floating_point:
                continue
            if not isinstance(found, Tensor) or (type(found) is Tensor and found.is_sparse):
                got = "a sparse one" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{prefix}{name}: must be a dense tensor, got {got}; load a checkpoint not damaged")
            shape, dtype = shape_and_dtype(found)
            if dtype.is_floating_point or dtype.is_complex:
                raise ValueError(
                    f"{prefix}{name}: must be integers, got {dtype}, as a blend or an average of state dicts "
                    "holds; blend floating-point tensors alone, and take integers from one of them as they are"
                )
            # a vector of one is read as a number; a matrix of one is a shard of a table
            if tuple(buffer.shape) in ((), (1,)) and math.prod(shape) != 1:
                raise ValueError(f"{prefix}{name}: must be one integer, got {shape}; load a checkpoint not damaged")
        unmarked = []
        for name in self._code_banks():
            flag = state_dict.get(f"{prefix}code_tables.banks.{name}.is_set")
            if flag is not None and not flag.is_meta and int(flag) == NOT_SUMMED:
                unmarked.append(name)
        if unmarked:
            logger.warning(
                "tables %s: the state dict, of an earlier version, has no checksum of their codes; taken unchecked",
                unmarked,
            )

    def _guard_dense_tables(self, parts: Iterable[Any]) -> None:
        """Have the first part that exists check the ids of dense tables too; sharded, TorchRec would only warn."""
        ranges = [
            IdRange(lookup.table.name, lookup.feature, lookup.table.num_embeddings)
            for lookup in self.blueprint.lookups
            if self.blueprint.parts[lookup.table.name].dense
        ]
        for part in parts:
            if part is not None:
                part.also_checked = ranges
                break

    @property
    def device(self) -> torch.device:
        """The device that the collection was made on."""
        return self._device

    @property
    def seed(self) -> int:
        """The seed of start codes and hashes."""
        return self.blueprint.seed

    def __getattr__(self, name: str) -> Any:
        if name in _STOCK:
            kind = type(self).__name__
            raise AttributeError(
                f"{kind}: has no {name}, its tables are compressed; rows are read by table_rows(), all values by "
                "state_dict(). What shards stock collections alone, as TorchRec's sharders of managed collisions do, "
                "cannot shard it: remap ids in a module of its own, before the model"
            )
        return super().__getattr__(name)

    def table_configs(self) -> list[Any]:
        """Return the user's own configs, pooled or not; where one names no features, a copy that names them."""
        return self.blueprint.given

    def methods(self) -> dict[str, MethodConfig]:
        """Return the method of every table; those that compression would not shrink are dense."""
        return dict(self.blueprint.methods)

    def reset_parameters(self) -> None:
        """Initialise everything, start codes included; call it after materialising from the meta device."""
        for part in (self.code_tables, self.decoder, self.managed, self.trained):
            if part is not None:
                part.reset_parameters()
        for bank in self._code_banks().values():
            if bank.is_filled:
                bank.seal()  # over low-bit rows too, which the decoder has just reset
        for module in self.modules():
            if isinstance(module, EmbeddingBagCollection):
                for config in module.embedding_bag_configs():
                    _reset(module.embedding_bags[config.name].weight, config)
            elif isinstance(module, EmbeddingCollection):
                for config in module.embedding_configs():
                    _reset(module.embeddings[config.name].weight, config)

    @torch.no_grad()
    def load_table(self, name: str, state: TableState) -> None:
        """Fill one table with fitted tensors.

        Args:
            name: of the user's table.
            state: what `MethodConfig.fit` returned for it.

        Raises:
            ValueError: there is no such table, a tensor has the wrong name or shape or a value that is not finite, or
                the integers of a manager do not go together.
        """
        check_unsharded(self, "load_table")
        check_table("load_table", name, self.blueprint.methods, state)
        bank, mine = self._code_banks().get(name), self._stored(name)
        targets = {**mine.native, **mine.decoder, **mine.managed, **mine.trained}
        common = self.blueprint.common(name)
        shared = sorted(
            part.name
            for part in self.blueprint.parts[name].native
            if part.shared in common and part.name in state.native
        )
        shared += sorted(state.decoder) if self.blueprint.banks[name] != name else []
        if shared:
            raise ValueError(
                f"table {name!r}: parts {shared} are shared with other tables, which a fit of one must not overwrite; "
                "load a state dict, or train from the start values"
            )
        tensors = {**state.decoder, **state.native, **state.managed, **state.trained}
        for key, value in tensors.items():
            if key not in targets or targets[key].shape != value.shape:
                have = {part: tuple(tensor.shape) for part, tensor in targets.items()}
                raise ValueError(
                    f"table {name!r}: stored tensors are {have}, got {key!r} of shape {tuple(value.shape)}"
                )
            check_fits(f"table {name!r}, {key!r}", value, targets[key].dtype)
            if key in ("codebooks", "hot_rows") and targets[key].dtype == torch.uint8:
                check_scales(f"table {name!r}, {key!r}", value)
        if state.codes is not None:
            if bank is None:
                raise ValueError(
                    f"table {name!r}: must be stored as codes to be given some, got {self.methods()[name]}"
                )
            is_low_bit = name in self.decoder.banks and getattr(self.decoder.banks[name], "row_dtype", None)
            if is_low_bit and state.codes.shape == bank.codes.shape:
                check_scales(f"table {name!r}, 'codes'", state.codes)
            bank.load(state.codes)
        elif bank is not None:
            bank.check()  # what stays is marked anew below
        for key, value in tensors.items():
            targets[key].copy_(value)
        if state.trained:
            assert self.trained is not None
            self.trained.banks[name].forget()
            self.trained.banks[name].note()
        if state.managed and self.managed is not None:
            self.managed.managers[name].forget_writes()
            self.managed.check_integers(name)
        if bank is not None and bank.is_filled:
            bank.seal()

    def table_state(self, name: str) -> TableState:
        """Return the stored tensors of one table as `load_table` takes them: the collection's own, no copies.

        Args:
            name: of the user's table.

        Raises:
            ValueError: the collection is sharded, there is no such table, or something has changed its integers.
            RuntimeError: its codes were never filled.
        """
        check_unsharded(self, "table_state")
        check_table("table_state", name, self.blueprint.methods)
        bank = self._code_banks().get(name)
        if bank is not None:
            check_filled(bank.is_set, f"table {name!r}")
            bank.check()
        return self._stored(name)

    def state_names(self, name: str) -> dict[tuple[str, str], str]:
        """Return what a state dict calls the tensors of a table's state, by field and name there; on meta too."""
        names = {id(tensor): key for key, tensor in [*self.named_parameters(), *self.named_buffers()]}
        state = self._stored(name)
        found = {} if state.codes is None else {("codes", ""): names[id(state.codes)]}
        for field in ("decoder", "native", "managed", "trained"):
            found |= {(field, part): names[id(tensor)] for part, tensor in getattr(state, field).items()}
        return found

    def _stored(self, name: str) -> TableState:
        bank, decoder, managed, trained = self._code_banks().get(name), {}, {}, {}
        if (owner := self.decoder.bank(name)) is not None:
            decoder = dict(owner.named_parameters()) | dict(owner.named_buffers())
        if self.managed is not None and name in self.managed.managers:
            managed = dict(self.managed.managers[name].named_buffers())
        if self.trained is not None and name in self.trained.banks:
            trained = {"rows": self.trained.banks[name].rows}
        codes = None if bank is None else bank.codes
        return TableState(codes, decoder, dict(self._native_weights(name)), managed, trained)

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """Return the rows that one table serves for ids, without a batch around them.

        Args:
            name: of the user's table.
            ids: (L,) int64 in [0, N).

        Returns:
            (L, D) float32.

        Raises:
            ValueError: there is no such table, the collection is sharded, or ids are no such integers.
        """
        check_unsharded(self, "table_rows")
        check_table("table_rows", name, self.blueprint.methods)
        check_here(ids, self.decoder.on_meta, f"table_rows: table {name!r}")
        (table,) = [table for table in self.blueprint.tables if table.name == name]
        check_ids(ids, table.num_embeddings, f"table_rows: table {name!r}")
        parts, weights = self.blueprint.parts[name], dict(self._native_weights(name))
        decoder = self.decoder.bank(name)
        if parts.dense:
            return weights[""][ids].float()
        if parts.bags:
            places = None if decoder is None else decoder._buffers.get("places")
            if decoder is not None and places is not None:
                decoder.make_ready(f"table {name!r}")
            bags = [some_rows(weights[part.name], part.remap(ids, places)) for part in parts.bags]
            return bags[0] if decoder is None else decode_pooled(decoder, bags).float()
        if parts.trained is not None:
            assert self.trained is not None
            bag = self.trained.banks[name].served(ids)
            return bag if decoder is None else decode_pooled(decoder, [bag]).float()
        if parts.managed is not None:
            assert self.managed is not None
            return decoder(ids, None, None, None, [self.managed.served(name, ids)]).float()
        codes = None
        if parts.codes is not None:
            assert self.code_tables is not None
            bank = self.code_tables.banks[name]
            bank.check()
            self.code_tables.warn_of_start_codes(name)
            codes = lookup_codes(bank.codes, bank.is_set, bank.row_numbers(ids), f"table {name!r}")  # type: ignore[arg-type]
        rows = [found_rows(TableRows(weights[part.name], part.remap(ids))) for part in parts.rows]
        return decoder(ids, None, None, codes, rows).float()

    def footprint(self) -> Footprint:
        """Return the bytes of all tables, counted over the real tensors (on the meta device too).

        Sharded, it is the same on every rank: one copy of every table, whichever ranks hold its rows. No rank waits.

        Raises:
            ValueError: a part of a table was replaced by a module that stores it under other names.
        """
        return count(self.state_dict(), self.blueprint)

    def _native_weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (part name, weight) of a table's native parts; the dense table's part is ""."""
        physical = {"": name} if self.blueprint.parts[name].dense else self.blueprint.native_names(name)
        for part, table in physical.items():
            for module in self.modules():
                if isinstance(module, EmbeddingBagCollection) and table in module.embedding_bags:
                    yield part, module.embedding_bags[table].weight  # type: ignore[misc]
                elif isinstance(module, EmbeddingCollection) and table in module.embeddings:
                    yield part, module.embeddings[table].weight  # type: ignore[misc]


def as_device(device: Any, where: str) -> torch.device | None:
    """Return a device that is given as one or by its name, or None; `where` names the caller.

    Raises:
        ValueError: it is something else, or no device's name.
    """
    if device is None or isinstance(device, torch.device):
        return device
    try:
        if isinstance(device, str):
            return torch.device(device)
    except RuntimeError:  # torch lists its devices
        pass
    told = "; pass is_weighted and need_indices by name" if isinstance(device, bool) else ""
    raise ValueError(f"{where}: device must be a torch.device or its name, got {device!r}{told}")


def check_unsharded(collection: CompressedParts, where: str) -> None:
    """Raise ValueError where parts are sharded, so that this rank may hold some rows only; `where` names the caller."""
    sharded = sorted(path for path, part in collection.named_modules() if isinstance(part, ShardedModule))
    if sharded:
        raise ValueError(
            f"{where}: collection must not be sharded, got sharded {sharded}; load its state dict into an unsharded one"
        )


def _check_loaded(module: CompressedParts, incompatible: Any) -> None:
    """After a whole collection is loaded: raise where its integers are not those that were saved, or do not fit.

    Sharded, ranks must sum them up together, which they do before the next look-up.
    """
    is_whole = isinstance(module.code_tables, CodeTableCollection)
    if is_whole and not any("code_tables." in name or "decoder." in name for name in incompatible.missing_keys):
        for bank in module._code_banks().values():
            bank.check()
    if isinstance(module.managed, ManagedCollection):
        for name in module.managed.managers:
            module.managed.check_integers(name)


def _reset(weight: Any, config: BaseEmbeddingConfig) -> None:
    if weight.device.type != "meta":
        assert config.init_fn is not None  # set by TorchRec's own config where the user gave none
        config.init_fn(weight)
