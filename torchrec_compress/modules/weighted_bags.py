"""Bags of TorchRec's unsharded tables with weights of any float dtype, as TorchRec's sharded tables take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_compress.modules.features import HALF, split_features
from torchrec_compress.ops import TableRows, pool_rows


def native_bags(native: torch.nn.Module, features: KeyedJaggedTensor, is_weighted: bool) -> KeyedTensor:
    """Return the bags of a collection of TorchRec's, unsharded or not, weights of any float dtype taken as float32.

    Sharded ones are asked as they are: FBGEMM makes float32 of weights. Those of torch, which takes weights of the
    tables' dtype alone, are pooled here.

    Args:
        native: the collection, or what took its place.
        features: the batch; weights (L,) floating point, ids (L,) integer.
        is_weighted: whether weights count.

    Returns:
        (B, sum of widths) float32, by TorchRec's keys. Differentiable in tables and weights.
    """
    if not is_weighted or type(native) is not EmbeddingBagCollection:
        return native(features)
    tables = native.embedding_bag_configs()
    return _pooled(
        features,
        [table.feature_names for table in tables],
        [name for names in get_embedding_names_by_table(tables) for name in names],
        [native.embedding_bags[table.name].weight for table in tables],  # type: ignore[misc]
    )


@torch.fx.wrap
def _pooled(
    features: KeyedJaggedTensor, feature_names: list[list[str]], keys: list[str], weights: list[Tensor]
) -> KeyedTensor:
    """Return the bags of every feature of every table, (B, sum of widths) float32."""
    jagged = split_features(features)
    flat = [name for names in feature_names for name in names]
    bags = [_bags(jagged[name], weight) for names, weight in zip(feature_names, weights, strict=True) for name in names]
    widths = [weight.shape[1] for names, weight in zip(feature_names, weights, strict=True) for _ in names]
    inverse = reorder_inverse_indices(inverse_indices=features.inverse_indices_or_none(), feature_names=flat)
    values = process_pooled_embeddings(pooled_embeddings=bags, inverse_indices=inverse)
    return KeyedTensor(keys=keys, length_per_key=widths, values=values)


def _bags(feature: JaggedTensor, weight: Tensor) -> Tensor:
    """Return the weighted sums of one feature, (B, D) float32."""
    ids, offsets, factors = feature.values(), feature.offsets(), feature.weights()
    if weight.dtype in HALF:  # torch would have weights rounded to it; FBGEMM's sums of such a table are float32, too
        return pool_rows(TableRows(weight, ids).gather().float(), offsets, factors)
    factors = factors.to(weight.dtype)
    return F.embedding_bag(
        ids, weight, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
    ).float()
