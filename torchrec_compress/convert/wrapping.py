"""A model of many ranks in a new wrapper, with other modules in place of some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.convert.collections import STOCK
from torchrec_compress.convert.models import PLAIN, Place, with_modules
from torchrec_compress.convert.safety import is_hooked
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import (
    data_parallel_wrapper_of,
    environment_of,
    freeze,
    has_own_forward,
    hold_still,
    is_compiled,
    let_go,
    sharded_configs,
)
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.sharding.gradients import communication_hooks

logger = logging.getLogger(__name__)

Wrap: TypeAlias = Callable[[nn.Module], DistributedModelParallel]


def check_wrapper(where: str, model: DistributedModelParallel, wrap: object) -> None:
    """Raise ValueError where a wrapper has what a new one would not have, or `wrap` cannot make one."""
    if wrap is not None and not callable(wrap):
        raise ValueError(f"{where}: wrap must be a function of the model, got {wrap!r}")
    wrappers = [model, *(child for child in model.children() if child is not model.module)]  # its reducer too
    if is_hooked(wrappers, []):
        raise ValueError(
            f"{where}: a DistributedModelParallel must have no hooks of its own, as another takes its place, got some; "
            "remove them, and register them on what is returned"
        )
    if is_compiled(wrappers):
        raise ValueError(
            f"{where}: a DistributedModelParallel must not be compiled, as another takes its place, got one after "
            "compile(); compile what is returned"
        )
    if any(has_own_forward(each) for each in wrappers):
        raise ValueError(f"{where}: a DistributedModelParallel must have the forward of its class, got one of its own")
    trackers = sorted(getattr(model, "model_trackers", {}))
    if trackers and wrap is None:
        raise ValueError(
            f"{where}: model trackers of a DistributedModelParallel are gone with it, as those of another begin anew, "
            f"got {trackers}; read them, and pass wrap= that gives new ones"
        )
    own = [*model._parameters, *model._buffers, *list(model._modules)[1:]]  # what names them asks the model
    if own:
        raise ValueError(f"{where}: a DistributedModelParallel must hold a model alone, got {own} beside it")
    if type(model) is not DistributedModelParallel and wrap is None:
        raise ValueError(f"{where}: a {type(model).__name__} must come with what makes one again, got none; pass wrap=")


def rewrapped(
    where: str,
    model: DistributedModelParallel,
    changes: Sequence[tuple[Place, nn.Module]],
    wrap: Wrap | None,
    fill: Callable[[DistributedModelParallel], None],
) -> DistributedModelParallel:
    """Return a model in a new wrapper, in the same modes, what is frozen still so; all ranks call it.

    Args:
        where: names the caller in errors.
        model: whose wrapper is used up; as before where wrapping or filling fails.
        changes: places and what comes there, which may be on the meta device.
        wrap: plans and wraps; None does so by default, on the ranks and the device that the model was on.
        fill: writes values into what came there.

    Raises:
        ValueError: `wrap` returns something else than a new wrapper of the model that it is given.
    """
    inner, modes = model.module, [(each, each.training) for each in model.module.modules()]
    # wrapping puts others in the place of modules, not only of those that are changed
    children = [(each, dict(each._modules)) for each in inner.modules()]
    frozen = [(place.path, hold_still(made)) for place, made in changes]
    try:
        changed = with_modules(where, inner, {id(place.module): made for place, made in changes}, inplace=True)
        wrapped = _wrap(changed, model) if wrap is None else wrap(changed)
        _check_wrapped(where, wrapped, model, changed, changes)
        fill(wrapped)
    except BaseException:
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        _set_modes(modes)
        raise
    hooks = communication_hooks(model)
    let_go(model, where)
    if hooks and not communication_hooks(wrapped) and environment_of(model).rank == 0:
        logger.warning(
            "gradients were sent by %s: the model is wrapped anew, and sends them in float32; register it again, or "
            "call compress_gradients",
            hooks,
        )
    wrapped.train(model.training)
    _set_modes(modes)
    for (place, _), (path, names) in zip(changes, frozen, strict=True):
        now = wrapped.module.get_submodule(path)  # type: ignore[union-attr]
        now.train(place.module.training)
        freeze(now, names)
    gone = [place.path for place, _ in changes if type(place.module) not in PLAIN]
    if gone and wrap is None and environment_of(model).rank == 0:
        logger.warning(
            "collections %s: what trained their tables in the backward is gone with their shards; native tables of "
            "theirs train by the optimizers that they are given: pass wrap= to give them one in the backward",
            gone,
        )
    return wrapped


def _check_wrapped(
    where: str,
    wrapped: object,
    model: DistributedModelParallel,
    changed: nn.Module,
    changes: Sequence[tuple[Place, nn.Module]],
) -> None:
    """Raise ValueError unless something is a new wrapper of a changed model, which has what came there."""
    if not isinstance(wrapped, DistributedModelParallel) or wrapped is model:
        got = "the old one" if wrapped is model else type(wrapped).__name__
        raise ValueError(f"{where}: wrap must return a DistributedModelParallel, got {got}")
    if not _stands_for(wrapped.module, changed):
        raise ValueError(
            f"{where}: wrap must wrap the model that it is given, got another {type(wrapped.module).__name__} wrapped; "
            "pass that model, no copy of it nor what holds it, to DistributedModelParallel"
        )
    now = dict(wrapped.module.named_modules(remove_duplicate=False))
    for place, made in changes:
        if not _stands_for(now.get(place.path), made):
            raise ValueError(
                f"{where}: wrap must leave {place.path!r} in its place, got {type(now.get(place.path)).__name__}; "
                "change the model before or after"
            )


def _stands_for(now: Any, made: Any) -> bool:
    """Return whether one module is another, or what a sharder makes of it, as far as its configs tell."""
    if now is made or isinstance(made, CompressedParts) or not isinstance(now, ShardedModule):
        return now is made
    if not isinstance(made, STOCK) or (found := sharded_configs(now)) is None:
        return True
    configs = made.embedding_bag_configs() if isinstance(made, EmbeddingBagCollection) else made.embedding_configs()
    return len(found[0]) == len(configs) and all(one is other for one, other in zip(found[0], configs, strict=True))


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _wrap(inner: nn.Module, model: DistributedModelParallel) -> DistributedModelParallel:
    """Return a model planned by default, and wrapped as it was, on the same ranks and device."""
    environment, sharders = environment_of(model), get_default_sharders()
    assert environment.process_group is not None
    topology = Topology(world_size=environment.world_size, compute_device=model.device.type)
    planner = EmbeddingShardingPlanner(topology)
    plan = planner.collective_plan(inner, sharders, environment.process_group)
    return DistributedModelParallel(
        inner, environment, model.device, plan, sharders, data_parallel_wrapper=data_parallel_wrapper_of(model)
    )
