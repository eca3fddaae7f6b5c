"""Expand the compressed tables of a model that many ranks hold: each asks for the rows that it shall hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_compress.convert.collections import (
    Compressed,
    check_range,
    collection_of,
    is_frozen_table,
    stock_like,
    stock_weights,
)
from torchrec_compress.convert.models import PLAIN, Place, errors_of, find_places
from torchrec_compress.convert.plain import plain_like, put_padding
from torchrec_compress.convert.safety import check_places
from torchrec_compress.convert.shards import Crew, raise_first
from torchrec_compress.convert.wrapping import Wrap, check_wrapper, rewrapped
from torchrec_compress.modules import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from torchrec_compress.seams import environment_of, forget_inputs, has_codecs, local_shards, steps_uncounted

_WHERE = "decompress"
_PLAIN = (CompressedEmbedding, CompressedEmbeddingBag)
_FLOATS_AT_ONCE = 2**24


@torch.inference_mode(False)
def decompress_sharded(model: DistributedModelParallel, inplace: bool, wrap: Wrap | None) -> DistributedModelParallel:
    """Return a model with dense tables, planned and wrapped anew; arguments as in `decompress`.

    All ranks call it. Rows come by look-ups of the compressed tables, where each rank asks for those of its new shards.
    """
    environment, device = environment_of(model), model.device
    if environment.process_group is None:
        raise ValueError(f"{_WHERE}: the model must have a process group, got none; initialise torch.distributed first")
    crew = Crew(environment.process_group, device)
    places = crew.together(lambda: _asked(model, inplace, wrap))
    changes = [(place, _empty(place, device)) for place in places]
    for place, made in changes:
        with errors_of(place.path):
            _try(place.module, made, crew, device)

    def fill(wrapped: DistributedModelParallel) -> None:
        for place in places:
            with errors_of(place.path):
                _fill(wrapped.module.get_submodule(place.path), place.module, crew, device)  # type: ignore[union-attr]

    return rewrapped(_WHERE, model, changes, wrap, fill)


def _asked(model: DistributedModelParallel, inplace: bool, wrap: Wrap | None) -> list[Place]:
    """Return the places that are to be expanded, looked over without the other ranks."""
    if inplace is not True:
        raise ValueError(
            f"{_WHERE}: a DistributedModelParallel must be expanded in place, as no copy of its shards is made; "
            "pass inplace=True, and take what is returned"
        )
    check_wrapper(_WHERE, model, wrap)
    inner: Any = model.module
    places = [place for place in find_places(inner) if place.is_compressed]
    if not places:
        raise ValueError(f"{_WHERE}: the model must hold compressed tables, got none")
    check_places(_WHERE, inner, places, inplace=True)
    for place in places:
        with errors_of(place.path):
            if has_codecs(place.module):
                raise ValueError(
                    f"{_WHERE}: rows must travel as they are, got sharders with a qcomm_codecs_registry; load the "
                    "state dict into a model whose sharders have none"
                )
            collection = collection_of(place.module)
            for name in place.tables:
                _feature_of(collection, name)
    return places


@torch.no_grad()
def _try(source: nn.Module, made: nn.Module, crew: Crew, device: torch.device) -> None:
    """Look up what tells whether all rows can be, before anything is changed; all ranks call it.

    Raises:
        ValueError: on every rank, where rows of a table would be infinite in its data type.
    """
    collection = collection_of(source)
    failed: list[ValueError] = []
    with steps_uncounted(collection):
        for name, weight in _weights(made, collection).items():
            # a row tells whether there are any; whether they fit, only all of them
            ids = range(1) if weight.dtype == torch.float32 else crew.share(len(weight))
            for _, rows in _ServedRows(collection, name, crew, device).blocks([ids]):
                try:
                    _check_rows(name, rows, weight.dtype)
                except ValueError as error:
                    failed.append(error)
    crew.together(lambda: raise_first(failed))  # at the end, as the others wait for the look-ups of this rank


def _check_rows(name: str, rows: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where rows that are served, (L, D), are rounded, or would be infinite in a table's dtype."""
    if rows.dtype != torch.float32:
        raise ValueError(
            f"{_WHERE}: table {name!r}: rows must be looked up in float32, got {rows.dtype} of sharders with an "
            "output_dtype, which rounds them; load the state dict into a model whose sharders have none"
        )
    check_range(name, rows, dtype)


