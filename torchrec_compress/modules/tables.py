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

from torchrec_compress.methods.base import Remap
from torchrec_compress.modules.backward import strip_where_replicated
from torchrec_compress.modules.code_bank import CodeBank, CodeTableConfig
from torchrec_compress.modules.features import IdRange, split_features
from torchrec_compress.ops import Rows, TableRows, check_ids, check_intact, check_offsets, check_weight_count

logger = logging.getLogger(__name__)

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("intact_table")
torch.fx.wrap("remap_features")
torch.fx.wrap("remapped_ids")
torch.fx.wrap("split_features")


FoundRows = JaggedTensor | TableRows | Tensor


class CodeTable(NamedTuple):
    """A whole code table, where nobody has gathered the codes of a batch: its decoder does, while it decodes."""

    codes: Tensor
    is_set: Tensor


def intact_table(
    _: KeyedJaggedTensor, codes: Tensor, is_set: Tensor, low_bit_rows: list[Tensor], table: str, is_sampled: bool
) -> CodeTable:
    """Return a whole code table; arguments and errors as in `ops.check_intact`.

    It is given the batch because fx records only calls that depend on the input, and traced modules shall check too.
    """
    check_intact([codes, *low_bit_rows], is_set, table, is_sampled)
    return CodeTable(codes, is_set)


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
        self._turn = 0
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
        """Return the code table of every feature by output name; (L, row_size) codes of its ids, once sharded.

        Raises:
            ValueError: something other than a fit or a checkpoint has changed codes or low-bit rows.
        """
        if not torch.compiler.is_compiling():  # one table in turn, as looking at values takes longer than the rest
            self._turn = (self._turn + 1) % len(self._configs)
        found = {}
        for number, (config, bank) in enumerate(zip(self._configs, self.banks.values(), strict=True)):
            rows, is_sampled = bank.low_bit_rows(), number == self._turn
            table = intact_table(features, bank.codes, bank.is_set, rows, config.name, is_sampled)
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
    warn_of_start_codes(module.configs(), module.banks)
    _warn_of_missing_sharders([config.name for config in module.configs()], "code tables are whole on every rank")


def warn_of_start_codes(configs: Sequence[CodeTableConfig], banks: Any) -> None:
    """Log, once for all ranks, which tables serve start codes that a fit should have replaced.

    Args:
        configs: of the code tables.
        banks: `CodeRows` by table name.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    by_start: dict[str, list[str]] = {}
    for config in configs:
        if config.part.unfitted and banks[config.name].is_start:
            by_start.setdefault(config.part.unfitted, []).append(config.name)
    for what, tables in by_start.items():
        logger.warning("tables %s were never fitted: they serve %s; fit them by compress()", tables, what)


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
        ValueError: an id is outside the range of the user's table, or the batch's tensors do not fit one another.
    """
    _check_lengths(features)
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


def _check_lengths(features: KeyedJaggedTensor) -> None:
    """Raise where lengths say more than there is: the kernels of a permutation and of native tables believe them."""
    num_ids = features.values().shape[0]
    check_offsets(features.offsets(), num_ids)
    if features.weights_or_none() is not None:
        check_weight_count(features.weights(), num_ids, "the batch")


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
    return found.values() if isinstance(found, JaggedTensor) else found


def gathered_rows(found: JaggedTensor | TableRows) -> Tensor:
    """Return rows, (L, width), without bags: float32, or the `output_dtype` of TorchRec's sharded tables."""
    return found.gather().float() if isinstance(found, TableRows) else found.values()


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
