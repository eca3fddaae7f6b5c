"""What `wrap` may return, and what a wrapper that is used up must not have: else the model stays as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.model_tracker.types import DeltaTrackerConfig

from tests.sharding.test_compress import Model, batch, shard
from tests.sharding.test_rewrapping import HASH, tables
from torchrec_compress import CompressedEmbeddingBagCollection, compress, decompress, get_default_sharders
from torchrec_compress.sharding.gradients import communication_hooks

CPU = torch.device("cpu")


class Own(DistributedModelParallel):
    """One with a method that a model's user may need."""


def wrapped(model: nn.Module) -> DistributedModelParallel:
    return DistributedModelParallel(model, device=CPU, sharders=get_default_sharders())


def without_place(model: Any) -> DistributedModelParallel:
    found: Any = wrapped(model)
    found.module.sparse = nn.Identity()
    return found


def moved(model: Any) -> DistributedModelParallel:
    found: Any = wrapped(model)
    del found.module.sparse
    return found


def made(how: str) -> DistributedModelParallel:
    """Return what is to be compressed, or expanded."""
    return shard(True, "row_wise") if how == "compress" else compress(shard(True, "row_wise"), HASH, inplace=True)


def changed(how: str, model: Any, again: Any) -> Any:
    options: dict[str, Any] = {"inplace": True, "wrap": again}
    return compress(model, HASH, **options) if how == "compress" else decompress(model, **options)


def state(model: Any) -> Any:
    """Return what a model is made of, and in which modes."""
    found = [(path, id(each), each.training) for path, each in model.named_modules(remove_duplicate=False)]
    return found, [(name, id(each)) for name, each in model.module.over.named_parameters()]


WRAPS: dict[str, Any] = {
    "copy": lambda model: wrapped(copy.deepcopy(model)),
    "holder": lambda model: wrapped(nn.Sequential(model)),
    "other": lambda model: shard(True, "row_wise"),
    "gone": without_place,
    "deleted": moved,
}


def refused(kind: str, how: str) -> str:
    """Return what is said of a wrap; the model serves and trains afterwards as it did."""
    model = made(how)
    model.train()
    model.module.over.eval()  # type: ignore[union-attr, operator]
    before, parts = model(batch()).detach(), state(model)

    def again(inner: Any) -> Any:
        inner.over.train()
        return model if kind == "old" else WRAPS[kind](inner)

    with pytest.raises(ValueError) as error:
        changed(how, model, again)
    assert state(model) == parts and torch.equal(model(batch()).detach(), before)
    model(batch()).square().sum().backward()
    assert not isinstance(changed(how, model, wrapped).module.sparse, nn.Identity)
    return str(error.value)


GIVEN_MODEL = "wrap must wrap the model that it is given, got another {} wrapped; pass that model, no copy of it"


@pytest.mark.parametrize("how", ["compress", "decompress"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("copy", GIVEN_MODEL.format("Model")),
        ("holder", GIVEN_MODEL.format("Sequential")),
        ("other", GIVEN_MODEL.format("Model")),
        ("old", "wrap must return a DistributedModelParallel, got the old one"),
        ("gone", "wrap must leave 'sparse' in its place, got Identity"),
        ("deleted", "wrap must leave 'sparse' in its place, got NoneType"),
    ],
)
def test_wrap_wraps_the_model_that_it_is_given(two_ranks, kind, message, how):
    for said in two_ranks.run(refused, kind, how):
        assert re.search(f"^{how}: {message}", said), said


def whole(how: str) -> list[str]:
    """Do it to a collection that is the whole model; return what is said of a copy of it."""
    inner: Any = EmbeddingBagCollection(tables())
    if how == "decompress":
        inner = CompressedEmbeddingBagCollection(tables(), compression=HASH)
    model, said = wrapped(inner), []
    for again in (lambda inner: wrapped(copy.deepcopy(inner)), lambda inner: wrapped(nn.Sequential(inner))):
        with pytest.raises(ValueError) as error:
            changed(how, model, again)
        said.append(str(error.value))
    changed(how, model, wrapped)(batch())
    return said


@pytest.mark.parametrize("how", ["compress", "decompress"])
def test_also_where_a_collection_is_the_whole_model(two_ranks, how):
    for said in two_ranks.run(whole, how):
        assert all("wrap must wrap the model that it is given" in each for each in said), said


