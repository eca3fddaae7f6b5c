"""A small DeepFM that has learned the embedded generator's clicks, and its batches."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from torchrec_compress.train.config import GeneratorConfig, ModelConfig
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.models.click import ClickModel, make_model, tables_of

ROWS = {"user": 200, "item": 80, "hour": 24, "device": 4, "region": 40}
Batch = tuple[KeyedJaggedTensor, Tensor]


@cache
def batches() -> list[Batch]:
    """Return batches of the training split, of 1,000 clicks each."""
    data = generate(GeneratorConfig(num_rows=20_000, num_users=ROWS["user"], num_items=ROWS["item"], zipf=0.5))
    ids, labels = data.train.ids.long(), data.train.labels
    ones = torch.ones(1000 * len(ROWS), dtype=torch.int64)
    return [
        (KeyedJaggedTensor.from_lengths_sync(list(ROWS), ids[first : first + 1000].T.flatten(), ones), part)
        for first, part in zip(range(0, len(ids), 1000), labels.split(1000), strict=True)
    ]


@cache
def trained(width: int = 8) -> ClickModel:
    """Return the model after a few passes; who changes it copies it first."""
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=width, hidden=[16], init_scale=0.1)
    model = make_model(EmbeddingBagCollection(tables_of(config, ROWS)), 0, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        for features, labels in batches():
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(features).logits, labels).backward()
            optimizer.step()
    return model


def logits_of(model: ClickModel, batch: Batch) -> Tensor:
    """Return the logits of a batch."""
    return model(batch[0]).logits


@torch.no_grad()
def logloss(model: ClickModel) -> float:
    """Return the mean logloss over all batches, in float64."""
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(model(features).logits.double(), labels.double())
        for features, labels in batches()
    ]
    return float(torch.stack(losses).mean())


def counts(table: str) -> Tensor:
    """Return the look-ups per id of a table over all batches."""
    return sum(torch.bincount(features[table].values(), minlength=ROWS[table]) for features, _ in batches())  # type: ignore[return-value]


def weight_of(model: ClickModel, table: str) -> Tensor:
    """Return a table's weight."""
    return model.embeddings.embedding_bags[table].weight  # type: ignore[index, union-attr, return-value]
