"""HSTU and SASRec over one table of items, which what was read and what may come next share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.train.config import ModelConfig
from torchrec_compress.train.data.sequences import held_feature, sequence_features
from torchrec_compress.train.models.attention import PointwiseBlock, SoftmaxBlock, check_heads
from torchrec_compress.train.models.click import Uniform
from torchrec_compress.train.models.recommender import Prediction, Recommender

# what is scored at once in evaluation: rows, and their scores of all items
_SCORED, _SCORES = 512, 2**24


def item_table(config: ModelConfig, item: str, num_items: int) -> EmbeddingConfig:
    """Return the one table, which three features look up; see `sequence_features`.

    Raises:
        ValueError: a width that FBGEMM does not allow or that heads do not divide.
    """
    width, scale = config.embedding_dim, config.init_scale
    if width % 4:
        raise ValueError(f"model.embedding_dim: must be a multiple of 4 (FBGEMM), got {width}")
    check_heads(width, config.attention.num_heads)
    return EmbeddingConfig(
        name=item,
        num_embeddings=num_items,
        embedding_dim=width,
        feature_names=[*sequence_features(item)],
        init_fn=None if scale is None else Uniform(scale),
    )


class SequenceModel(Recommender):
    """Say which item comes next, by "hstu" or "sasrec".

    Args:
        embeddings: any collection of unpooled embeddings with the one table, `item_table`.
        max_length: the most items that are read at once, L.
        config: of the model.

    Shapes: `forward` takes the features of `SequenceData`; see `NextItemNet` for what it returns.

    Raises:
        ValueError: at forward a batch of no sequences, and what `NextItemNet` refuses.
    """

    def __init__(self, embeddings: EmbeddingCollectionInterface, max_length: int, config: ModelConfig) -> None:
        super().__init__()
        (table,) = embeddings.embedding_configs()
        self.embeddings, self.fields = embeddings, {}
        self._keys = sequence_features(table.name)
        self.net = NextItemNet(table, max_length, config)

    def table_configs(self) -> list[EmbeddingConfig]:
        """Return the config of the table."""
        return self.embeddings.embedding_configs()

    def forward(self, features: KeyedJaggedTensor, dense: Tensor | None = None) -> Prediction:
        """Return what is known of the next items of a batch."""
        # a stand-in of TorchRec's pipeline is no batch
        if isinstance(features, KeyedJaggedTensor) and not features.stride():
            raise ValueError(
                "SequenceModel: a batch must have a sequence, got none; a rank that is left without is given one of "
                "weight 0, as SequenceData does"
            )
        rows = self.embeddings(features)
        found = self.net(features, *[rows[key].values() for key in self._keys])
        return Prediction(found[0], found[1])

    def entropy(self, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """Return the cross-entropy of what came next; in training, among sampled items."""
        return (logits[:, 0] * weights).mean()


class NextItemNet(nn.Module):
    """Read rows of items and score what may come next.

    An item is its row times sqrt(D) and a learnt row of its position; what the blocks make of the last one is
    normalised, and its product with an item's own row is that item's score.

    Args:
        table: of the items, N rows of width D.
        max_length: positions that there are, L.
        config: of the model.

    Raises:
        ValueError: heads that do not divide the width; at forward a sequence that is longer than L, or a pool that is
            not of all items in their order in evaluation.
    """

    def __init__(self, table: EmbeddingConfig, max_length: int, config: ModelConfig) -> None:
        super().__init__()
        width, heads, dropout = table.embedding_dim, config.attention.num_heads, config.dropout
        self._num_items, self._max_length = table.num_embeddings, max_length
        self._keys = sequence_features(table.name)
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self._drop = nn.Dropout(config.embedding_dropout)
        blocks: list[nn.Module] = [
            PointwiseBlock(width, heads, max_length, dropout)
            if config.name == "hstu"
            else SoftmaxBlock(width, heads, dropout)
            for _ in range(config.attention.num_blocks)
        ]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)

    def forward(self, features: KeyedJaggedTensor, inputs: Tensor, ahead: Tensor, pool: Tensor) -> Prediction:
        """Return what a batch is judged by.

        Args:
            features: ids of the batch.
            inputs: (T, D) float32, rows of the items that were.
            ahead: (T or B, D) float32, rows of what came next: after each item in training, after the last one else.
            pool: (P, D) float32, rows of the pool.

        Returns:
            Logits, (B, 3) float32: the cross-entropy of what came next, in nats, in training the mean over a row's
            items among the pool, else among all items that its sequence did not hold; then, in evaluation, how many of
            those score more than what came next, and how many score the same. A row that holds nothing has the
            cross-entropy 0 in training, and scores all items alike else. The embeddings are empty.
        """
        was, came, drawn = (features[key] for key in self._keys)
        held = features[held_feature(self._keys[0])]
        lengths = was.lengths().long()
        longest = int(lengths.max())
        if longest > self._max_length:
            raise ValueError(
                f"NextItemNet: sequences must have at most data.sequence.max_length = {self._max_length} items, got "
                f"{longest}; cut them to their last ones"
            )
        if self.training:
            told = self._contrast(lengths, inputs, ahead, pool, came.values(), drawn.values())
            return Prediction(torch.stack([told, torch.zeros_like(told), torch.zeros_like(told)], dim=1), inputs[:0])
        if pool.shape[0] != self._num_items:
            raise ValueError(
                f"NextItemNet: the pool must be all {self._num_items} items in evaluation, got {pool.shape[0]}"
            )
        return Prediction(self._ranked(lengths, inputs, pool, came.values().long(), held), inputs[:0])

    def _encode(self, lengths: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the blocks make of sequences, (B, T, D), and which of it is there, (B, T) bool."""
        size = max(int(lengths.max()), 1)
        present = torch.arange(size, device=lengths.device) < lengths[:, None]
        padded = inputs.new_zeros(*present.shape, inputs.shape[1])
        padded = padded.index_put((present,), inputs * inputs.shape[1] ** 0.5)
        rows = self._drop(padded + self.positions[:size])
        return self.norm(self.blocks(rows)), present

    def _contrast(
        self, lengths: Tensor, inputs: Tensor, ahead: Tensor, pool: Tensor, came: Tensor, drawn: Tensor
    ) -> Tensor:
        """Return the mean cross-entropy of each row's next items among themselves and the pool: (B,)."""
        encoded, present = self._encode(lengths, inputs)
        states = encoded[present]
        scores = (states @ pool.t()).masked_fill(came[:, None] == drawn, -torch.inf)
        right = torch.linalg.vecdot(states, ahead)
        lost = torch.logsumexp(torch.cat([right[:, None], scores], dim=1), dim=1) - right
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return lost.new_zeros(len(lengths)).index_add(0, owner, lost) / lengths.clamp(min=1)

    def _ranked(self, lengths: Tensor, inputs: Tensor, items: Tensor, came: Tensor, held: JaggedTensor) -> Tensor:
        """Return what `forward` does in evaluation, some rows at a time."""
        found = inputs.new_empty(len(lengths), 3)  # made first: pieces kept between large scores would part the heap
        size = min(_SCORED, max(1, _SCORES // self._num_items))
        ends, held_ends = torch.cumsum(lengths, 0), torch.cumsum(held.lengths().long(), 0)
        for first in range(0, len(lengths), size):
            mine = lengths[first : first + size]
            span = slice(int(ends[first] - lengths[first]), int(ends[first + len(mine) - 1]))
            encoded, _ = self._encode(mine, inputs[span])
            rows = torch.arange(len(mine), device=mine.device)
            states = encoded[rows, mine.clamp(min=1) - 1] * (mine > 0)[:, None]
            scores, targets = states @ items.t(), came[first : first + size]
            right = scores[rows, targets]
            gone = held.lengths()[first : first + size].long()
            span = slice(int(held_ends[first] - gone[0]), int(held_ends[first + len(mine) - 1]))
            scores[torch.repeat_interleave(rows, gone), held.values()[span].long()] = -torch.inf
            scores[rows, targets] = right
            lost = torch.logsumexp(scores, dim=1) - right
            above, level = (scores > right[:, None]).sum(1), (scores == right[:, None]).sum(1) - 1
            found[first : first + size] = torch.stack([lost, above.to(lost), level.to(lost)], dim=1)
        return found
