"""Taps on the embedding tables of a model: what comes out of each becomes a leaf that gradients end in.

So nothing goes into the tables in a backward: no fused optimizer steps, no row moves, no parameter gets a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable, LazyNoWait
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_compress.convert.models import PLAIN, table_name
from torchrec_compress.modules import CompressedEmbedding, CompressedEmbeddingBag
from torchrec_compress.modules.features import split_features
from torchrec_compress.seams import sharded_configs


class Tapped(NamedTuple):
    """What one look-up of a table gave a batch.

    Attributes:
        table: its name.
        first: the column of the leaf that the table begins at.
        leaf: (B, sum of widths) bags, or (L, D) rows; it requires a gradient.
        width: of the table, D.
        ids: (L,) integer.
        lengths: (B,) integer ids per bag; ones for rows.
        factors: (L,) float64, of each id's row in its bag.
    """

    table: str
    leaf: Tensor
    first: int
    width: int
    ids: Tensor
    lengths: Tensor
    factors: Tensor

    @property
    def bags(self) -> Tensor:
        """What was served, (B, D)."""
        return self.leaf.detach()[:, self.first : self.first + self.width]

    def shares(self) -> Tensor:
        """Return how much of its ids' errors a bag takes: the sum of their squared factors, (B,) float64."""
        bag = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.ids.device), self.lengths.long())
        return self.factors.new_zeros(len(self.lengths)).index_add_(0, bag, self.factors.square())


@dataclass(frozen=True)
class Collection:
    """An embedding collection in a model.

    Attributes:
        path: in the model.
        module: stock, compressed or sharded.
        tables: their configs.
        is_weighted: whether batches carry weights.
    """

    path: str
    module: nn.Module
    tables: Sequence[BaseEmbeddingConfig]
    is_weighted: bool

    def lookups(self) -> Iterator[tuple[BaseEmbeddingConfig, str, str]]:
        """Yield table, feature and output key of every look-up."""
        named: Any = self.tables
        for table, keys in zip(self.tables, get_embedding_names_by_table(named), strict=True):
            for feature, key in zip(table.feature_names, keys, strict=True):
                yield table, feature, key


def find_collections(model: nn.Module) -> list[Collection]:
    """Return the embedding collections of a model, the outermost ones.

    Raises:
        ValueError: there is none, or two tables have one name.
    """
    found: list[Collection] = []
    for path, module in model.named_modules():
        if not any(path.startswith(f"{other.path}.") or not other.path for other in found):
            found += [Collection(path, module, *given) for given in _tables_of(path, module)]
    names = [table.name for collection in found for table in collection.tables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        what = f"tables {twice} in several" if twice else "none"
        raise ValueError(
            f"measure_curvature: model must hold embedding collections of tables with names of their own, got {what}"
        )
    return found


def _tables_of(path: str, module: Any) -> Iterator[tuple[Sequence[BaseEmbeddingConfig], bool]]:
    """Yield the tables of an embedding collection and whether it is weighted; nothing for other modules.

    A plain module is a collection of one, unless it pools by maximum, of which there is no curvature in rows.
    """
    sharded = sharded_configs(module)
    if sharded is not None:
        yield sharded
    elif isinstance(module, EmbeddingBagCollectionInterface):
        yield module.embedding_bag_configs(), module.is_weighted()
    elif isinstance(module, EmbeddingCollectionInterface):
        yield module.embedding_configs(), False
    elif _is_plain(module) and getattr(module, "mode", "") != "max":
        rows, width = module.num_embeddings, module.embedding_dim
        name = table_name(path) if type(module) in PLAIN else module.name
        yield [EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=width, feature_names=[name])], False


