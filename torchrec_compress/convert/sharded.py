"""Compress the tables of a model that many ranks hold: each encodes its own rows, and none ever holds a whole table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from tqdm import tqdm

from torchrec_compress.compression import Compression
from torchrec_compress.convert.collections import (
    Compressed,
    collection_of,
    frozen_tables,
    parameters_by_table,
    take_frozen,
    warn_of_optimizers,
)
from torchrec_compress.convert.into import checked_inputs, on_cpu
from torchrec_compress.convert.models import PLAIN, Place, chosen, errors_of, find_places, shared_out
from torchrec_compress.convert.plain import empty_plain
from torchrec_compress.convert.safety import check_places
from torchrec_compress.convert.shards import Crew, EncodedRows, SharedRows, digest
from torchrec_compress.convert.wrapping import Wrap, check_wrapper, rewrapped
from torchrec_compress.methods import MethodConfig, TableData, TableState
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.modules.trained_rows import note_rows
from torchrec_compress.seams import environment_of, needs_indices, shape_and_dtype, sharded_configs
from torchrec_compress.sharding.loading import copy_rows, copy_whole

_WHERE = "compress"


class _Fitted(NamedTuple):
    """A table that was fitted.

    Attributes:
        state: what all ranks have of it.
        kept: what each has of its own rows.
        kept_as: where that belongs in a `TableState`.
    """

    state: TableState
    kept: EncodedRows
    kept_as: tuple[str, str]


class _Change(NamedTuple):
    """A module whose tables are to be compressed.

    Attributes:
        place: where it is.
        module: what comes there, its tables on the meta device.
        made: its collection, or the module itself.
        rows: of its tables, by name.
        inputs: the rest of what is learned from, by name.
    """

    place: Place
    module: nn.Module
    made: Compressed
    rows: Mapping[str, SharedRows]
    inputs: Mapping[str, TableData]


@torch.inference_mode(False)
def compress_sharded(
    model: DistributedModelParallel,
    compression: Compression,
    given: Mapping[str, Mapping[str, Any] | None],
    seed: int,
    progress: bool,
    inplace: bool,
    wrap: Wrap | None,
) -> DistributedModelParallel:
    """Return the model with compressed tables, planned and wrapped anew; arguments as in `compress`.

    All ranks call it, with the same arguments. Codes are learned from a sample of rows that all ranks see, by each of
    them alike; every rank encodes the rows that it holds, and codes travel to the ranks of the new plan, by blocks.
    """
    environment, device = environment_of(model), model.device
    if environment.process_group is None:
        raise ValueError(f"{_WHERE}: the model must have a process group, got none; initialise torch.distributed first")
    crew = Crew(environment.process_group, device)
    asked = crew.together(lambda: _asked(model, compression, given, seed, inplace, wrap))
    changes = _changes(asked, crew)
    fitted: list[dict[str, _Fitted]] = []
    for change in changes:
        with errors_of(change.place.path):
            fitted.append(_fit(change, crew, progress and crew.rank == 0))
    names = [{name: change.made.state_names(name) for name in change.rows} for change in changes]

    def fill(_: DistributedModelParallel) -> None:
        for change, each, mine in zip(changes, fitted, names, strict=True):
            _fill(change.made, each, mine)

    return rewrapped(_WHERE, model, [(change.place, change.module) for change in changes], wrap, fill)


def _changes(asked: _Asked, crew: Crew) -> list[_Change]:
    """Return what is to change, all of it looked over, or raise on every rank."""
    crew.check_same(asked.digests)
    changes = []
    for place, module, mine in asked.wanted:
        made = collection_of(module)
        take_frozen(frozen_tables(place), made)
        if crew.rank == 0:
            warn_of_optimizers(parameters_by_table(place))
        with errors_of(place.path):
            weights = _weights(place)
            rows = {table.name: SharedRows(table, weights[table.name], crew) for table in made.table_configs()}
            # looks at rows of all ranks where there is a curvature, and so fails on all or none
            inputs = checked_inputs(made, dict(rows), **mine, progress=False)
        changes.append(_Change(place, module, made, rows, inputs))
    return changes


class _Asked(NamedTuple):
    """What one rank was asked for.

    Attributes:
        wanted: the places, what comes there, and what each is learned from.
        digests: of all arguments, see `Crew.check_same`.
    """

    wanted: list[tuple[Place, nn.Module, dict[str, Any]]]
    digests: dict[str, tuple[str, str]]


def _asked(
    model: DistributedModelParallel,
    compression: Compression,
    given: Mapping[str, Mapping[str, Any] | None],
    seed: int,
    inplace: bool,
    wrap: Wrap | None,
) -> _Asked:
    """Return what this rank was asked for, looked over without the others."""
    if inplace is not True:
        raise ValueError(
            f"{_WHERE}: a DistributedModelParallel must be compressed in place, as no copy of its shards is made; "
            "pass inplace=True, and take what is returned"
        )
    check_wrapper(_WHERE, model, wrap)
    inner: Any = model.module
    places = find_places(inner)
    wanted = chosen(places, compression)
    check_places(_WHERE, inner, [place for place, _ in wanted], inplace=True)
    by_place = {what: shared_out(what, mine, places) for what, mine in given.items()}
    found = []
    for place, methods in wanted:
        mine = {what: each[place.path] for what, each in by_place.items()}
        with errors_of(place.path):
            module = _empty(place, methods, seed)
            made = collection_of(module)
            for table in made.table_configs():
                some = TableData(None, mine["counts"].get(table.name), mine["contexts"].get(table.name), seed)
                made.methods()[table.name].check_fit(table, some)
        if type(place.module) in PLAIN and not any(each.is_compressed for each in made.methods().values()):
            continue  # it would not get smaller
        found.append((place, module, mine))
    values = {"methods": [methods for _, methods in wanted], "seed": seed, **by_place}
    advice = {
        "counts": "add them up over the ranks first",
        "contexts": "gather pairs over the ranks first, or join their sketches",
    }
    return _Asked(found, {what: (digest(each), advice.get(what, "pass the same")) for what, each in values.items()})


def _empty(place: Place, methods: Mapping[str, MethodConfig], seed: int) -> nn.Module:
    """Return what is compressed in place of a module, its tables on the meta device."""
    module: Any = place.module
    meta = torch.device("meta")
    if type(module) in PLAIN:
        (name,) = place.tables
        return empty_plain(module, methods[name], name, seed, meta)
    if place.is_compressed:
        raise ValueError(
            f"{_WHERE}: tables of a DistributedModelParallel must not be compressed twice, got a "
            f"{type(module).__name__}; decompress() them first"
        )
    configs: Any
    if (found := sharded_configs(module)) is not None:
        configs, is_weighted = found
    elif isinstance(module, EmbeddingBagCollection):
        configs, is_weighted = module.embedding_bag_configs(), module.is_weighted()
    else:
        configs, is_weighted = module.embedding_configs(), False
    if hasattr(configs[0], "pooling"):
        return CompressedEmbeddingBagCollection(configs, meta, is_weighted, dict(methods), seed, will_fit=True)
    return CompressedEmbeddingCollection(configs, meta, needs_indices(module), dict(methods), seed, will_fit=True)


def _weights(place: Place) -> dict[str, object]:
    """Return the weights of a module's tables by name, sharded or whole on every rank."""
    if type(place.module) in PLAIN:
        return {place.tables[0]: place.module.weight}
    # embedding_bags.<table>.weight
    return {name.split(".")[-2]: value for name, value in place.module.state_dict().items()}


