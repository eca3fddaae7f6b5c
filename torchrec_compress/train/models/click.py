"""DLRM, DLRM-DCNv2, DeepFM and DCN-V2 over any embedding bag collection, from TorchRec's own modules where they fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_compress.train.config import ModelConfig
from torchrec_compress.train.models.recommender import Prediction, Recommender, binary_entropy


@torch.fx.wrap  # TorchRec's pipeline traces models with stand-ins for tensors
def in_order(pooled: KeyedTensor, keys: list[str]) -> Tensor:
    """Return the embeddings of all keys side by side; TorchRec orders those of sharded tables by their ranks."""
    return pooled.values() if pooled.keys() == keys else KeyedTensor.regroup([pooled], [keys])[0]


def tables_of(config: ModelConfig, rows: Mapping[str, int]) -> list[EmbeddingBagConfig]:
    """Return a table per feature.

    Args:
        config: of the model.
        rows: by feature.

    Raises:
        ValueError: a width that FBGEMM or the model does not allow, or a width for an unknown table.
    """
    unknown = sorted(set(config.widths) - set(rows))
    if unknown:
        raise ValueError(f"model.widths: must name tables of {list(rows)}, got {unknown}")
    widths = {name: config.widths.get(name, config.embedding_dim) for name in rows}
    if any(width < 4 or width % 4 for width in widths.values()):
        raise ValueError(f"model.embedding_dim: must be a multiple of 4 (FBGEMM), got {widths}")
    if len(set(widths.values())) > 1 and config.name != "dcnv2":
        raise ValueError(
            f"model.widths: must all be equal with model.name = {config.name!r}, got {widths}; use 'dcnv2'"
        )
    scale = config.init_scale
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=size,
            embedding_dim=widths[name],
            feature_names=[name],
            init_fn=None if scale is None else Uniform(scale),
        )
        for name, size in rows.items()
    ]


class Uniform:
    """Fill a table uniformly in +- `scale`; a class, since configs are copied and pickled."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, weight: Tensor) -> Tensor:
        """Fill a weight in place."""
        return nn.init.uniform_(weight, -self._scale, self._scale)


def deep_net(width: int, config: ModelConfig, num_out: int | None = 1) -> nn.Module:
    """Return the deep part: (B, width) -> (B, num_out), or the last hidden layer's output where num_out is None.

    TorchRec's `MLP` has neither dropout nor batch normalisation, which small sets need; it serves where both are off.
    """
    last = [] if num_out is None else [nn.Linear(config.hidden[-1], num_out)]
    layers: list[nn.Module] = [nn.Dropout(config.input_dropout)] if config.input_dropout else []
    if not config.batch_norm and not config.dropout:
        return nn.Sequential(*layers, MLP(width, list(config.hidden)), *last)
    for inputs, outputs in zip([width, *config.hidden], config.hidden, strict=False):
        layers.append(nn.Linear(inputs, outputs))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
    return nn.Sequential(*layers, *last)


