"""The stored parts of compressed tables: code tables, and native tables whose ids are rewritten."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_compress.methods.base import CodePart, Remap
from torchrec_compress.modules.backward import strip_where_replicated
from torchrec_compress.modules.features import IdRange, split_features
from torchrec_compress.ops import Rows, TableRows, check_ids

logger = logging.getLogger(__name__)

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("remap_features")
torch.fx.wrap("remapped_ids")
torch.fx.wrap("split_features")


FoundRows = JaggedTensor | TableRows


@dataclass(frozen=True)
class CodeTableConfig:
    """One code table.

    Args:
        name: of the user's table.
        num_embeddings: rows, N.
        part: width, dtype and start codes.
        feature_names: features that look it up.
        output_names: the key of each feature's codes in the output.
    """

    name: str
    num_embeddings: int
    part: CodePart
    feature_names: tuple[str, ...]
    output_names: tuple[str, ...]


class CodeBank(nn.Module):
    """One code table's tensors.

    Attributes:
        codes: buffer, (N, row_size) integer.
        is_set: buffer, (1,) uint8; zero until start codes, a fit or a checkpoint has filled the table.
    """

    def __init__(self, config: CodeTableConfig, device: torch.device | None) -> None:
        super().__init__()
        self._config = config
        part = config.part
        shape = (config.num_embeddings, part.row_size)
        self.register_buffer("codes", torch.zeros(shape, dtype=part.dtype, device=device))
        self.register_buffer("is_set", torch.zeros(1, dtype=torch.uint8, device=device))
        self.codes: Tensor
        self.is_set: Tensor
        self.awaits_reset = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table with its start codes, where the method has any."""
        start = self._config.part.start
        codes, is_set = self._buffers["codes"], self._buffers["is_set"]  # past the attributes that fx records
        assert codes is not None and is_set is not None
        if start is None or codes.is_meta:
            return
        codes.copy_(start(torch.arange(self._config.num_embeddings, device=codes.device)))
        is_set.fill_(1)
        self.awaits_reset = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeBank:
        was_meta = self.codes.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.codes.is_meta:
            self.is_set.zero_()  # to_empty() leaves garbage, which might read as "filled"
            self.awaits_reset = True  # and leaves it in the codebooks too, so that start codes alone would not do
        return self

    @torch.no_grad()
    def load(self, codes: Tensor) -> None:
        """Replace the codes: (N, row_size) integer, values as the method made them."""
        if codes.shape != self.codes.shape:
            raise ValueError(
                f"code table {self._config.name!r}: codes must have shape {tuple(self.codes.shape)}, "
                f"got {tuple(codes.shape)}"
            )
        self.codes.copy_(codes)
        self.is_set.fill_(1)


class CodeTable(NamedTuple):
    """A whole code table, where nobody has gathered the codes of a batch: its decoder does, while it decodes."""

    codes: Tensor
    is_set: Tensor


class CodeTableCollection(nn.Module):
    """Hold code tables: integers, never trained by gradient. Its sharded form gathers the codes of a batch.

    Args:
        tables: one config per code table.
        device: of the buffers.

    Attributes:
        also_checked: ids of dense tables beside it, which its sharded form checks before any rank waits for another.
    """

    also_checked: Sequence[IdRange] = ()

    def __init__(self, tables: Sequence[CodeTableConfig], device: torch.device | None = None) -> None:
        super().__init__()
        self._configs = tuple(tables)
        # not "tables": TorchRec 1.9's planner calls an attribute of that name
        # Any: a ModuleDict forgets the type of its values
        self.banks: Any = nn.ModuleDict({table.name: CodeBank(table, device) for table in tables})
        self._is_checked = False
        self.register_forward_pre_hook(_check_once)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeTableCollection:
        self._is_checked = False
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def configs(self) -> tuple[CodeTableConfig, ...]:
        """Return the configs of the code tables."""
        return self._configs

    def reset_parameters(self) -> None:
        """Fill every table with its start codes; call it after materialising from the meta device."""
        for bank in self.banks.values():
            bank.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, CodeTable]:
        """Return the code table of every feature by output name; (L, row_size) codes of its ids, once sharded."""
        found = {}
        for config, bank in zip(self._configs, self.banks.values(), strict=True):
            table = CodeTable(bank.codes, bank.is_set)
            found |= dict.fromkeys(config.output_names, table)
        return found


