"""Native tables whose ids are rewritten, pooled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_compress.methods.decoders import Bank
from torchrec_compress.methods.storage import Remap
from torchrec_compress.modules.features import IdRange, split_features, widened
from torchrec_compress.modules.partial_rows import Places, put_in_place, some_rows, with_rows_alone
from torchrec_compress.modules.replicated import strip_where_replicated, warn_of_missing_sharders
from torchrec_compress.modules.weighted_bags import native_bags
from torchrec_compress.ops import Rows, TableRows, check_ids, check_offsets, check_weight_count

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("remap_features")
torch.fx.wrap("remapped_ids")
torch.fx.wrap("some_rows")
torch.fx.wrap("split_features")
torch.fx.wrap("rows_in_place")

FoundRows = JaggedTensor | TableRows | Tensor


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
        planned: the name that planner, plan and constraints know the native table by: the user's table, "table.part"
            where a module holds several native tables of it, and its own where several tables share it.
    """

    feature: str
    key: str
    num_embeddings: int
    remap: Remap
    table: str
    native_table: str
    planned: str

    @property
    def is_shared(self) -> bool:
        """Whether others of the user's tables may look up the same native table."""
        return self.planned == self.native_table


def remapped_ids(
    features: KeyedJaggedTensor, remaps: Sequence[RemappedFeature], places: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the rows of the native tables that a batch looks up, (L,) integer by the remaps' keys.

    `NO_ROW` for an id without one; `places` are those of `Places`, by table.

    Raises:
        ValueError: an id is outside the range of the user's table.
    """
    jagged = split_features(features)
    rows, checked = {}, set()
    for entry in remaps:
        ids = jagged[entry.feature].values()
        if (entry.table, entry.feature) not in checked:  # a table may have several native parts
            checked.add((entry.table, entry.feature))
            check_ids(ids, entry.num_embeddings, f"table {entry.table!r}, feature {entry.feature!r}")
        rows[entry.key] = entry.remap(ids, places.get(entry.table))
    return rows


def remap_features(
    features: KeyedJaggedTensor, remaps: Sequence[RemappedFeature], places: Mapping[str, Tensor]
) -> KeyedJaggedTensor:
    """Return a batch with one key per look-up and rewritten ids; bags, weights and VBE strides are kept.

    Ids that have no row in a native table are not looked up there; `places` are those of `Places`, by table.

    Raises:
        ValueError: an id is outside the range of the user's table, or the batch's tensors do not fit one another.
    """
    _check_lengths(features)
    features = widened(features)
    order = [features.keys().index(entry.feature) for entry in remaps]
    picked = features if order == list(range(len(features.keys()))) else features.permute(order)
    rows, weights = [*remapped_ids(features, remaps, places).values()], picked.weights_or_none()
    if weights is not None and len({*order}) < len(order):
        # FBGEMM's gradient of a permutation that repeats a feature writes past its end
        jagged = split_features(features)
        weights = torch.cat([jagged[entry.feature].weights() for entry in remaps])
    inverse = features.inverse_indices_or_none()
    if inverse is not None:
        names, indices = inverse
        inverse = ([entry.key for entry in remaps], indices[[names.index(entry.feature) for entry in remaps]])
    variable = picked.variable_stride_per_key()
    found = KeyedJaggedTensor(
        keys=[entry.key for entry in remaps],
        values=torch.cat(rows) if rows else picked.values(),
        weights=weights,
        lengths=picked.lengths(),
        offsets=picked.offsets(),
        stride=None if variable else picked.stride(),
        stride_per_key_per_rank=picked.stride_per_key_per_rank() if variable else None,
        length_per_key=picked.length_per_key(),
        offset_per_key=picked.offset_per_key(),
        inverse_indices=inverse,
    )
    return with_rows_alone(found) if any(entry.remap.is_partial for entry in remaps) else found


def rows_in_place(found: dict[str, Any], numbers: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Any]:
    """Return rows by look-up key with zeros for the ids of these keys that have none, and were not looked up."""
    return {**found, **{key: put_in_place(found[key].values(), numbers[key]) for key in keys}}


def _check_lengths(features: KeyedJaggedTensor) -> None:
    """Raise where lengths say more than there is: the kernels of a permutation and of native tables believe them."""
    num_ids = features.values().shape[0]
    check_offsets(features.offsets(), num_ids)
    if features.weights_or_none() is not None:
        check_weight_count(features.weights(), num_ids, "the batch")


class _Remapped(nn.Module):
    """What pooled and unpooled native tables behind rewritten ids share."""

    remaps: tuple[RemappedFeature, ...]
    also_checked: Sequence[IdRange] = ()
    native: Any  # a stock collection, or what DistributedModelParallel puts in its place

    def __init__(self, remaps: Sequence[RemappedFeature]) -> None:
        super().__init__()
        self.remaps = tuple(remaps)
        self.places = Places({})
        self._partial = [entry.key for entry in self.remaps if entry.remap.is_partial]
        self._is_checked = False
        self.register_forward_pre_hook(_check_sharding_once)

    def stand_beside(self, banks: Mapping[str, Bank]) -> None:
        """Name the decoders of tables, which say where ids have their rows."""
        tables = {entry.table for entry in self.remaps if entry.remap.kind == "ranked"}
        self.places = Places({table: banks[table] for table in tables})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Remapped:
        # the last call before DistributedDataParallel wraps tables that no sharder, TorchRec's neither, has taken
        if type(self.native) in (EmbeddingBagCollection, EmbeddingCollection):
            strip_where_replicated(self.native)
        return super()._apply(fn, recurse)  # type: ignore[return-value]


def _check_sharding_once(module: _Remapped, _: Any) -> None:
    """Before the first batch, or its trace: refuse what TorchRec's own sharders would get wrong, warn of the rest.

    Here rather than in the forward, which stays a straight line that the train pipelines can trace.
    """
    # in this order, so that no compiled graph asks whether it was checked
    if not torch.compiler.is_compiling() and not module._is_checked:
        module.places.make_ready()
        if isinstance(module, RemappedEmbeddingCollection):
            _refuse_pooled_rows(module.native)
        module._is_checked = True
        names = sorted({entry.native_table for entry in module.remaps})
        effect = (
            "ids are rewritten outside of TorchRec's input exchange, so that no pipeline runs ahead of it, and "
            f"constraints must name the native tables {names}"
        )
        warn_of_missing_sharders([entry.table for entry in module.remaps], effect)


class RemappedEmbeddingBagCollection(_Remapped):
    """A stock `EmbeddingBagCollection` behind rewritten ids.

    Args:
        tables: physical tables; their feature names are the keys of `remaps`.
        remaps: the look-ups.
        is_weighted: whether batches carry weights.
        device: of the tables.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        remaps: Sequence[RemappedFeature],
        is_weighted: bool,
        device: torch.device | None,
    ) -> None:
        super().__init__(remaps)
        self._is_weighted = is_weighted
        self.native = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted, device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return the pooled embeddings, (B, D) by the remaps' keys."""
        rewritten = remap_features(features, self.remaps, self.places.tensors())
        return native_bags(self.native, rewritten, self._is_weighted)


