"""Estimators for TorchRec's planner that know compressed tables, around the stock ones.

The stock estimators take every table for one of trained, pooled floats. Here codes have no backward and no optimizer
state and come back one row per id; codebooks are charged with their gradient and the dense optimizer's state on every
rank, and with the embeddings that are decoded there; rows behind rewritten ids count unpooled where they are; and what
a manager keeps counts with its table's rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardEstimator, ShardingOption, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, EmbeddingBagConfig

from torchrec_compress.modules.code_tables import CodeTableCollection
from torchrec_compress.modules.decoder import Decoder
from torchrec_compress.modules.managed import ManagedCollection
from torchrec_compress.modules.outputs import dtype_asked
from torchrec_compress.modules.remapped import RemappedEmbeddingBagCollection, RemappedEmbeddingCollection
from torchrec_compress.modules.trained import TrainedCollection
from torchrec_compress.ops import SCALE_BYTES, requested_backend
from torchrec_compress.planner.accounting import (
    DenseOptimizer,
    check_dense_optimizer,
    is_exact,
    is_replicated,
    shard_bytes,
    widest_type,
)
from torchrec_compress.planner.lookups import Lookups
from torchrec_compress.seams import plan_as

# ids that fit go as int32; the stock estimators count 8 bytes each
_INT32_ROWS = 2**31


def estimators(
    topology: Topology,
    constraints: dict[str, ParameterConstraints] | None = None,
    dense_optimizer: DenseOptimizer = "adam",
) -> list[ShardEstimator]:
    """Return what `EmbeddingEnumerator(estimator=...)` takes, so that the stock planner counts compressed tables right.

    Args:
        topology: of the planner.
        constraints: of the planner, as `translate_constraints` returned them.
        dense_optimizer: that trains codebooks and other replicated parameters, by name or as bytes of state per
            parameter.

    Raises:
        ValueError: an unknown dense optimizer.

    Example:
        >>> from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
        >>> topology = Topology(world_size=8, compute_device="cuda")
        >>> enumerator = EmbeddingEnumerator(topology, batch_size=512, estimator=estimators(topology))
    """
    return [
        CompressedPerfEstimator(topology, constraints),
        CompressedStorageEstimator(topology, constraints, dense_optimizer=dense_optimizer),
    ]


class _Estimator(ShardEstimator):
    """Show the inner estimator a corrected stand-in for every option, then correct what it says.

    A stand-in has one shard per distinct shard size, since shards of one size cost the same: a row-wise table over 512
    ranks is estimated once or twice instead of 512 times.
    """

    _field: ClassVar[Literal["perf", "storage"]]

    def __init__(
        self, topology: Topology, constraints: dict[str, ParameterConstraints] | None, inner: ShardEstimator
    ) -> None:
        self._topology, self._constraints, self._inner = topology, constraints, inner

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Estimate every shard in place; further arguments, which differ over TorchRec's releases, are handed on."""
        sharders: dict[str, Any] = next(iter([*args, *kwargs.values()]), None) or {}
        settings = [getattr(sharders.get(option.module_type_key), "fused_params", None) for option in sharding_options]
        stand_ins = [self._stand_in(*each) for each in zip(sharding_options, settings, strict=True)]
        self._ask(stand_ins, *args, **kwargs)
        for option, stand_in, params in zip(sharding_options, stand_ins, settings, strict=True):
            # by the real size: a stand-in's may be padded
            by_size = dict(zip(_distinct(option), stand_in.shards, strict=True))
            option.is_weighted = stand_in.is_weighted
            for size, estimated in by_size.items():
                self._correct(option, Shard(list(size), [0, 0]), stand_in, estimated, params)
            for shard in option.shards:  # shards of one size share the estimate, which nothing writes to
                setattr(shard, self._field, getattr(by_size[tuple(shard.size)], self._field))

    def _ask(self, stand_ins: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Have the inner estimator estimate them."""
        self._inner.estimate(stand_ins, *args, **kwargs)

    def _stand_in(self, option: ShardingOption, fused_params: dict[str, Any] | None) -> ShardingOption:
        """Return the option as the inner estimator should see it."""
        stand_in, of_all = copy.copy(option), (fused_params or {}).get("output_dtype")
        stand_in.shards = [Shard(list(size), [0, 0]) for size in _distinct(option)]
        if is_exact(option):
            # a bare tensor: without the mark of an optimizer, whose state is counted in `accounting`
            plan_as(stand_in, torch.empty(option.tensor.shape, dtype=option.tensor.dtype, device="meta"))
        part = option.module[1]
        if isinstance(part, CodeTableCollection):
            _show_as(stand_in, _travelling_bytes(option), torch.uint8, is_pooled=False)
        elif isinstance(part, RemappedEmbeddingBagCollection | RemappedEmbeddingCollection | ManagedCollection):
            # FBGEMM's kernels make float32 of a table in half precision
            stand_in.output_dtype = widest_type([dtype_asked(option.name, option.output_dtype or of_all)])
            if not isinstance(part, RemappedEmbeddingBagCollection):
                plan_as(stand_in, is_pooled=False)
        elif isinstance(part, TrainedCollection):  # its rows travel as floats
            _show_as(stand_in, part.table(option.name).part.width, torch.float32, self._adds_up(part, option))
        elif isinstance(part, Decoder):
            stand_in.name, _, tensor = option.name.partition(".")
            if tensor == "codebooks" and not option.tensor.is_floating_point():  # their sums are floats
                _show_as(stand_in, option.tensor.shape[1] - SCALE_BYTES, torch.float32)
            table = _table_of(part, stand_in.name)
            stand_in.output_dtype = self._output_type(part, stand_in.name, dtype_asked(option.name, of_all))
            lookups = self._decoder_lookups(part, table, tensor, option.batch_size)
            stand_in.input_lengths, stand_in.num_poolings = lookups.pooling_factors, lookups.num_poolings
        return stand_in

    def _output_type(self, decoder: Decoder, bank: str, of_all: torch.dtype | None) -> DataType | None:
        """Return the type of what lasts of a bank's sums, where constraints or `of_all` ask for fewer bytes.

        Of different ones the widest counts. Sums are float32 at first, uncharged, and before a projection stay so.
        """
        names, known = decoder.blueprint.methods, self._constraints or {}
        has_projection = getattr(decoder.banks[bank], "projection", None) is not None
        if has_projection or (of_all is None and not any(name in known for name in names)):
            return None
        asked = [dtype_asked(name, known[name].output_dtype) if name in known else None for name in names]
        return widest_type([dtype or of_all for dtype in asked])

    def _adds_up(self, part: TrainedCollection, option: ShardingOption) -> bool:
        """Return whether TorchRec's estimate of pooled tables is that of trained rows.

        Row-wise it has every rank send a part of each bag; owners of trained rows send only parts that have ids, so
        that bags of fewer ids than ranks are as many rows as ids.
        """
        if not part.pooled or part.is_weighted:
            return False
        if option.sharding_type == ShardingType.TABLE_WISE.value:
            return True
        lookups = Lookups.of(option.name, self._constraints, option.batch_size)
        return lookups.num_ids >= self._topology.world_size * lookups.num_bags

    def _decoder_lookups(self, decoder: Decoder, table: str, tensor: str, batch_size: int) -> Lookups:
        """Return the look-ups of one tensor of a table's decoder, in its own rows: codewords."""
        lookups = Lookups.of(table, self._constraints, batch_size)
        if not isinstance(_config(decoder, table), EmbeddingBagConfig):
            lookups = lookups.unpooled()
        if tensor != "codebooks":  # hot rows share the look-up of the codebooks
            return lookups.scaled(1, 0)
        method = decoder.blueprint.methods[table]
        codes = method.codewords_per_id
        return lookups.scaled(codes, 1) if method.sums_codewords else lookups.scaled(1, codes)

    @abstractmethod
    def _correct(
        self,
        option: ShardingOption,
        shard: Shard,
        stand_in: ShardingOption,
        estimated: Shard,
        fused_params: dict[str, Any] | None,
    ) -> None:
        """Correct what the inner estimator wrote into `estimated`, whose real size is that of `shard`."""


class CompressedPerfEstimator(_Estimator):
    """Estimate the time of a step, with frozen codes and unpooled rows.

    Args:
        topology: of the planner.
        constraints: of the planner.
        inner: the estimator to correct, default TorchRec's.
    """

    _field = "perf"

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        inner: ShardEstimator | None = None,
    ) -> None:
        super().__init__(topology, constraints, inner or EmbeddingPerfEstimator(topology, constraints))
        self._short_ids: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._is_torchrecs = inner is None

    def _ask(self, stand_ins: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Of options that differ in rows alone, ask for those of fewest and most; where they cost the same, so do all.

        TorchRec's estimate grows with the rows of a table or does not know them, and takes most of the time for 1,000.
        """
        groups: dict[Any, list[ShardingOption]] = {}
        for number, one in enumerate(stand_ins):
            key = _but_rows(one, self._constraints) if self._is_torchrecs and is_exact(one) else None
            groups.setdefault(number if key is None else key, []).append(one)
        ordered = [sorted(some, key=lambda one: one.tensor.shape[0]) for some in groups.values()]
        asked = [one for some in ordered for one in (some if len(some) < 3 else (some[0], some[-1]))]
        self._inner.estimate(asked, *args, **kwargs)
        rest: list[ShardingOption] = []
        for first, *between, last in (some for some in ordered if len(some) > 2):
            if [shard.perf for shard in first.shards] != [shard.perf for shard in last.shards]:
                rest += between
                continue
            for one in between:
                one.is_weighted = first.is_weighted
                for shard, like in zip(one.shards, first.shards, strict=True):
                    shard.perf = like.perf
        if rest:
            self._inner.estimate(rest, *args, **kwargs)

    def _correct(
        self,
        option: ShardingOption,
        shard: Shard,
        stand_in: ShardingOption,
        estimated: Shard,
        fused_params: dict[str, Any] | None,
    ) -> None:
        assert estimated.perf is not None
        perf = estimated.perf = copy.copy(estimated.perf)  # others may share it
        part = option.module[1]
        if not option.tensor.is_floating_point() and not isinstance(part, TrainedCollection):
            perf.bwd_compute = perf.bwd_comms = perf.prefetch_compute = 0.0
        if isinstance(part, CodeTableCollection):
            if part not in self._short_ids:
                self._short_ids[part] = all(config.num_rows < _INT32_ROWS for config in part.configs())
            perf.input_dist_comms /= 2 if self._short_ids[part] else 1


class CompressedStorageEstimator(_Estimator):
    """Estimate the bytes of every shard: weights, optimizer state and gradients exactly, activations as TorchRec does.

    For kernels that cache tables before the host's memory, and for nothing else, the inner estimate stands as it is.

    Args:
        topology: of the planner.
        constraints: of the planner.
        inner: the estimator to correct, default TorchRec's; give one with the `pipeline_type` of the training.
        dense_optimizer: that trains codebooks and other replicated parameters, by name or as bytes of state per
            parameter.

    Raises:
        ValueError: an unknown dense optimizer.
    """

    _field = "storage"

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        inner: ShardEstimator | None = None,
        dense_optimizer: DenseOptimizer = "adam",
    ) -> None:
        check_dense_optimizer(dense_optimizer)
        super().__init__(topology, constraints, inner or EmbeddingStorageEstimator(topology, constraints))
        self._dense_optimizer: DenseOptimizer = dense_optimizer

    def _correct(
        self,
        option: ShardingOption,
        shard: Shard,
        stand_in: ShardingOption,
        estimated: Shard,
        fused_params: dict[str, Any] | None,
    ) -> None:
        storage = estimated.storage
        assert storage is not None
        if not is_exact(option):
            return
        lasting = shard_bytes(option, shard, fused_params, self._dense_optimizer).total
        change = (
            lasting
            + self._float_bytes(option)
            - self._unmade_bytes(option)
            - math.prod(estimated.size) * stand_in.tensor.element_size()
        )
        if self._topology.compute_device == "cpu":
            storage.ddr += change
        else:
            storage.hbm += change

    def _has_kernels(self) -> bool:
        """Return whether kernels look codes up where the model will run.

        The planner may be on another machine, so they are taken to be there (`ops.tiers` says what they need), unless
        TORCHREC_COMPRESS_BACKEND asks for a tier that has none.
        """
        others = ("torch", "fbgemm") if self._topology.compute_device == "cpu" else ("torch",)
        return requested_backend() not in others

    def _unmade_bytes(self, option: ShardingOption) -> int:
        """Return the bytes that the inner estimate charges for and kernels do not make.

        They make no int64 codeword numbers, and on a GPU no codes of a batch either where a code table is whole; those
        of a CPU keep them for the backward.
        """
        if not self._has_kernels():
            return 0
        part = option.module[1]
        table, _, tensor = option.name.partition(".")
        ids = Lookups.of(table, self._constraints, option.batch_size).num_ids
        if isinstance(part, Decoder) and tensor == "codebooks":
            method = part.blueprint.methods[table]
            return 8 * method.codewords_per_id * ids
        if isinstance(part, CodeTableCollection) and is_replicated(option) and self._topology.compute_device != "cpu":
            return _travelling_bytes(option) * ids
        return 0

    def _float_bytes(self, option: ShardingOption) -> int:
        """Return the bytes of a step's float32 copies of codebooks and hot rows that are stored in few bits.

        Without kernels float codebooks are copied to stand beside hot rows, too.
        """
        decoder = option.module[1]
        table, _, tensor = option.name.partition(".")
        if not isinstance(decoder, Decoder):
            return 0
        if tensor == "codebooks" and not option.tensor.is_floating_point():
            return 4 * option.tensor.shape[0] * (option.tensor.shape[1] - SCALE_BYTES)
        if tensor != "hot_rows":
            return 0
        projection: Tensor | None = decoder.banks[table].projection
        width = _config(decoder, table).embedding_dim if projection is None else len(projection)
        rows = 4 * option.tensor.shape[0] * width
        if self._has_kernels():  # those of a CPU read low-bit rows
            return 0 if option.tensor.is_floating_point() or self._topology.compute_device == "cpu" else rows
        codebooks: Tensor = decoder.banks[table].codebooks
        return rows + (4 * codebooks.numel() if codebooks.is_floating_point() else 0)


def _distinct(option: ShardingOption) -> dict[tuple[int, ...], None]:
    return dict.fromkeys(tuple(shard.size) for shard in option.shards)


def _show_as(stand_in: ShardingOption, columns: int, dtype: torch.dtype, is_pooled: bool | None = None) -> None:
    """Have the inner estimator see rows of another width and dtype, and pooling where it is given."""
    plan_as(stand_in, torch.empty(stand_in.tensor.shape[0], columns, dtype=dtype, device="meta"), is_pooled)
    for shard in stand_in.shards:
        shard.size = [shard.size[0], columns]


def _but_rows(stand_in: ShardingOption, constraints: dict[str, ParameterConstraints] | None) -> Any:
    """Return all that the time of a step hangs on but the number of rows, or None where that cannot be told."""
    wish = (constraints or {}).get(stand_in.name)
    wishes = () if wish is None else tuple(getattr(wish, field.name) for field in dataclasses.fields(wish))
    found = (
        id(stand_in.module[1]),
        stand_in.sharding_type,
        stand_in.compute_kernel,
        stand_in.tensor.dtype,
        tuple((shard.size[0] > 0, shard.size[1]) for shard in stand_in.shards),
        stand_in.batch_size,
        stand_in.is_pooled,
        stand_in.is_weighted,
        stand_in.output_dtype,
        stand_in.cache_params,
        *(
            tuple(value) if isinstance(value, list) else value
            for value in (stand_in.input_lengths, stand_in.num_poolings, *wishes)
        ),
    )
    return found if all(isinstance(value, Hashable) for value in found) else None


def _travelling_bytes(option: ShardingOption) -> int:
    """Return the bytes of a row of codes as it is looked up: padded to 32-bit words where it travels."""
    row_bytes = option.tensor.shape[1] * option.tensor.element_size()
    return row_bytes if is_replicated(option) else -(-row_bytes // 4) * 4


def _config(decoder: Decoder, table: str) -> BaseEmbeddingConfig:
    return decoder.blueprint.by_table[table][0].table


def _table_of(decoder: Decoder, bank: str) -> str:
    """Return the table that a decoder is of, the first of several."""
    return next(table for table, name in decoder.blueprint.banks.items() if name == bank)