class ClickModel(Recommender):
    """Look embeddings up and combine them; heirs define `combine`.

    Args:
        embeddings: any collection with one feature per table.
        num_dense: dense columns, C; 0 for none.
        config: of the model.

    Attributes:
        fields: width by feature, in the order of `Prediction.embeddings`.
    """

    def __init__(self, embeddings: EmbeddingBagCollectionInterface, num_dense: int, config: ModelConfig) -> None:
        super().__init__()
        if not config.hidden or min(config.hidden) < 1:
            raise ValueError(f"model.hidden: must hold at least one positive width, got {config.hidden}")
        if config.bottom and (not num_dense or not isinstance(self, _DenseFieldModel)):
            raise ValueError(
                f"model.bottom: must be empty without dense columns and with model.name = {config.name!r} unless that "
                f"is 'dlrm' or 'dlrm_dcnv2', got {config.bottom} for {num_dense} dense columns"
            )
        tables = embeddings.embedding_bag_configs()
        self.embeddings = embeddings
        self.fields = {name: table.embedding_dim for table in tables for name in table.feature_names}
        self._num_features = len(tables)
        self._width = sum(table.embedding_dim for table in tables)
        self._dim = tables[0].embedding_dim
        self._bfloat16 = config.bfloat16
        self._drop = nn.Dropout(config.embedding_dropout)
        self._build(num_dense, config)

    @abstractmethod
    def _build(self, num_dense: int, config: ModelConfig) -> None:
        """Make the heir's parts."""

    @abstractmethod
    def combine(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return logits (B, 1) from embeddings (B, sum of widths) and dense columns (B, C)."""

    def table_configs(self) -> list[EmbeddingBagConfig]:
        """Return the configs of the tables."""
        return self.embeddings.embedding_bag_configs()

    def entropy(self, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """Return the binary cross-entropy."""
        return binary_entropy(logits, target, weights)

    def run_deep(self, net: nn.Module, inputs: Tensor) -> Tensor:
        """Run a part of the net, in bfloat16 where the config asks for it; the result is float32."""
        if not self._bfloat16:
            return net(inputs)
        device = next(net.parameters()).device.type  # not that of the inputs, which the pipeline traces with stand-ins
        with torch.autocast(device, torch.bfloat16):
            return net(inputs).float()

    def forward(self, features: KeyedJaggedTensor, dense: Tensor | None = None) -> Prediction:
        """Return the logits and embeddings of a batch."""
        looked_up = in_order(self.embeddings(features), [*self.fields])
        return Prediction(self.combine(self._drop(looked_up), dense).squeeze(1), looked_up)


class DeepFM(ClickModel):
    """A factorisation machine over the fields beside a deep net (arXiv 1703.04247), without the first-order tables.

    TorchRec's `FactorizationMachine` flattens its input, so it crosses single values; the paper's sum over pairs of
    fields would need a transposed copy of all embeddings for it, which took half of a step.
    Dense columns are one more field.
    """

    def _build(self, num_dense: int, config: ModelConfig) -> None:
        self._fields = self._num_features + bool(num_dense)
        self.dense_field = nn.Linear(num_dense, self._dim) if num_dense else None
        self.deep = deep_net(self._fields * self._dim, config)

    def combine(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return logits (B, 1)."""
        if self.dense_field is not None:
            assert dense is not None
            embedded = torch.cat([embedded, self.dense_field(dense)], dim=1)
        fields = embedded.view(-1, self._fields, self._dim).sum(1)
        pairs = 0.5 * (torch.linalg.vecdot(fields, fields) - torch.linalg.vecdot(embedded, embedded))
        return pairs.unsqueeze(1) + self.run_deep(self.deep, embedded)


class _DenseFieldModel(ClickModel):
    """A model whose dense columns become one more field, by a bottom net.

    Without dense columns the bottom net has nothing to read; a trained vector takes its place.
    """

    def _build(self, num_dense: int, config: ModelConfig) -> None:
        widths = config.bottom or [*config.hidden, self._dim]
        if widths[-1] != self._dim:
            raise ValueError(f"model.bottom: must end with model.embedding_dim = {self._dim}, got {config.bottom}")
        self.bottom = MLP(num_dense, list(widths)) if num_dense else None
        self.constant = None if num_dense else nn.Parameter(torch.full((self._dim,), 0.01))
        self._build_top(config)

    @abstractmethod
    def _build_top(self, config: ModelConfig) -> None:
        """Make the parts after the bottom net."""

    def dense_field(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return the field of the dense columns: (B, D)."""
        if self.bottom is not None:
            assert dense is not None
            return self.bottom(dense)
        assert self.constant is not None
        return self.constant.expand(embedded.shape[0], -1)


class DLRM(_DenseFieldModel):
    """Dot products of all pairs of fields, then a deep net (arXiv 1906.00091)."""

    def _build_top(self, config: ModelConfig) -> None:
        self.interaction = InteractionArch(self._num_features)
        num_pairs = self._num_features * (self._num_features + 1) // 2
        # the embeddings too, as BARS's DLRM has them: dot products alone are weak with few fields
        self.deep = deep_net(self._dim + num_pairs + self._width, config)

    def combine(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return logits (B, 1)."""
        fields = embedded.view(-1, self._num_features, self._dim)
        pairs = self.interaction(self.dense_field(embedded, dense), fields)
        return self.run_deep(self.deep, torch.cat([pairs, embedded], dim=1))


class DLRMDCNV2(_DenseFieldModel):
    """Cross layers over all fields, then a deep net: MLPerf's recommender since its version 3.0.

    Equal to TorchRec's `DLRM_DCN` without dropout and batch normalisation.
    """

    def _build_top(self, config: ModelConfig) -> None:
        width = self._width + self._dim
        self.cross = LowRankCrossNet(width, config.num_cross_layers, config.cross_rank or max(1, width // 4))
        self.deep = deep_net(width, config)

    def combine(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return logits (B, 1)."""
        fields = torch.cat([self.dense_field(embedded, dense), embedded], dim=1)
        return self.run_deep(self.deep, self.run_deep(self.cross, fields))


class DCNV2(ClickModel):
    """Cross layers beside a deep net (arXiv 2008.13535)."""

    def _build(self, num_dense: int, config: ModelConfig) -> None:
        width = self._width + num_dense
        self.cross = LowRankCrossNet(width, config.num_cross_layers, config.cross_rank or max(1, width // 4))
        self.deep = deep_net(width, config, None)
        self.last = nn.Linear(width + config.hidden[-1], 1)

    def combine(self, embedded: Tensor, dense: Tensor | None) -> Tensor:
        """Return logits (B, 1)."""
        inputs = embedded if dense is None else torch.cat([embedded, dense], dim=1)
        return self.last(torch.cat([self.run_deep(self.cross, inputs), self.run_deep(self.deep, inputs)], dim=1))


_MODELS = {"deepfm": DeepFM, "dlrm": DLRM, "dcnv2": DCNV2, "dlrm_dcnv2": DLRMDCNV2}


def make_model(embeddings: EmbeddingBagCollectionInterface, num_dense: int, config: ModelConfig) -> ClickModel:
    """Build the model that the config names.

    Raises:
        ValueError: hidden widths that are missing.

    Example:
        >>> from torchrec import EmbeddingBagCollection
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=9, embedding_dim=4, feature_names=["user"])
        >>> type(make_model(EmbeddingBagCollection(tables=[table]), 0, ModelConfig(name="dlrm"))).__name__
        'DLRM'
    """
    return _MODELS[config.name](embeddings, num_dense, config)
