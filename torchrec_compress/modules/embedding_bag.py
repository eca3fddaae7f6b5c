"""`CompressedEmbeddingBagCollection`: TorchRec's pooled embedding tables, compressed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_compress.compression import Compression
from torchrec_compress.methods import MECConfig, MEmComConfig, PQConfig, RandomCodesConfig
from torchrec_compress.modules.arguments import check_model, check_tables
from torchrec_compress.modules.blueprint import Blueprint
from torchrec_compress.modules.collection import CompressedParts, as_device
from torchrec_compress.modules.features import check_batch_weights, check_features, widened
from torchrec_compress.modules.managed import ManagedBagRows, ManagedCollection
from torchrec_compress.modules.partial_rows import whole_means
from torchrec_compress.modules.remapped import (
    RemappedEmbeddingBagCollection,
    RemappedEmbeddingBagRows,
    RemappedEmbeddingCollection,
)
from torchrec_compress.modules.trained import TrainedBags, TrainedCollection
from torchrec_compress.modules.weighted_bags import native_bags

_NATIVE = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    RemappedEmbeddingBagCollection,
    RemappedEmbeddingCollection,
    ManagedCollection,
    TrainedCollection,
)

# the pieces that an output is put together from, in the order of `assemble`
_DECODED, _OF_BAGS, _POOLED = 0, 1, 2

torch.fx.wrap("check_batch_weights")
torch.fx.wrap("check_features")
torch.fx.wrap("whole_means")


class CompressedEmbeddingBagCollection(CompressedParts, EmbeddingBagCollectionInterface):
    """Look up pooled embeddings in compressed tables: a drop-in for TorchRec's `EmbeddingBagCollection`.

    Args:
        tables: as for TorchRec; they are copied, never written to.
        device: of all tensors, default CPU; "meta" allocates nothing.
        is_weighted: whether batches carry per-id weights (sum pooling only, as in TorchRec), of any float dtype.
        compression: a method for all tables, or methods by table name or pattern, see `compression.resolve`. A table
            that its method would not shrink stays dense.
        seed: of start codes and hashes, which are a pure function of (seed, table name, id).
        will_fit: whether the caller fits the tables next: those that need a fit stay empty until it comes.

    Shapes: the input has F features of B bags; the output is (B, sum of widths) with TorchRec's keys,
        and as TorchRec's it is float32 whatever the parameters are cast to; sharded, of the `output_dtype` that
        fused_params or constraints say. Weights are taken as float32.

    Raises:
        ValueError: bad tables or compression at construction; at forward a missing feature, missing weights, an id out
            of range or a weight that is not finite.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10_000, embedding_dim=64, feature_names=["user"])
        >>> collection = CompressedEmbeddingBagCollection([table], compression=PQConfig(num_codes=4))
        >>> batch = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor([3, 99, 7]), torch.tensor([2, 0, 1]))
        >>> collection(batch).values().shape, round(collection.footprint().ratio, 1)
        (torch.Size([3, 64]), 24.3)
    """

    default_compression: ClassVar[Compression | None] = None
    _rows_kind = RemappedEmbeddingBagRows
    _managed_kind = ManagedBagRows
    _trained_kind = TrainedBags

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        device: torch.device | None = None,
        is_weighted: bool = False,
        compression: Compression | None = None,
        seed: int = 0,
        will_fit: bool = False,
    ) -> None:
        super().__init__()
        compression = self.default_compression if compression is None else compression
        if compression is None:
            raise ValueError(
                f"{type(self).__name__}: compression must be given, got None; pass compression=..., or use a variant "
                f"with a default: {sorted(variant.__name__ for variant in type(self).__subclasses__())}"
            )
        device = as_device(device, type(self).__name__)
        check_tables(type(self).__name__, tables, EmbeddingBagConfig)
        blueprint = Blueprint.of(tables, compression, seed)
        for table in blueprint.tables:
            if is_weighted and table.pooling == PoolingType.MEAN:
                raise ValueError(f"table {table.name!r}: pooling must be SUM with is_weighted=True, got MEAN")
        self._is_weighted = is_weighted
        self._build_shared(blueprint, is_weighted, device, will_fit)
        dense = blueprint.dense_tables()
        self.dense = EmbeddingBagCollection(dense, is_weighted, device) if dense else None
        bags, bag_remaps = blueprint.bags()
        self.bags = RemappedEmbeddingBagCollection(bags, bag_remaps, is_weighted, device) if bags else None
        self._whole_means = blueprint.whole_means()
        if self.bags is not None:
            self.bags.stand_beside(dict(self.decoder.banks.items()))
        self._guard_dense_tables([self.code_tables, self.bags, *self.rows.values(), self.managed, self.trained])
        self._features = sorted({lookup.feature for lookup in blueprint.lookups})
        self._sources = self._find_sources(dense)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return the pooled embeddings of a batch."""
        features = maybe_td_to_kjt(features, None)
        check_features(features, self._features, type(self).__name__, self.decoder.on_meta)
        if self._is_weighted:
            check_batch_weights(features, type(self).__name__)
            features = widened(features)
        codes = self.code_tables(features) if self.code_tables is not None else None
        rows = self._unpooled_rows(features)
        pooled: list[KeyedTensor] = []
        if self.dense is not None:
            pooled.append(native_bags(self.dense, features, self._is_weighted))
        bags: dict[str, Tensor] = {}
        if self.bags is not None:
            pooled.append(self.bags(features))
            bags = bags_by_key(pooled[-1])
        trained = self.trained(features) if self.trained is not None else {}
        dtype = self._output_dtype()
        decoded = self.decoder(features, codes, rows) if self.decoder.lookups else None
        of_bags = self.decoder.decode_bags(bags, trained)
        if self._whole_means:
            of_bags = whole_means(of_bags, features, self._whole_means)
        return assemble(
            pooled,
            decoded,
            of_bags,
            self._sources,
            [lookup.output for lookup in self.blueprint.lookups],
            [lookup.table.embedding_dim for lookup in self.blueprint.lookups],
            dtype,
        )

    def _find_sources(self, dense: list[EmbeddingBagConfig]) -> list[tuple[int, str | int]]:
        """Return the piece that each output is in, and where it is there, as `assemble` wants it."""
        keys = [lookup.key for table in dense for lookup in self.blueprint.by_table[table.name]]
        names = [name for of_table in get_embedding_names_by_table(dense) for name in of_table]
        found: dict[str, tuple[int, str | int]] = {}
        found |= {lookup.key: (_DECODED, number) for number, lookup in enumerate(self.decoder.lookups)}
        found |= {lookup.key: (_OF_BAGS, lookup.key) for lookup in self.decoder.bagged}
        found |= {key: (_POOLED, name) for key, name in zip(keys, names, strict=True)}
        for lookup in self.blueprint.lookups:
            if lookup.key not in found:  # a bag that is the embedding already
                (key,) = self.blueprint.bag_keys(lookup)
                found[lookup.key] = (_POOLED + int(self.dense is not None), key)
        return [found[lookup.key] for lookup in self.blueprint.lookups]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the user's own configs; where one names no features, a copy that names them."""
        return self.blueprint.given

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """Return the same; `ManagedCollisionEmbeddingBagCollection` asks every heir of the interface by this name."""
        return self.blueprint.given

    def is_weighted(self) -> bool:
        """Return whether batches carry weights."""
        return self._is_weighted