class Taps:
    """Hooks on collections, as long as the context lasts.

    Args:
        collections: of a model.
    """

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = collections
        self._handles: list[Any] = []
        self._tapped: list[Tapped] = []

    def __enter__(self) -> Taps:
        for collection in self._collections:
            hook = self._plain_hook(collection) if _is_plain(collection.module) else self._hook(collection)
            self._handles.append(collection.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._tapped = []

    def take(self) -> list[Tapped]:
        """Return what collections have given since the last call."""
        taken, self._tapped = self._tapped, []
        return taken

    def _hook(self, collection: Collection) -> Any:
        def tap(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
            features = maybe_td_to_kjt([*given, *named.values()][0], None)
            awaited = output.wait() if isinstance(output, Awaitable) else output
            tapped: Any
            if isinstance(awaited, KeyedTensor):
                tapped = self._tap_bags(collection, features, awaited)
            else:
                tapped = self._tap_rows(collection, features, awaited)
            return LazyNoWait(tapped) if isinstance(output, Awaitable) else tapped

        return tap

    def _plain_hook(self, collection: Collection) -> Any:
        (table,) = collection.tables

        def tap(module: Any, given: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
            leaf = output.detach().reshape(-1, table.embedding_dim).requires_grad_()
            ids, lengths, factors = _plain_bags(module, **_arguments(module, given, named))
            self._tapped.append(Tapped(table.name, leaf, 0, table.embedding_dim, ids, lengths, factors))
            return leaf.view_as(output)

        return tap

    def _tap_bags(self, collection: Collection, features: KeyedJaggedTensor, output: KeyedTensor) -> KeyedTensor:
        if features.variable_stride_per_key():
            raise ValueError(
                f"measure_curvature: features of {collection.path!r} must have one batch size, got one per feature; "
                "pass batches without inverse indices"
            )
        leaf = output.values().detach().requires_grad_()
        keys, widths = output.keys(), output.length_per_key()
        starts = dict(zip(keys, (sum(widths[:number]) for number in range(len(keys))), strict=True))
        jagged = split_features(features)
        for table, feature, key in collection.lookups():
            bags = jagged[feature]
            tapped = (bags.values(), bags.lengths(), _factors(table, bags, collection.is_weighted))
            self._tapped.append(Tapped(table.name, leaf, starts[key], table.embedding_dim, *tapped))
        return KeyedTensor(keys, widths, leaf)

    def _tap_rows(
        self, collection: Collection, features: KeyedJaggedTensor, output: Mapping[str, JaggedTensor]
    ) -> dict[str, JaggedTensor]:
        found, jagged = {}, split_features(features)
        by_key = {key: (table, feature) for table, feature, key in collection.lookups()}
        for key, rows in output.items():
            table, feature = by_key[key]
            leaf = rows.values().detach().requires_grad_()
            ids, ones = jagged[feature].values(), torch.ones(len(leaf), dtype=torch.int64, device=leaf.device)
            self._tapped.append(Tapped(table.name, leaf, 0, table.embedding_dim, ids, ones, ones.double()))
            found[key] = JaggedTensor(leaf, rows.weights_or_none(), rows.lengths(), rows.offsets())
        return found


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is one table, called with ids: PyTorch's own, or its compressed form."""
    return type(module) in PLAIN or isinstance(module, CompressedEmbedding | CompressedEmbeddingBag)


def _arguments(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a plain module's forward by name."""
    return {**dict(zip(("input", "offsets", "per_sample_weights"), given, strict=False)), **named}


def _plain_bags(
    module: nn.Embedding | nn.EmbeddingBag | CompressedEmbedding | CompressedEmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, (L,), the lengths of their bags, (B,), and what each id's row is multiplied by, (L,) float64.

    The ids of padding are left out: their row is no part of the table.
    """
    flat = input.reshape(-1)
    if isinstance(module, nn.Embedding | CompressedEmbedding):
        sizes = torch.ones_like(flat)
    elif offsets is None:
        sizes = flat.new_full((len(input),), input.shape[-1])
    else:
        ends = offsets[1:] if module.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(flat)])])
        sizes = ends - offsets[: len(ends)]
    bag = torch.repeat_interleave(torch.arange(len(sizes), device=flat.device), sizes.long())
    factors = torch.ones(len(flat), dtype=torch.float64, device=flat.device)
    if per_sample_weights is not None:
        factors = per_sample_weights.detach().reshape(-1).double()
    is_kept = torch.ones_like(flat, dtype=torch.bool) if module.padding_idx is None else flat != module.padding_idx
    lengths = torch.zeros(len(sizes), dtype=torch.int64, device=flat.device).index_add_(0, bag, is_kept.long())
    if isinstance(module, nn.EmbeddingBag | CompressedEmbeddingBag) and module.mode == "mean":
        factors = factors / lengths[bag].clamp(min=1)
    return flat[is_kept], lengths, factors[is_kept]


def _factors(table: BaseEmbeddingConfig, bags: JaggedTensor, is_weighted: bool) -> Tensor:
    """Return what each id's row is multiplied by in its bag, (L,) float64."""
    if is_weighted:
        factors = bags.weights().detach().double()
    else:
        factors = torch.ones(len(bags.values()), dtype=torch.float64, device=bags.values().device)
    if isinstance(table, EmbeddingBagConfig) and table.pooling == PoolingType.MEAN:
        lengths = bags.lengths().long()  # a weighted mean is divided by them too, not by weights
        factors = factors / torch.repeat_interleave(lengths.clamp(min=1), lengths)
    return factors
