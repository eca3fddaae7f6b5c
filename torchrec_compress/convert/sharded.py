"""Compress the tables of a model that many ranks hold: each encodes its own rows, and none ever holds a whole table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from tqdm import tqdm

from torchrec_compress.compression import Compression
from torchrec_compress.convert.collections import Compressed
from torchrec_compress.convert.into import checked_inputs, on_cpu
from torchrec_compress.convert.models import Place, chosen, errors_of, find_places, shared_out, with_modules
from torchrec_compress.convert.safety import check_places
from torchrec_compress.convert.shards import Crew, EncodedRows, SharedRows, digest
from torchrec_compress.methods import MethodConfig, TableData, TableState
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.modules.trained_rows import note_rows
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import environment_of, let_go, needs_indices, shape_and_dtype, sharded_configs
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.sharding.loading import copy_rows, copy_whole

logger = logging.getLogger(__name__)

Wrap: TypeAlias = Callable[[nn.Module], DistributedModelParallel]
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
    """A sharded collection that is to be another.

    Attributes:
        place: where it is.
        made: what comes there, on the meta device.
        rows: of its tables, by name.
        inputs: the rest of what is learned from, by name.
    """

    place: Place
    made: Compressed
    rows: Mapping[str, SharedRows]
    inputs: Mapping[str, TableData]


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
    crew, modes = Crew(environment.process_group, device), [(each, each.training) for each in model.module.modules()]
    changes = _changes(model.module, compression, given, seed, inplace, crew)
    fitted: list[dict[str, _Fitted]] = []
    for change in changes:
        with errors_of(change.place.path):
            fitted.append(_fit(change, crew, progress and crew.rank == 0))
    names = [{name: change.made.state_names(name) for name in change.rows} for change in changes]
    wrapped = _rewrapped(model, changes, wrap)
    for change, each, mine in zip(changes, fitted, names, strict=True):
        _fill(change.made, each, mine)
    wrapped.train(model.training)
    for module, mode in modes:
        module.training = mode
    for change in changes:
        change.made.train(change.place.module.training)
    if wrap is None and crew.rank == 0:
        logger.warning(
            "collections %s: what trained their tables in the backward is gone with their shards; native tables of "
            "theirs train by the optimizers that they are given: pass wrap= to give them one in the backward",
            [change.place.path for change in changes],
        )
    return wrapped


def _changes(
    inner: nn.Module,
    compression: Compression,
    given: Mapping[str, Mapping[str, Any] | None],
    seed: int,
    inplace: bool,
    crew: Crew,
) -> list[_Change]:
    """Return what is to change, all of it looked over, or raise on every rank."""
    asked = crew.together(lambda: _asked(inner, compression, given, seed, inplace))
    crew.check_same(asked.digests)
    changes = []
    for place, made, mine in asked.wanted:
        with errors_of(place.path):
            state = place.module.state_dict()
            rows = {table.name: SharedRows(table, _weight(state, table), crew) for table in made.table_configs()}
            # looks at rows of all ranks where there is a curvature, and so fails on all or none
            inputs = checked_inputs(made, dict(rows), **mine, progress=False)
        changes.append(_Change(place, made, rows, inputs))
    return changes


class _Asked(NamedTuple):
    """What one rank was asked for.

    Attributes:
        wanted: the places, what comes there, and what each is learned from.
        digests: of all arguments, see `Crew.check_same`.
    """

    wanted: list[tuple[Place, Compressed, dict[str, Any]]]
    digests: dict[str, tuple[str, str]]


def _asked(
    inner: nn.Module, compression: Compression, given: Mapping[str, Mapping[str, Any] | None], seed: int, inplace: bool
) -> _Asked:
    """Return what this rank was asked for, looked over without the others."""
    if inplace is not True:
        raise ValueError(
            f"{_WHERE}: a DistributedModelParallel must be compressed in place, as no copy of its shards is made; "
            "pass inplace=True, and take what is returned"
        )
    places = find_places(inner)
    wanted = chosen(places, compression)
    check_places(inner, [place for place, _ in wanted], inplace=True)
    by_place = {what: shared_out(what, mine, places) for what, mine in given.items()}
    found = []
    for place, methods in wanted:
        mine = {what: each[place.path] for what, each in by_place.items()}
        with errors_of(place.path):
            made = _empty(place, methods, seed)
            for table in made.table_configs():
                some = TableData(None, mine["counts"].get(table.name), mine["contexts"].get(table.name), seed)
                made.methods()[table.name].check_fit(table, some)
        found.append((place, made, mine))
    values = {"methods": [methods for _, methods in wanted], "seed": seed, **by_place}
    advice = {"counts": "add them up over the ranks first"}
    return _Asked(found, {what: (digest(each), advice.get(what, "pass the same")) for what, each in values.items()})


def _empty(place: Place, methods: Mapping[str, MethodConfig], seed: int) -> Compressed:
    """Return a compressed collection in place of a sharded one, on the meta device."""
    found = sharded_configs(place.module)
    if found is None:
        raise ValueError(
            f"{_WHERE}: tables of a DistributedModelParallel must be sharded, got {type(place.module).__name__}; "
            "compress what is not sharded before the model is wrapped"
        )
    configs: Any = found[0]
    meta = torch.device("meta")
    with torch.inference_mode(False):
        if hasattr(configs[0], "pooling"):
            return CompressedEmbeddingBagCollection(configs, meta, found[1], dict(methods), seed, will_fit=True)
        kept = needs_indices(place.module)
        return CompressedEmbeddingCollection(configs, meta, kept, dict(methods), seed, will_fit=True)


def _weight(state: Mapping[str, Any], table: BaseEmbeddingConfig) -> object:
    """Return the weight of a table in the state dict of a sharded stock collection."""
    (found,) = [value for name, value in state.items() if name.endswith(f".{table.name}.weight")]
    return found


def _fit(change: _Change, crew: Crew, progress: bool) -> dict[str, _Fitted]:
    """Fit the tables of a collection, by name."""
    methods, fitted = change.made.methods(), {}
    bar = tqdm(change.made.table_configs(), desc="fitting", unit="table", disable=not progress, leave=False)
    with bar, torch.inference_mode(False):
        for table in bar:
            bar.set_postfix_str(f"{table.name}: {methods[table.name].method}")
            rows = change.rows[table.name]
            learned = methods[table.name].learn_blocks(table, on_cpu(change.inputs[table.name]), rows)
            kept = EncodedRows(learned, rows, crew)
            learned.add_up(crew.add)
            fitted[table.name] = _Fitted(learned.finish(), kept, learned.kept_as)
    return fitted


def _rewrapped(
    model: DistributedModelParallel, changes: Sequence[_Change], wrap: Wrap | None
) -> DistributedModelParallel:
    """Return the model in a new wrapper, with what is to change in place of what was; as before where that fails."""
    inner = model.module
    changed = with_modules(inner, {id(change.place.module): change.made for change in changes}, inplace=True)
    try:
        wrapped = _wrap(changed, model) if wrap is None else wrap(changed)
        if not isinstance(wrapped, DistributedModelParallel):
            raise ValueError(f"{_WHERE}: wrap must return a DistributedModelParallel, got {type(wrapped).__name__}")
    except BaseException:
        with_modules(changed, {id(change.made): change.place.module for change in changes}, inplace=True)
        raise
    let_go(model)
    return wrapped


def _wrap(inner: nn.Module, model: DistributedModelParallel) -> DistributedModelParallel:
    """Return a model planned and wrapped by default, on the ranks and the device that it was on."""
    environment, sharders = environment_of(model), get_default_sharders()
    assert environment.process_group is not None
    topology = Topology(world_size=environment.world_size, compute_device=model.device.type)
    planner = EmbeddingShardingPlanner(topology)
    plan = planner.collective_plan(inner, sharders, environment.process_group)
    return DistributedModelParallel(inner, environment, model.device, plan, sharders)


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