@torch.fx.wrap
def bags_by_key(pooled: KeyedTensor) -> dict[str, Tensor]:
    """Return the bags of native tables, (B, width) by key."""
    return pooled.to_dict()


@torch.fx.wrap
def assemble(
    pooled: list[KeyedTensor],
    decoded: Tensor | None,
    of_bags: dict[str, Tensor],
    sources: list[tuple[int, str | int]],
    keys: list[str],
    widths: list[int],
    dtype: torch.dtype | None,
) -> KeyedTensor:
    """Bring the pieces into the order of the user's tables.

    Args:
        pooled: outputs of native collections, found by key: once sharded, TorchRec orders them by rank.
        decoded: (B, sum of their widths), or None.
        of_bags: (B, width) by look-up key, decoded after pooling.
        sources: for each output its piece (`decoded`, `of_bags` or one of `pooled`) and its number or key there.
        keys: of the output.
        widths: of the output's keys.
        dtype: of the output; None: float32, whatever the parameters are cast to, but for native collections, whose
            sharder may have been told another.

    Returns:
        (B, sum of widths).
    """
    if decoded is not None:
        decoded = decoded.to(dtype or torch.float32)
    if decoded is not None and not pooled and not of_bags:  # all of it, and in this order
        return KeyedTensor(keys=keys, length_per_key=widths, values=decoded)
    ours = [width for (piece, _), width in zip(sources, widths, strict=True) if piece == _DECODED]
    parts = () if decoded is None else decoded.split(ours, dim=1)
    bags = {key: values.to(dtype or torch.float32) for key, values in of_bags.items()}
    pieces: list[Any] = [parts, bags, *(piece.to_dict() for piece in pooled)]
    columns = [pieces[piece][place] for piece, place in sources]
    values = torch.cat(columns, dim=1)
    return KeyedTensor(keys=keys, length_per_key=widths, values=values if dtype is None else values.to(dtype))


class MECEmbeddingBagCollection(CompressedEmbeddingBagCollection):
    """`CompressedEmbeddingBagCollection` whose default is MEC, 8 codes per row (MEC, arXiv 2502.15355)."""

    default_compression = MECConfig(num_codes=8)


class PQEmbeddingBagCollection(CompressedEmbeddingBagCollection):
    """`CompressedEmbeddingBagCollection` whose default is plain product quantisation, 8 codes per row."""

    default_compression = PQConfig(num_codes=8)


class RandomCodesEmbeddingBagCollection(CompressedEmbeddingBagCollection):
    """`CompressedEmbeddingBagCollection` whose default is random codes, 8 per row: the control."""

    default_compression = RandomCodesConfig(num_codes=8)


class MEmComEmbeddingBagCollection(CompressedEmbeddingBagCollection):
    """`CompressedEmbeddingBagCollection` whose default is MEmCom with 1,000 shared rows (arXiv 2203.10135)."""

    default_compression = MEmComConfig(num_buckets=1000)


def native_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of stock TorchRec tables inside a model: those that a fused optimizer may train.

    And those that stand for tables of trained rows, which train in the backward alone; they have no elements.

    Codebooks and other replicated parameters are not among them; they belong to the dense optimizer. Nor is what is
    frozen.

    Raises:
        ValueError: it is no model, or is sharded already, so that a fused optimizer comes too late.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10_000, embedding_dim=64, feature_names=["user"])
        >>> native_parameters(CompressedEmbeddingBagCollection([table], compression=PQConfig(num_codes=4)))
        []
    """
    check_model("native_parameters", module)
    late = sorted(
        path
        for path, child in module.named_modules()
        if isinstance(child, ShardedModule) and issubclass(child.unsharded_module_type, _NATIVE)
    )
    if late:
        raise ValueError(
            f"native_parameters: the model must not be sharded yet, got sharded tables at {late}; call it, and "
            "apply_optimizer_in_backward, before DistributedModelParallel"
        )
    stock = [
        child
        for child in module.modules()
        if isinstance(child, EmbeddingBagCollection | EmbeddingCollection | TrainedCollection)
    ]
    return [parameter for child in stock for parameter in child.parameters() if parameter.requires_grad]