class RemappedEmbeddingCollection(_Remapped):
    """A stock `EmbeddingCollection` behind rewritten ids.

    Args:
        tables: physical tables of one width; their feature names are the keys of `remaps`.
        remaps: the look-ups.
        device: of the tables.
    """

    def __init__(
        self, tables: list[EmbeddingConfig], remaps: Sequence[RemappedFeature], device: torch.device | None
    ) -> None:
        super().__init__(remaps)
        self.native = EmbeddingCollection(tables=tables, device=device)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, FoundRows]:
        """Return the rows of every look-up, (L, width) by the remaps' keys, or where they are."""
        places = self.places.tensors()
        if type(self.native) is EmbeddingCollection:
            numbers, tables = remapped_ids(features, self.remaps, places), self.native.embeddings
            return {
                e.key: (some_rows if e.remap.is_partial else TableRows)(tables[e.native_table].weight, numbers[e.key])  # type: ignore[arg-type]
                for e in self.remaps
            }
        found = self.native(remap_features(features, self.remaps, places))
        if not self._partial:
            return found
        return rows_in_place(found, remapped_ids(features, self.remaps, places), self._partial)


class RemappedEmbeddingBagRows(RemappedEmbeddingCollection):
    """Unpooled native tables of a pooled collection, whose sharder takes the settings of the user's bags."""


def found_rows(found: FoundRows) -> Rows:
    """Return rows, (L, width), without bags around them, or where they are; half-precision ones as float32 rows.

    So that a decoder sees what TorchRec's sharded tables give it, float32, whatever a table is stored in.
    """
    if isinstance(found, TableRows) and found.weight.dtype == torch.float16:
        return found.gather().float()
    return found.values() if isinstance(found, JaggedTensor) else found


def gathered_rows(found: FoundRows) -> Tensor:
    """Return rows, (L, width), without bags: float32, or the `output_dtype` of TorchRec's sharded tables."""
    if isinstance(found, Tensor):
        return found
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