def _fit(change: _Change, crew: Crew, progress: bool) -> dict[str, _Fitted]:
    """Fit the tables of a collection, by name."""
    methods, fitted = change.made.methods(), {}
    bar = tqdm(change.made.table_configs(), desc="fitting", unit="table", disable=not progress, leave=False)
    with bar:
        for table in bar:
            bar.set_postfix_str(f"{table.name}: {methods[table.name].method}")
            rows = change.rows[table.name]
            learned = methods[table.name].learn_blocks(table, on_cpu(change.inputs[table.name]), rows)
            kept = EncodedRows(learned, rows, crew)
            learned.add_up(crew.add)
            fitted[table.name] = _Fitted(learned.finish(), kept, learned.kept_as)
    return fitted


def _fill(collection: Any, fitted: Mapping[str, _Fitted], names: Mapping[str, Mapping[tuple[str, str], str]]) -> None:
    """Write what was fitted into the shards of this rank; all ranks call it."""
    own = collection.state_dict()
    for table, (state, kept, kept_as) in fitted.items():
        for (field, part), name in names[table].items():
            if (field, part) == kept_as:
                shape, dtype = shape_and_dtype(own[name])
                for first, rows in kept.blocks(shape[1], dtype):
                    copy_rows(first, rows, own[name])
            else:
                copy_whole(name, getattr(state, field)[part], own[name])
        if ("codes", "") in names[table]:
            collection.code_tables.take_changed(table)
    note_rows(collection)
