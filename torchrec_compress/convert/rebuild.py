"""A compressed collection once more, of which some tables are stored otherwise."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.convert.collections import generators, is_frozen_table, note_frozen
from torchrec_compress.convert.into import check_whole
from torchrec_compress.methods import MethodConfig, TableState
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.modules.footprint import stored_part
from torchrec_compress.names import kind_of
from torchrec_compress.ops import coded_rows

_COMPRESSED = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)
Compressed = TypeVar("Compressed", CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)


class Stored(NamedTuple):
    """A table that is stored otherwise than before: its config, its method and its tensors."""

    table: BaseEmbeddingConfig
    method: MethodConfig
    state: TableState


def check_compressed(where: str, collection: object) -> None:
    """Raise ValueError for anything but a compressed collection."""
    if not isinstance(collection, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        raise ValueError(f"{where}: collection must be a compressed one, got {kind_of(collection, *_COMPRESSED)}")


def check_source(where: str, collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
    """Raise ValueError for a collection without values, sharded, or whose small tensors are not in float32."""
    check_compressed(where, collection)
    check_whole(where, collection)
    for name, tensor in collection.named_parameters():
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"{where}: collection must be in float32, got {name!r} in {tensor.dtype}; call float() first, and cast "
                "the result"
            )
    if collection.code_tables is not None:
        collection.code_tables.warn_of_start_codes()


def rebuilt(collection: Compressed, changed: Mapping[str, Stored]) -> Compressed:
    """Return a collection of the same kind, a copy but for some tables that are stored otherwise.

    What is not changed keeps its `requires_grad`; nothing is drawn from the global generator.

    Args:
        collection: unsharded; untouched, and nothing of it is shared with the result.
        changed: by table name.
    """
    configs: Any = [
        _own_config(changed[table.name].table if table.name in changed else table)
        for table in collection.table_configs()
    ]
    methods = {**collection.methods(), **{name: stored.method for name, stored in changed.items()}}
    device, seed = collection.device, collection.seed
    # what is made in inference mode can never be trained
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(generators(device)), device:
        if isinstance(collection, CompressedEmbeddingCollection):
            kept = collection.need_indices()
            made = CompressedEmbeddingCollection(configs, device, kept, methods, seed, will_fit=True)
        else:
            kept = collection.is_weighted()
            made = CompressedEmbeddingBagCollection(configs, device, kept, methods, seed, will_fit=True)
        others = _state_of_others(collection, set(changed))
        missing, unexpected = made.load_state_dict(others, strict=False)
        assert not unexpected and not {stored_part(name) for name in missing} & {stored_part(name) for name in others}
        for name, (table, method, state) in changed.items():
            # so few rows that codes of r numbers save nothing beside the rows themselves, which are stored then
            is_dense = made.methods()[name] != method
            made.load_table(name, _as_rows(table, method, state) if is_dense else state)
        before = {name: each.requires_grad for name, each in collection.named_parameters()}
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(before.get(name, True))
        names = [table.name for table in collection.table_configs()]
        note_frozen([name for name in names if is_frozen_table(collection, name)], made)
    return cast(Compressed, made.train(collection.training))


def _own_config(table: BaseEmbeddingConfig) -> BaseEmbeddingConfig:
    """Return a copy of a config that shares no list with it."""
    mine = copy.copy(table)
    mine.feature_names = list(table.feature_names)
    return mine


def _state_of_others(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, changed: set[str]
) -> dict[str, Tensor]:
    """Return what a state dict says of the tables that are not changed."""
    plan = collection.blueprint
    gone = {physical for name in changed for physical in plan.native_names(name).values()}
    banks = {plan.banks[name] for name in plan.methods if name not in changed}  # a shared one is called as no table
    found = {}
    for key, value in collection.state_dict().items():
        kind, name = stored_part(key) or ("", "")
        if kind and {"native": name not in gone, "decoder": name in banks}.get(kind, name not in changed):
            found[key] = value
    return found


def _as_rows(table: BaseEmbeddingConfig, method: MethodConfig, state: TableState) -> TableState:
    """Return the rows that codes stand for, as a dense table's."""
    assert state.codes is not None
    bank = method.decoder(table, state.codes.device)
    assert bank is not None
    bank.load_state_dict(state.decoder)
    ids = torch.arange(table.num_embeddings, device=state.codes.device)
    index = state.decoder.get("coded_ids")
    codes = state.codes[ids if index is None else coded_rows(index, ids)]
    return TableState(native={"": bank(ids, None, None, codes, [])})
