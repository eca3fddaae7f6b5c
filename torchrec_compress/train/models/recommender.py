"""What the trainer needs of a model, whatever it recommends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def binary_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the mean binary cross-entropy in nats, () float32.

    Args:
        logits: (B,) float32.
        target: (B,) float32 in [0, 1].
        weights: (B,) float32 of the rows.
    """
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weights).mean()


class Prediction(NamedTuple):
    """What a model returns.

    Attributes:
        logits: (B,) float32 of clicks; (B, 3) float32 of sequences, see `NextItemNet`.
        embeddings: (B, sum of widths) float32 that they came from, for an l2 of what a batch looks up; empty where a
            model has none.
    """

    logits: Tensor
    embeddings: Tensor


class Recommender(nn.Module, ABC):
    """A model over one collection of tables.

    Attributes:
        embeddings: the collection, stock, compressed or sharded, of pooled or of unpooled tables.
        fields: width by feature, in the order of `Prediction.embeddings`.
    """

    embeddings: Any
    fields: dict[str, int]

    @abstractmethod
    def forward(self, features: KeyedJaggedTensor, dense: Tensor | None = None) -> Prediction:
        """Return the prediction of a batch."""

    @abstractmethod
    def table_configs(self) -> list[Any]:
        """Return the configs of the tables, before they are sharded."""

    @abstractmethod
    def entropy(self, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch, () float32.

        Args:
            logits: of a `Prediction`.
            target: (B,) float32 in [0, 1], the label or what a teacher says.
            weights: (B,) float32 of the rows.
        """
