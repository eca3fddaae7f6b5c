"""Expand the compressed tables of a model that many ranks hold: each asks for the rows that it shall hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_compress.convert.collections import Compressed, check_range, collection_of, stock_like
from torchrec_compress.convert.models import Place, errors_of, find_places
from torchrec_compress.convert.plain import plain_like, put_padding
from torchrec_compress.convert.safety import check_places
from torchrec_compress.convert.shards import Crew, raise_first
from torchrec_compress.convert.wrapping import Wrap, rewrapped
from torchrec_compress.modules import CompressedEmbedding, CompressedEmbeddingBag, CompressedEmbeddingCollection
from torchrec_compress.seams import environment_of, forget_inputs, has_codecs, local_shards

_WHERE = "decompress"
_PLAIN = (CompressedEmbedding, CompressedEmbeddingBag)
_FLOATS_AT_ONCE = 2**24


def decompress_sharded(model: DistributedModelParallel, inplace: bool, wrap: Wrap | None) -> DistributedModelParallel:
    """Return a model with dense tables, planned and wrapped anew; arguments as in `decompress`.

    All ranks call it. Rows come by look-ups of the compressed tables, where each rank asks for those of its new shards.
    """
    environment, device = environment_of(model), model.device
    if environment.process_group is None:
        raise ValueError(f"{_WHERE}: the model must have a process group, got none; initialise torch.distributed first")
    crew = Crew(environment.process_group, device)
    places = crew.together(lambda: _asked(model.module, inplace))
    changes = [(place, _empty(place, device)) for place in places]
    wrapped = rewrapped(_WHERE, model, changes, wrap)
    for place, _ in changes:
        with errors_of(place.path):
            _fill(wrapped.module.get_submodule(place.path), place.module, crew, device)  # type: ignore[union-attr]
    return wrapped


def _asked(inner: nn.Module, inplace: bool) -> list[Place]:
    """Return the places that are to be expanded, looked over without the other ranks."""
    if inplace is not True:
        raise ValueError(
            f"{_WHERE}: a DistributedModelParallel must be expanded in place, as no copy of its shards is made; "
            "pass inplace=True, and take what is returned"
        )
    places = [place for place in find_places(inner) if place.is_compressed]
    if not places:
        raise ValueError(f"{_WHERE}: the model must hold compressed tables, got none")
    check_places(inner, places, inplace=True)
    for place in places:
        with errors_of(place.path):
            if has_codecs(place.module):
                raise ValueError(
                    f"{_WHERE}: rows must travel as they are, got sharders with a qcomm_codecs_registry; load the "
                    "state dict into a model whose sharders have none"
                )
            told = [getattr(part, "output_dtype", None) for part in place.module.modules()]
            if any(dtype not in (None, torch.float32) for dtype in told):
                raise ValueError(
                    f"{_WHERE}: rows must be looked up in float32, got sharders with another output_dtype, which would "
                    "round them; load the state dict into a model whose sharders have none"
                )
            collection = collection_of(place.module)
            for name in place.tables:
                _feature_of(collection, name)
    return places


def _empty(place: Place, device: torch.device) -> nn.Module:
    """Return what comes in place of a compressed module: a collection on the meta device, or a plain module."""
    module: Any = place.module
    return plain_like(module, device) if isinstance(module, _PLAIN) else stock_like(module, torch.device("meta"))


@torch.no_grad()
def _fill(target: Any, source: Any, crew: Crew, device: torch.device) -> None:
    """Write the rows that a compressed module serves into the shards of this rank; all ranks call it."""
    collection = collection_of(source).eval()
    forget_inputs(collection)
    if isinstance(source, _PLAIN):
        _fill_table(target.weight, collection, source.name, crew, device)
        put_padding(source, target)
        return
    state = target.state_dict()
    for table in collection.table_configs():
        (weight,) = [value for name, value in state.items() if name.endswith(f".{table.name}.weight")]
        _fill_table(weight, collection, table.name, crew, device)


def _fill_table(weight: object, collection: Compressed, name: str, crew: Crew, device: torch.device) -> None:
    shards = local_shards(weight)
    most = crew.most(max((len(local) for local, _ in shards), default=0))
    served = _ServedRows(collection, name, device, most)
    wanted = [
        (local[first : first + served.at_once], top + first, left)
        for local, offsets in shards
        for top, left in [(0, 0) if offsets is None else (int(offsets[0]), int(offsets[1]))]
        for first in range(0, len(local), served.at_once)
    ]
    failed: list[ValueError] = []
    for number in range(crew.most(len(wanted))):  # all ranks look up as often
        block, first, left = wanted[number] if number < len(wanted) else (torch.empty(0, 0), 0, 0)
        rows = served(torch.arange(first, first + len(block), device=device))
        try:
            check_range(name, rows, block.dtype)
        except ValueError as error:
            failed.append(error)
        block.copy_(rows[:, left : left + block.shape[1]])
    crew.together(lambda: raise_first(failed))  # at the end, as the others wait for the look-ups of this rank


class _ServedRows:
    """The rows of one table, as the look-ups of all ranks find them.

    Args:
        collection: compressed, its parts sharded or not.
        name: of the table.
        device: of batches.
        most: rows that a rank wants.

    Attributes:
        at_once: how many rows a call gives at most.
    """

    def __init__(self, collection: Compressed, name: str, device: torch.device, most: int) -> None:
        self._collection, self._device = collection, device
        self._feature, self._output = _feature_of(collection, name)
        lookups = collection.blueprint.lookups
        self._keys = sorted({lookup.feature for lookup in lookups})
        self._is_pooled = not isinstance(collection, CompressedEmbeddingCollection)
        self._has_weights = self._is_pooled and collection.is_weighted()
        room = _FLOATS_AT_ONCE // sum(lookup.table.embedding_dim for lookup in lookups)
        self.at_once = max(1, min(room, most))

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, (L,) int64, which need not be those of other ranks, as (L, D) float32."""
        lengths = torch.zeros(len(self._keys), self.at_once, dtype=torch.int64, device=self._device)
        lengths[self._keys.index(self._feature), : len(ids)] = 1  # as many bags on every rank
        weights = torch.ones(len(ids), device=self._device) if self._has_weights else None
        found: Any = self._collection(KeyedJaggedTensor.from_lengths_sync(self._keys, ids, lengths.view(-1), weights))
        return found[self._output][: len(ids)] if self._is_pooled else found[self._output].values()


def _feature_of(collection: Compressed, name: str) -> tuple[str, str]:
    """Return a feature that may look up every row of a table, and the name of what it finds there.

    Raises:
        ValueError: all its features look up smaller tables too.
    """
    lookups = collection.blueprint.lookups
    rows = {
        lookup.feature: min(each.table.num_embeddings for each in lookups if each.feature == lookup.feature)
        for lookup in lookups
    }
    for lookup in lookups:
        if lookup.table.name == name and rows[lookup.feature] >= lookup.table.num_embeddings:
            return lookup.feature, lookup.output
    raise ValueError(
        f"{_WHERE}: table {name!r} must have a feature that no smaller table has, got none; load the state dict into a "
        "model that is not sharded"
    )