def _empty(place: Place, device: torch.device) -> nn.Module:
    """Return what comes in place of a compressed module: a collection on the meta device, or a plain module."""
    module: Any = place.module
    collection = collection_of(module)
    made = plain_like(module, device) if isinstance(module, _PLAIN) else stock_like(module, torch.device("meta"))
    for name, weight in _weights(made, collection).items():
        weight.requires_grad_(not is_frozen_table(collection, name))
    return made


def _weights(made: Any, collection: Compressed) -> dict[str, nn.Parameter]:
    """Return the weights of what comes in place of a collection, or of its one table, by table name."""
    if isinstance(made, PLAIN):
        return {collection.table_configs()[0].name: made.weight}  # type: ignore[dict-item]
    return stock_weights(made)


@torch.no_grad()
def _fill(target: Any, source: Any, crew: Crew, device: torch.device) -> None:
    """Write the rows that a compressed module serves into the shards of this rank; all ranks call it."""
    collection = collection_of(source)
    if isinstance(source, _PLAIN):
        _fill_table(target.weight, _ServedRows(collection, source.name, crew, device))
        put_padding(source, target)
        return
    state = target.state_dict()
    for table in collection.table_configs():
        (weight,) = [value for name, value in state.items() if name.endswith(f".{table.name}.weight")]
        _fill_table(weight, _ServedRows(collection, table.name, crew, device))


def _fill_table(weight: object, served: _ServedRows) -> None:
    shards = local_shards(weight)
    corners = [(0, 0) if offsets is None else (int(offsets[0]), int(offsets[1])) for _, offsets in shards]
    runs = [range(top, top + len(local)) for (local, _), (top, _) in zip(shards, corners, strict=True)]
    for (number, ids), rows in served.blocks(runs):
        local, (top, left) = shards[number][0], corners[number]
        local[ids.start - top : ids.stop - top] = rows[:, left : left + local.shape[1]]


class _ServedRows:
    """The rows of one table, as the look-ups of all ranks find them.

    Args:
        collection: compressed, its parts sharded or not; without gradients, no look-up is one of training.
        name: of the table.
        crew: the ranks.
        device: of batches.
    """

    def __init__(self, collection: Compressed, name: str, crew: Crew, device: torch.device) -> None:
        forget_inputs(collection)
        self._collection, self._crew, self._device = collection, crew, device
        self._feature, self._output = _feature_of(collection, name)
        lookups = collection.blueprint.lookups
        self._keys = sorted({lookup.feature for lookup in lookups})
        self._is_pooled = not isinstance(collection, CompressedEmbeddingCollection)
        self._is_weighted = isinstance(collection, CompressedEmbeddingBagCollection) and collection.is_weighted()
        self._room = max(1, _FLOATS_AT_ONCE // sum(lookup.table.embedding_dim for lookup in lookups))

    def blocks(self, runs: Sequence[range]) -> Iterator[tuple[tuple[int, range], Tensor]]:
        """Yield the number of a run of ids, which need not be those of other ranks, a part of it and its rows.

        All ranks call it, and look up as often and as many, whatever they want.
        """
        at_once = max(1, min(self._room, self._crew.most(max(map(len, runs), default=0))))
        wanted = [
            (number, run[first : first + at_once])
            for number, run in enumerate(runs)
            for first in range(0, len(run), at_once)
        ]
        for turn in range(self._crew.most(len(wanted))):
            mine = wanted[turn] if turn < len(wanted) else (0, range(0))
            rows = self._look_up(torch.arange(mine[1].start, mine[1].stop, device=self._device), at_once)
            if turn < len(wanted):
                yield mine, rows

    def _look_up(self, ids: Tensor, num_bags: int) -> Tensor:
        """Return the rows of ids, (L,) int64, as (L, D) float32."""
        lengths = torch.zeros(len(self._keys), num_bags, dtype=torch.int64, device=self._device)
        lengths[self._keys.index(self._feature), : len(ids)] = 1  # as many bags on every rank
        weights = torch.ones(len(ids), dtype=torch.float32, device=self._device) if self._is_weighted else None
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
