"""The sharder of tables of trained rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from torchrec_compress.modules.row_optimizer import BETAS, RowOptimizer
from torchrec_compress.modules.trained import TrainedBags, TrainedCollection
from torchrec_compress.modules.trained_rows import WholeRows
from torchrec_compress.seams import backward_optimizer, backward_settings, num_backward_optimizers
from torchrec_compress.sharding.native import RowSharder
from torchrec_compress.sharding.trained import ShardedTrainedCollection

# what FBGEMM's tables do where nothing is said
_DEFAULTS = {"lr": 0.01, "eps": 1e-8}
_NAMES = {
    "learning_rate": "lr",
    "eps": "eps",
    "weight_decay": "weight_decay",
    "beta1": "beta1",
    "beta2": "beta2",
}


class TrainedCollectionSharder(RowSharder[TrainedCollection]):
    """Shard tables of trained rows row-wise or table-wise; arguments as in `RowSharder`."""

    def make(
        self, module: TrainedCollection, params: dict[str, ParameterSharding], env: ShardingEnv, device: torch.device
    ) -> ShardedTrainedCollection:
        """Return the sharded collection."""
        optimizers = {
            table.name: self._optimizer(module.banks[table.name], table.part, table.where) for table in module.configs()
        }
        return ShardedTrainedCollection(module, params, env, device, optimizers, self.qcomm_codecs_registry)

    def marked(self, module: TrainedCollection) -> Iterable[nn.Parameter]:
        """Return the handles of tables."""
        return [rows.handle for rows in module.banks.values()]

    def _optimizer(self, rows: WholeRows, part: Any, where: str) -> RowOptimizer:
        """Return what trains a table: by what `apply_optimizer_in_backward` said of it and by the fused parameters."""
        given, marked = self.fused_params or {}, backward_optimizer(rows.handle)
        if num_backward_optimizers(rows.handle) > 1:
            raise ValueError(
                f"{where}: rows must be trained by one optimizer, got {num_backward_optimizers(rows.handle)}; call "
                "apply_optimizer_in_backward once for each parameter"
            )
        lost = sorted(set(given) - {"optimizer", "output_dtype", *_NAMES})
        if lost:
            raise ValueError(
                f"{where}: fused_params must be of {['optimizer', *_NAMES]} for rows of {part.bits} bits, which FBGEMM "
                f"does not train, got {lost}; leave them out, or mark native_parameters(model) by "
                "apply_optimizer_in_backward"
            )
        name = str(getattr(given.get("optimizer"), "value", given.get("optimizer", "exact_sgd")))
        settings = {_NAMES[key]: value for key, value in given.items() if key in _NAMES}
        # a mark comes before the sharder's settings, and these before FBGEMM's, as for TorchRec's tables
        settings = _with_betas({**_DEFAULTS, **settings, **backward_settings(rows.handle)})
        return RowOptimizer.of(name if marked is None else marked, settings, part, where)

    def shardable_parameters(self, module: TrainedCollection) -> dict[str, nn.Parameter]:
        """Return the rows by the names of the user's tables; they are buffers."""
        return {name: rows.rows for name, rows in module.banks.items()}

    @property
    def module_type(self) -> type[TrainedCollection]:
        """The module that is sharded."""
        return TrainedCollection


def _with_betas(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in the words of torch's Adam, whose two betas are one, where FBGEMM has a word for each."""
    given = {key: settings.pop(key) for key in ("beta1", "beta2") if key in settings}
    if given and "betas" not in settings:
        settings["betas"] = (given.get("beta1", BETAS[0]), given.get("beta2", BETAS[1]))
    return settings


class TrainedBagsSharder(TrainedCollectionSharder):
    """Shard tables of trained rows of pooled collections."""

    of_bags = True

    @property
    def module_type(self) -> type[TrainedBags]:
        """The module that is sharded."""
        return TrainedBags
