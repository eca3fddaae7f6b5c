"""A model of many ranks in a new wrapper, with other modules in place of some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology

from torchrec_compress.convert.models import PLAIN, Place, with_modules
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import environment_of, freeze, hold_still, let_go
from torchrec_compress.sharding import get_default_sharders
from torchrec_compress.sharding.gradients import communication_hooks

logger = logging.getLogger(__name__)

Wrap: TypeAlias = Callable[[nn.Module], DistributedModelParallel]


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
        ValueError: `wrap` returns something else.
    """
    if wrap is not None and not callable(wrap):
        raise ValueError(f"{where}: wrap must be a function of the model, got {wrap!r}")
    inner, modes = model.module, [(each, each.training) for each in model.module.modules()]
    # wrapping puts others in the place of modules, not only of those that are changed
    children = [(each, dict(each._modules)) for each in inner.modules()]
    frozen = [(place.path, hold_still(made)) for place, made in changes]
    try:
        changed = with_modules(inner, {id(place.module): made for place, made in changes}, inplace=True)
        wrapped = _wrap(changed, model) if wrap is None else wrap(changed)
        if not isinstance(wrapped, DistributedModelParallel):
            raise ValueError(f"{where}: wrap must return a DistributedModelParallel, got {type(wrapped).__name__}")
        fill(wrapped)
    except BaseException:
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        _set_modes(modes)
        raise
    hooks = communication_hooks(model)
    let_go(model)
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


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _wrap(inner: nn.Module, model: DistributedModelParallel) -> DistributedModelParallel:
    """Return a model planned and wrapped by default, on the ranks and the device that it was on."""
    environment, sharders = environment_of(model), get_default_sharders()
    assert environment.process_group is not None
    topology = Topology(world_size=environment.world_size, compute_device=model.device.type)
    planner = EmbeddingShardingPlanner(topology)
    plan = planner.collective_plan(inner, sharders, environment.process_group)
    return DistributedModelParallel(inner, environment, model.device, plan, sharders)
