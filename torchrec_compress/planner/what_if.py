"""What if tables were stored otherwise: those of a model, built anew on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress.methods import DenseConfig, MethodConfig
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.modules.embedding import CompressedEmbeddingCollection
from torchrec_compress.modules.embedding_bag import CompressedEmbeddingBagCollection
from torchrec_compress.modules.trained import TrainedCollection
from torchrec_compress.planner.accounting import fused_state_bytes
from torchrec_compress.planner.constraints import shardable_modules, translate_constraints
from torchrec_compress.seams import backward_optimizer, copy_backward_optimizer
from torchrec_compress.sharding import compressed_sharders

_META = torch.device("meta")


class WhatIf:
    """Every collection of a model, to be built again with other methods; other shardable modules stay as they are.

    Args:
        module: the model.
        sharders: of the planner.

    Attributes:
        names: of all tables, twice where two collections have one of that name.
        tables: configs by table name.
        methods: as they are now, by table name; "dense" for TorchRec's own collections.
        sharders: those given, and ours where they were missing, since a changed table needs them.
    """

    def __init__(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> None:
        given = {sharder.module_type for sharder in sharders}
        settings = [
            sharder for sharder in sharders if sharder.module_type in (EmbeddingBagCollection, EmbeddingCollection)
        ]
        ours = compressed_sharders(settings) if settings else compressed_sharders(fused_params={})
        self.sharders = [*sharders, *(sharder for sharder in ours if sharder.module_type not in given)]
        self.tables: dict[str, Any] = {}
        self.methods: dict[str, MethodConfig] = {}
        self._collections = [part for part in module.modules() if isinstance(part, CompressedParts)]
        inside = {id(child) for part in self._collections for child in part.modules()}
        self._others: list[nn.Module] = []
        self._stock: list[EmbeddingBagCollection | EmbeddingCollection] = []
        for _, part, _ in shardable_modules(module, sharders):
            if id(part) in inside:
                continue
            if isinstance(part, EmbeddingBagCollection | EmbeddingCollection):
                self._stock.append(part)
            else:
                self._others.append(part)
        self.names = [table.name for part in self._parts() for table in _configs(part)]
        for part in self._collections:
            self.tables |= {table.name: table for table in part.blueprint.tables}
            self.methods |= part.methods()
        for part in self._stock:
            self.tables |= {table.name: table for table in _configs(part)}
            self.methods |= {table.name: DenseConfig() for table in _configs(part)}

    def build(self, changes: Mapping[str, MethodConfig]) -> nn.Module:
        """Return all tables on the meta device, some with other methods, and the optimizers in their backwards."""
        return nn.ModuleList([*self._others, *(self._rebuilt(part, changes) for part in self._parts())])

    def constraints(
        self, model: nn.Module, constraints: Mapping[str, ParameterConstraints] | None, compute_device: str
    ) -> dict[str, ParameterConstraints]:
        """Return the constraints of the planner for a model that `build` returned."""
        logger = logging.getLogger("torchrec_compress.planner.constraints")
        was, logger.disabled = logger.disabled, True  # the user was told once
        try:
            return translate_constraints(model, constraints, compute_device, self.sharders)
        finally:
            logger.disabled = was

    def table_of(self, option: ShardingOption) -> str:
        """Return the name of the user's table that an option belongs to."""
        return option.name.partition(".")[0]

    def _parts(self) -> list[Any]:
        return [*self._collections, *self._stock]

    def _rebuilt(self, part: Any, changes: Mapping[str, MethodConfig]) -> nn.Module:
        configs = _configs(part)
        methods = {table.name: changes.get(table.name, self.methods[table.name]) for table in configs}
        pooled = isinstance(part, EmbeddingBagCollection | CompressedEmbeddingBagCollection)
        kind: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
        rebuilt = kind(configs, device=_META, compression=methods)
        _take_optimizers(_trained(part), _trained(rebuilt))
        return rebuilt


def _configs(part: Any) -> list[Any]:
    if isinstance(part, CompressedParts):
        return part.blueprint.tables
    return part.embedding_bag_configs() if isinstance(part, EmbeddingBagCollection) else part.embedding_configs()


def _trained(part: Any) -> dict[str, list[Tensor]]:
    """Return by table what stores it and may step in the backward: native tables, and what stands for trained rows."""
    stored: dict[str, Tensor] = {}
    for child in part.modules():
        if isinstance(child, EmbeddingBagCollection | EmbeddingCollection):
            weights = child.embedding_bags if isinstance(child, EmbeddingBagCollection) else child.embeddings
            stored |= {name: each.weight for name, each in weights.items()}  # type: ignore[misc]
        elif isinstance(child, TrainedCollection):
            stored |= {name: rows.handle for name, rows in child.banks.items()}
    if not isinstance(part, CompressedParts):
        return {name: [weight] for name, weight in stored.items()}
    names = {table.name: [table.name, *part.blueprint.native_names(table.name).values()] for table in _configs(part)}
    return {table: [stored[name] for name in mine if name in stored] for table, mine in names.items()}


def _take_optimizers(before: Mapping[str, Sequence[Tensor]], after: Mapping[str, Sequence[Tensor]]) -> None:
    """Have every table keep the optimizer in its backward, or be without one as it was.

    A table that had nothing to train, as codes have not, gets what its neighbours have, and what several share what any
    of them had: of different ones that of most state, so that what is planned fits whichever it will be.

    Args:
        before, after: of `_trained`.
    """
    for table, mine in after.items():
        sources = before[table] or [weight for weights in before.values() for weight in weights]
        for weight in mine:
            copy_backward_optimizer(max([weight, *sources], key=_state), weight)


def _state(weight: Tensor) -> tuple[bool, int]:
    """Return an order of weights by what state their optimizers keep of a row; last of all is one without any."""
    name = backward_optimizer(weight)
    return name is not None, fused_state_bytes(1, 2, name)