def _check_once(module: CodeTableCollection, _: Any) -> None:
    """Before the first batch: fill tables that DistributedModelParallel took off the meta device, warn of whole copies.

    It turns meta buffers into zeros and calls `reset_parameters` on modules with parameters only, as codebooks are.
    """
    if module._is_checked or torch.compiler.is_compiling():
        return
    module._is_checked = True
    for bank in module.banks.values():
        is_set = bank._buffers["is_set"]
        if not is_set.is_meta and not bank.awaits_reset and not bool(is_set):
            bank.reset_parameters()
    _warn_of_missing_sharders([config.name for config in module.configs()], "code tables are whole on every rank")


def _warn_of_missing_sharders(tables: list[str], effect: str) -> None:
    """Log, when there are several ranks, that TorchRec was not given the sharders of compressed collections."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        logger.warning(
            "tables %s: %s; pass sharders=torchrec_compress.get_default_sharders() to the planner and to "
            "DistributedModelParallel",
            sorted(set(tables)),
            effect,
        )


@dataclass(frozen=True)
class RemappedFeature:
    """One look-up of a native table.

    Args:
        feature: the user's feature.
        key: the name that the rewritten feature gets, unique over the collection.
        num_embeddings: rows of the user's table, the range of the ids.
        remap: from ids to rows of the native table.
        table: the user's table.
        native_table: the native table.
    """

    feature: str
    key: str
    num_embeddings: int
    remap: Remap
    table: str
    native_table: str


def remapped_ids(features: KeyedJaggedTensor, plan: Sequence[RemappedFeature]) -> dict[str, Tensor]:
    """Return the rows of the native tables that a batch looks up, (L,) integer by the plan's keys.

    Raises:
        ValueError: an id is outside the range of the user's table.
    """
    jagged = split_features(features)
    rows, checked = {}, set()
    for entry in plan:
        ids = jagged[entry.feature].values()
        if (entry.table, entry.feature) not in checked:  # a table may have several native parts
            checked.add((entry.table, entry.feature))
            check_ids(ids, entry.num_embeddings, f"table {entry.table!r}, feature {entry.feature!r}")
        rows[entry.key] = entry.remap(ids)
    return rows


def remap_features(features: KeyedJaggedTensor, plan: Sequence[RemappedFeature]) -> KeyedJaggedTensor:
    """Return a batch with one key per planned look-up and rewritten ids; bags, weights and VBE strides are kept.

    Raises:
        ValueError: an id is outside the range of the user's table.
    """
    order = [features.keys().index(entry.feature) for entry in plan]
    picked = features if order == list(range(len(features.keys()))) else features.permute(order)
    rows = [*remapped_ids(features, plan).values()]
    inverse = features.inverse_indices_or_none()
    if inverse is not None:
        names, indices = inverse
        inverse = ([entry.key for entry in plan], indices[[names.index(entry.feature) for entry in plan]])
    variable = picked.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=[entry.key for entry in plan],
        values=torch.cat(rows) if rows else picked.values(),
        weights=picked.weights_or_none(),
        lengths=picked.lengths(),
        offsets=picked.offsets(),
        stride=None if variable else picked.stride(),
        stride_per_key_per_rank=picked.stride_per_key_per_rank() if variable else None,
        length_per_key=picked.length_per_key(),
        offset_per_key=picked.offset_per_key(),
        inverse_indices=inverse,
    )


class _Remapped(nn.Module):
    """What pooled and unpooled native tables behind rewritten ids share."""

    plan: tuple[RemappedFeature, ...]
    also_checked: Sequence[IdRange] = ()
    native: Any  # a stock collection, or what DistributedModelParallel puts in its place

    def __init__(self, plan: Sequence[RemappedFeature]) -> None:
        super().__init__()
        self.plan = tuple(plan)
        self._is_checked = False
        self.register_forward_pre_hook(_check_sharding_once)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Remapped:
        # the last call before DistributedDataParallel wraps tables that no sharder, TorchRec's neither, has taken
        if type(self.native) in (EmbeddingBagCollection, EmbeddingCollection):
            strip_where_replicated(self.native)
        return super()._apply(fn, recurse)  # type: ignore[return-value]


def _check_sharding_once(module: _Remapped, _: Any) -> None:
    """Before the first batch, or its trace: refuse what TorchRec's own sharders would get wrong, warn of the rest.

    Here rather than in the forward, which stays a straight line that the train pipelines can trace.
    """
    if not module._is_checked and not torch.compiler.is_compiling():
        if isinstance(module, RemappedEmbeddingCollection):
            _refuse_pooled_rows(module.native)
        module._is_checked = True
        names = sorted({entry.native_table for entry in module.plan})
        effect = (
            "ids are rewritten outside of TorchRec's input exchange, so that no pipeline runs ahead of it, and "
            f"constraints must name the native tables {names}"
        )
        _warn_of_missing_sharders([entry.table for entry in module.plan], effect)


class RemappedEmbeddingBagCollection(_Remapped):
    """A stock `EmbeddingBagCollection` behind rewritten ids.

    Args:
        tables: physical tables; their feature names are the keys of `plan`.
        plan: the look-ups.
        is_weighted: whether batches carry weights.
        device: of the tables.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        plan: Sequence[RemappedFeature],
        is_weighted: bool,
        device: torch.device | None,
    ) -> None:
        super().__init__(plan)
        self.native = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted, device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return the pooled embeddings, (B, D) by the plan's keys."""
        return self.native(remap_features(features, self.plan))


