"""What a training step minimises, in the form that TorchRec's pipelines call: one module from a batch to a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.train.config import StageConfig
from torchrec_compress.train.data.batch import Batch
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.models.recommender import Recommender, binary_entropy
from torchrec_compress.train.ranks import Ranks


class Loss(nn.Module):
    """The loss of a batch, its mean over ranks being the mean over the global batch.

    Args:
        stage: its `distill_weight`, `start_l2`, `skip_bad_batches`, `optim.lookup_l2` and `optim.adaptive_l2` count.
        ranks: that share the batch.
        teacher: (train rows,) float32 logits to imitate, or None.
        fields: width by feature, in the order of the embeddings.
        rarity: of ids, where there is an `adaptive_l2`.
        entropy: the model's, of logits, targets and weights.

    Attributes:
        pulled: parameters that are pulled to where the stage started, with those values, by name.
        was_skipped: whether the last batch is left out, since its loss is not finite on some rank. Known before the
            backward pass only with `skip_bad_batches`, which costs a wait for the other ranks in every step.
    """

    def __init__(
        self,
        stage: StageConfig,
        ranks: Ranks,
        teacher: Tensor | None,
        fields: Mapping[str, int],
        rarity: Rarity | None = None,
        entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = binary_entropy,
    ) -> None:
        super().__init__()
        self._stage, self._ranks, self._teacher = stage, ranks, teacher
        self._fields, self._rarity, self._entropy = dict(fields), rarity, entropy
        self.was_skipped = False
        self.pulled: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        rows: Tensor,
        weights: Tensor,
        features: KeyedJaggedTensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what is minimised, and the cross-entropy in it.

        Args:
            logits: what the model returned, see `Prediction`.
            embeddings: (B, sum of widths) float32, from which the logits came.
            labels: (B,) float32, 0 or 1.
            rows: (B,) int64 positions in the train split, for the teacher.
            weights: (B,) float32 of the rows, see `Batch`.
            features: ids of the batch.

        Returns:
            () float32 both.
        """
        if (
            self._teacher is not None and self.training
        ):  # the cross-entropy is linear in its target, so both terms are one
            taught = self._teacher[rows.to(self._teacher.device)].to(labels.device).sigmoid()
            labels = torch.lerp(labels, taught, self._stage.distill_weight)
        entropy = self._entropy(logits, labels, weights)
        loss = entropy
        if self._stage.optim.lookup_l2:
            loss = loss + self._stage.optim.lookup_l2 / 2 * (embeddings.square().sum(1) * weights).mean()
        if self._rarity is not None:
            loss = loss + self._stage.optim.adaptive_l2 / 2 * (self._pull(embeddings, features) * weights).mean()
        for parameter, start in self.pulled.values():
            loss = loss + self._stage.start_l2 / 2 * (parameter - start).square().sum()
        self.was_skipped = self.training and self._stage.skip_bad_batches > 0 and self._is_bad(loss)
        if self.was_skipped:  # a loss that hangs on nothing: no rank sends gradients, none waits for them
            loss = torch.zeros_like(loss, requires_grad=True)
        return loss, entropy

    def _pull(self, embeddings: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Return the squares of a row's embeddings, each times the rarity of its ids, summed: (B,)."""
        assert self._rarity is not None
        squares = [field.sum(1) for field in embeddings.square().split([*self._fields.values()], dim=1)]
        return (torch.stack(squares, dim=1) * self._rarity(features, [*self._fields])).sum(1)

    def _is_bad(self, loss: Tensor) -> bool:
        """Return whether the loss is not finite on any rank."""
        bad = torch.tensor([int(not bool(torch.isfinite(loss)))])
        if self._ranks.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return bool(bad)


class TrainStep(nn.Module):
    """A model and its loss.

    Args:
        model: the recommender.
        loss: of its output.
    """

    def __init__(self, model: Recommender, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Batch]]:
        """Return what is minimised, and (cross-entropy, logits, batch) for whoever watches the training."""
        found = self.model(batch.features, batch.dense)
        # indexed rather than unpacked: the pipeline traces this function with stand-ins for tensors
        losses = self.loss(found.logits, found.embeddings, batch.labels, batch.rows, batch.weights, batch.features)
        return losses[0], (losses[1].detach(), found.logits.detach(), batch)