def kept(kind: str, how: str) -> str:
    """Return what is said of a wrapper that has something of its own."""
    model: Any = made(how)
    reducer = next(iter(model.children()))
    again: Any = wrapped
    if kind == "hook":
        model.register_forward_hook(lambda *_: None)
    if kind == "state hook":
        model.register_state_dict_post_hook(lambda *_: None)
    if kind == "hook of the reducer":
        assert reducer is not model.module
        reducer.register_forward_pre_hook(lambda *_: None)
    if kind == "hook of a collection":
        model.module.sparse.register_state_dict_post_hook(lambda *_: None)
    if kind == "buffer of a collection":
        model.module.sparse.register_buffer("seen", torch.zeros(1))
    if kind == "forward":
        model.forward = lambda features: model.module(features)
    if kind == "compiled":
        model.compile(backend="eager")
    if kind == "tracker":
        model.init_torchrec_delta_tracker(DeltaTrackerConfig())
    if kind == "buffer":
        model.register_buffer("seen", torch.zeros(1))
    if kind == "subclass":
        inner = Model(True)
        if how == "decompress":
            inner.sparse = CompressedEmbeddingBagCollection(tables(), compression=HASH)
        model = Own(inner, device=CPU, sharders=get_default_sharders())
    if kind in ("subclass", "tracker"):
        again = None
    before = model(batch()).detach()
    with pytest.raises(ValueError) as error:
        changed(how, model, again)
    assert torch.equal(model(batch()).detach(), before)
    if kind == "tracker":  # as a `wrap` may give new ones
        assert not changed(how, model, wrapped).model_trackers
    if kind == "subclass":  # as what makes another says what it has
        again = lambda inner: Own(inner, device=CPU, sharders=get_default_sharders())  # noqa: E731
        assert isinstance(changed(how, model, again), Own)
    return str(error.value)


@pytest.mark.parametrize("how", ["compress", "decompress"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hook", "a DistributedModelParallel must have no hooks of its own, as another takes its place"),
        ("state hook", "a DistributedModelParallel must have no hooks of its own"),
        ("hook of the reducer", "a DistributedModelParallel must have no hooks of its own"),
        ("hook of a collection", "'sparse': a module that is replaced must have no hooks"),
        ("buffer of a collection", r"'sparse': must hold its tables alone, got \['seen'\] beside them"),
        ("forward", "a DistributedModelParallel must have the forward of its class, got one of its own"),
        ("buffer", r"a DistributedModelParallel must hold a model alone, got \['seen'\] beside it"),
        ("compiled", "a DistributedModelParallel must not be compiled, as another takes its place"),
        (
            "tracker",
            r"model trackers of a Distri.* are gone with it, .* got \['DELTA_TRACKER'\]; read them",
        ),
        ("subclass", "a Own must come with what makes one again, got none; pass wrap="),
    ],
)
def test_what_a_wrapper_has_of_its_own_is_not_lost(two_ranks, kind, message, how):
    for said in two_ranks.run(kept, kind, how):
        assert re.search(f"^{how}: {message}", said), said


def settings(how: str) -> list[Any]:
    """Return what the wrapper of the dense part is told, afterwards."""
    given = DefaultDataParallelWrapper(
        bucket_cap_mb=7, static_graph=False, find_unused_parameters=True, allreduce_comm_precision="fp16"
    )
    inner = Model(True)
    if how == "decompress":
        inner.sparse = CompressedEmbeddingBagCollection(tables(), compression=HASH)
    model = DistributedModelParallel(inner, device=CPU, sharders=get_default_sharders(), data_parallel_wrapper=given)
    reducer: Any = next(iter(changed(how, model, None).children()))
    return [
        reducer.bucket_bytes_cap,
        reducer.static_graph,
        reducer.find_unused_parameters,
        communication_hooks(reducer),
    ]


@pytest.mark.parametrize("how", ["compress", "decompress"])
def test_the_dense_part_is_wrapped_as_it_was(two_ranks, how):
    assert two_ranks.run(settings, how) == [[7 * 2**20, False, True, ["fp16_compress_hook"]]] * 2
