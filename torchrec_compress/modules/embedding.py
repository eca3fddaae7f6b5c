"""`CompressedEmbeddingCollection`: TorchRec's unpooled embedding tables, compressed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection, EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_compress.compression import Compression
from torchrec_compress.modules.arguments import check_tables
from torchrec_compress.modules.blueprint import Blueprint
from torchrec_compress.modules.collection import CompressedParts, as_device
from torchrec_compress.modules.features import check_features, split_features
from torchrec_compress.modules.remapped import gathered_rows

torch.fx.wrap("check_features")
torch.fx.wrap("gathered_rows")
torch.fx.wrap("jagged_rows")
torch.fx.wrap("split_features")


def jagged_rows(rows: Tensor, bags: JaggedTensor, need_indices: bool) -> JaggedTensor:
    """Return rows, (L, D), in the bags of `bags`; with its ids as weights where they are asked for."""
    return JaggedTensor(values=rows, lengths=bags.lengths(), weights=bags.values() if need_indices else None)


class CompressedEmbeddingCollection(CompressedParts, EmbeddingCollectionInterface):
    """Look up unpooled embeddings in compressed tables: a drop-in for TorchRec's `EmbeddingCollection`.

    Args:
        tables: as for TorchRec, all of one width; they are copied, never written to.
        device: of all tensors, default CPU; "meta" allocates nothing.
        need_indices: whether outputs carry their ids as weights.
        compression: a method for all tables, or methods by table name or pattern, see `compression.resolve`.
        seed: of start codes and hashes.
        will_fit: whether the caller fits the tables next: those that need a fit stay empty until it comes.

    Shapes: for every feature a `JaggedTensor` of (L, D) rows, float32 whatever the parameters are cast to.

    Raises:
        ValueError: bad tables or compression at construction; at forward a missing feature or an id out of range.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> table = EmbeddingConfig(name="item", num_embeddings=10_000, embedding_dim=64, feature_names=["item"])
        >>> collection = CompressedEmbeddingCollection([table], compression=PQConfig(num_codes=4))
        >>> batch = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 99, 7]), torch.tensor([2, 0, 1]))
        >>> collection(batch)["item"].values().shape
        torch.Size([3, 64])
    """

    default_compression: ClassVar[Compression | None] = None

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        compression: Compression | None = None,
        seed: int = 0,
        will_fit: bool = False,
    ) -> None:
        super().__init__()
        if compression is None:
            raise ValueError(f"{type(self).__name__}: compression must be given, got None; pass compression=...")
        device = as_device(device, type(self).__name__)
        check_tables(type(self).__name__, tables, EmbeddingConfig)
        blueprint = Blueprint.of(tables, compression, seed)
        widths = {table.name: table.embedding_dim for table in blueprint.tables}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{type(self).__name__}: all tables must have one embedding_dim, got {widths}")
        self._need_indices = need_indices
        self._build_shared(blueprint, False, device, will_fit)
        dense = blueprint.dense_tables()
        self.dense = EmbeddingCollection(dense, device) if dense else None
        self._guard_dense_tables([self.code_tables, *self.rows.values(), self.managed, self.trained])
        self._features = sorted({lookup.feature for lookup in blueprint.lookups})
        self._dense_lookups = self._names_in_dense(dense)
        self._bags = [
            place
            for lookup in blueprint.lookups
            if blueprint.parts[lookup.table.name].bags
            for place in blueprint.found_rows(lookup)
        ]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Return the rows of every feature's ids."""
        features = maybe_td_to_kjt(features, None)
        check_features(features, self._features, type(self).__name__, self.decoder.on_meta)
        codes = self.code_tables(features) if self.code_tables is not None else None
        rows = self._unpooled_rows(features)
        jagged = split_features(features)
        dense = self.dense(features) if self.dense is not None else {}
        asked = self._output_dtype()
        dtype = asked or torch.float32  # whatever the parameters are cast to, as TorchRec's own do
        found = {key: dense[name].values() for key, name in self._dense_lookups.items()}
        if len(found) < len(self.blueprint.lookups):  # alone they are what TorchRec makes them
            found = {key: values.to(dtype) for key, values in found.items()}
        decoded = self.decoder.unpooled(features, codes, rows, asked)
        for lookup, values in zip(self.decoder.lookups, decoded, strict=True):
            found[lookup.key] = values.to(dtype)
        bags = {key: gathered_rows(rows[group][key]) for group, key in self._bags}
        trained = self.trained(features) if self.trained is not None else {}
        for key, values in self.decoder.decode_bags(bags, trained).items():
            found[key] = values.to(dtype)
        for lookup in self.blueprint.lookups:
            if lookup.key not in found:  # a native bag: its rows are the embedding
                (key,) = self.blueprint.bag_keys(lookup)
                found[lookup.key] = bags[key].to(dtype)
        return {
            lookup.output: jagged_rows(found[lookup.key], jagged[lookup.feature], self._need_indices)
            for lookup in self.blueprint.lookups
        }

    def _names_in_dense(self, dense: list[EmbeddingConfig]) -> dict[str, str]:
        """Return, by look-up key, the name that the stock collection gives the output."""
        if self.dense is None:
            return {}
        keys = [lookup.key for table in dense for lookup in self.blueprint.by_table[table.name]]
        names = [name for table_names in self.dense.embedding_names_by_table() for name in table_names]
        return dict(zip(keys, names, strict=True))

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Return the user's own configs; where one names no features, a copy that names them."""
        return self.blueprint.given

    def need_indices(self) -> bool:
        """Return whether outputs carry their ids."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Return the width of the embeddings."""
        return self.blueprint.tables[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Return the output names of every table."""
        return [[lookup.output for lookup in self.blueprint.by_table[table.name]] for table in self.blueprint.tables]