class RemappedEmbeddingCollection(_Remapped):
    """A stock `EmbeddingCollection` behind rewritten ids.

    Args:
        tables: physical tables of one width; their feature names are the keys of `plan`.
        plan: the look-ups.
        device: of the tables.
    """

    def __init__(
        self, tables: list[EmbeddingConfig], plan: Sequence[RemappedFeature], device: torch.device | None
    ) -> None:
        super().__init__(plan)
        self.native = EmbeddingCollection(tables=tables, device=device)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, FoundRows]:
        """Return the rows of every look-up, (L, width) by the plan's keys, or where they are."""
        if type(self.native) is EmbeddingCollection:
            numbers, tables = remapped_ids(features, self.plan), self.native.embeddings
            return {e.key: TableRows(tables[e.native_table].weight, numbers[e.key]) for e in self.plan}  # type: ignore[arg-type]
        return self.native(remap_features(features, self.plan))


class RemappedEmbeddingBagRows(RemappedEmbeddingCollection):
    """Unpooled native tables of a pooled collection, whose sharder takes the settings of the user's bags."""


def found_rows(found: FoundRows) -> Rows:
    """Return rows, (L, width), without bags around them, or where they are."""
    return found if isinstance(found, TableRows) else found.values()


def gathered_rows(found: FoundRows) -> Tensor:
    """Return rows, (L, width), without bags around them."""
    return found.gather() if isinstance(found, TableRows) else found.values()


def _refuse_pooled_rows(native: nn.Module) -> None:
    """Raise where TorchRec's sharded collection would sum the rows of a bag: data-parallel on a CPU (TorchRec 1.8)."""
    sharding = getattr(native, "module_sharding_plan", None)
    is_on_cpu = all(weight.device.type == "cpu" for weight in native.parameters())
    if sharding is None or not is_on_cpu:
        return
    wrong = sorted(name for name, how in sharding.items() if how.sharding_type == "data_parallel")
    if wrong:
        raise ValueError(
            f"tables {wrong}: must not be sharded data-parallel on a CPU, where TorchRec pools their rows; give the "
            "planner ParameterConstraints with other sharding_types for them, or pass "
            "sharders=torchrec_compress.get_default_sharders()"
        )
