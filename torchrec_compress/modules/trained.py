"""Tables whose rows have a few bits and are trained where they lie, in the backward of their look-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import reorder_inverse_indices
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_compress.modules.features import IdRange, split_features
from torchrec_compress.modules.replicated import SHARDERS
from torchrec_compress.modules.row_optimizer import RowOptimizer
from torchrec_compress.modules.trained_rows import TrainedTable, WholeRows

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("split_features")


class TrainedCollection(nn.Module):
    """Hold whole tables of trained rows, and look up a row for each id.

    Args:
        tables: one config per table.
        is_weighted: whether batches carry weights.
        device: of all tensors.

    Attributes:
        banks: `WholeRows` by table name.
        also_checked: ids of dense tables beside it, which its sharded form checks before any rank waits for another.
    """

    pooled: ClassVar[bool] = False
    also_checked: Sequence[IdRange] = ()

    def __init__(self, tables: Sequence[TrainedTable], is_weighted: bool, device: torch.device | None) -> None:
        super().__init__()
        self._configs, self.is_weighted = tuple(tables), is_weighted
        self.banks: Any = nn.ModuleDict({table.name: WholeRows(table, device) for table in tables})

    def configs(self) -> tuple[TrainedTable, ...]:
        """Return the configs of the tables."""
        return self._configs

    def table(self, name: str) -> TrainedTable:
        """Return the config of a table."""
        (found,) = (table for table in self._configs if table.name == name)
        return found

    def state_bytes(self, name: str, optimizer: str | None) -> int:
        """Return the bytes per row of a table's optimizer state.

        Args:
            name: of the table.
            optimizer: that tables are given, by its class or FBGEMM's name; None: FBGEMM's default.
        """
        part = self.table(name).part
        return part.format(RowOptimizer.of(optimizer or "exact_sgd", {}, part, f"table {name!r}").kind).state_bytes

    def trains(self, table: str) -> bool:
        """Return whether the rows of a table are trained."""
        return self.banks[table].handle.requires_grad

    def reset_parameters(self) -> None:
        """Draw all rows anew."""
        for rows in self.banks.values():
            rows.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the bags of every look-up, (B, width) float32, or rows, (L, width), by its key.

        Raises:
            ValueError: an id is out of range; in training, no optimizer trains the rows, or several ranks would train
                copies of them.
        """
        jagged = split_features(features)
        found: dict[str, Tensor] = {}
        for table in self._configs:
            found |= self._look_up(table, jagged)
        keys = [key for table in self._configs for key in table.keys]
        names = [name for table in self._configs for name in table.features]
        return in_batch_order(found, keys, names, features) if self.pooled else found

    def _look_up(self, table: TrainedTable, jagged: dict[str, JaggedTensor]) -> dict[str, Tensor]:
        """Return the look-ups of one table by key; all its features are one look-up, whose gradients are one step."""
        rows = self.banks[table.name]
        ids = table.ids(jagged)
        handle = rows._parameters["handle"]  # past the attributes that fx records
        if not (self.training and torch.is_grad_enabled() and handle.requires_grad):
            bags = [self._bags_of(jagged[name]) for name in table.features]
            return {
                key: rows.look_up(mine, *given, f"{table.where}, feature {name!r}")
                for key, name, mine, given in zip(table.keys, table.features, ids, bags, strict=True)
            }
        self._check_trains(table, ids)
        rows.find_optimizer()
        batch = Bags.of([jagged[name] for name in table.features], self.pooled, self.is_weighted)
        bags = rows.look_up_to_train(torch.cat(ids), batch.offsets, batch.weights, table.where)
        return dict(zip(table.keys, bags.split(batch.counts), strict=True))

    def _bags_of(self, feature: JaggedTensor) -> tuple[Tensor | None, Tensor | None]:
        """Return offsets and weights of a feature, where there are any."""
        return feature.offsets() if self.pooled else None, feature.weights() if self.is_weighted else None

    def _check_trains(self, table: TrainedTable, ids: list[Tensor]) -> None:
        """Raise ValueError where a look-up cannot be one of a training step."""
        if isinstance(ids[0], torch.fx.Proxy):
            raise ValueError(
                f"{table.where}: a table of trained rows must be traced in evaluation mode, got it in training, whose "
                "updates a trace would not show; call eval() first, or shard it"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"{table.where}: several ranks must share trained rows, got a copy on each, which would drift apart; "
                f"{SHARDERS}"
            )


class TrainedBags(TrainedCollection):
    """Tables of trained rows of a pooled collection, whose sharder takes the settings of the user's bags."""

    pooled = True


@dataclass(frozen=True)
class Bags:
    """The bags of several features, one feature after another.

    Args:
        offsets: (bags + 1,), or None for one bag an id.
        weights: (L,), or None.
        counts: bags of each feature.
    """

    offsets: Tensor | None
    weights: Tensor | None
    counts: list[int]

    @classmethod
    def of(cls, features: Sequence[JaggedTensor], pooled: bool, is_weighted: bool) -> Bags:
        """Return them for features of a batch."""
        weights = torch.cat([feature.weights() for feature in features]) if is_weighted else None
        if not pooled:
            return cls(None, weights, [len(feature.values()) for feature in features])
        lengths = torch.cat([feature.lengths() for feature in features])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
        return cls(offsets, weights, [len(feature.lengths()) for feature in features])


@torch.fx.wrap
def in_batch_order(
    found: dict[str, Tensor], keys: list[str], names: list[str], features: KeyedJaggedTensor
) -> dict[str, Tensor]:
    """Return the bags, (B, width) by look-up key, of the examples of a batch whose features have bags of their own.

    Args:
        found: by look-up key, as many bags as the feature has.
        keys: of the look-ups.
        names: of their features.
        features: the batch; it says which bags its examples have where these are fewer.
    """
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return found
    places = reorder_inverse_indices(inverse_indices=inverse, feature_names=names)
    return {key: found[key].index_select(0, place) for key, place in zip(keys, places, strict=True)}
