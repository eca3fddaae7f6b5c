"""What a module would lose if another were put in its place: refused by name before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.types import ShardedModule

from torchrec_compress.convert.models import PLAIN, Place
from torchrec_compress.seams import has_own_forward

logger = logging.getLogger(__name__)

_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_WEIGHTS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule")


def check_places(model: nn.Module, places: Sequence[Place], inplace: bool) -> None:
    """Raise ValueError where a module of a model cannot be replaced without a loss.

    Args:
        model: holds the places.
        places: that are replaced.
        inplace: whether in the model itself, which may hold a module where none is found: in a list, as a method.
    """
    check_wrappers("compress", model)
    for place in places:
        _check_module(place)
    _check_ties(model, places)
    if inplace:
        check_references("compress", model, {id(place.module): place.path for place in places})


def check_wrappers(where: str, model: nn.Module) -> None:
    """Raise ValueError where a model, or a part of it, is wrapped for many ranks otherwise than by TorchRec."""
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        found = [name for name in _WRAPPERS if name in kinds]
        found += ["DistributedDataParallel"] if isinstance(module, DistributedDataParallel) else []
        if found:
            raise ValueError(
                f"{where}: the model must not be wrapped by {found[0]}, got {path or 'the model'!r}; compress what it "
                "wraps, and wrap it again"
            )


def _check_module(place: Place) -> None:
    """Raise ValueError where a module has what its successor would not: hooks, more than a table, a forward."""
    where = f"compress: {place.path or type(place.module).__name__!r}"
    has_own = place.is_compressed or isinstance(place.module, ShardedModule)  # hooks, in its parts and of its state
    parts, hooks = ([place.module], _CALLS) if has_own else ([*place.module.modules()], _CALLS + _STATES)
    weights = [] if has_own else [*place.module.parameters()]
    if is_hooked(parts, weights, hooks):
        raise ValueError(
            f"{where}: a module that is replaced must have no hooks, on its weight neither, got some; remove them, and "
            "register them on the new one"
        )
    sharded = [part for part in place.module.modules() if isinstance(part, ShardedModule)]
    if any(has_own_forward(part) for part in [place.module, *sharded]):
        advice = "detach() train pipelines, or leave the table out" if sharded else "leave the table out"
        raise ValueError(f"{where}: must have the forward of its class, got one of its own; {advice}")
    if type(place.module) in PLAIN:
        own = [
            name for name, _ in [*place.module.named_parameters(), *place.module.named_buffers()] if name != "weight"
        ]
        own += [name for name, _ in place.module.named_children()]
        if own:
            raise ValueError(f"{where}: must hold its weight alone, got {own} beside it; leave the table out")
        if place.module.sparse:  # type: ignore[truthy-function]
            logger.warning("%s: gradients are dense now, of what is small; sparse=True is gone", where)


def is_hooked(parts: Sequence[nn.Module], weights: Sequence[Tensor], hooks: Sequence[str] = _CALLS + _STATES) -> bool:
    """Return whether modules have hooks of some kinds, or weights have any."""
    found = any(getattr(part, each, None) for part in parts for each in hooks)
    return found or any(getattr(weight, each, None) for weight in weights for each in _WEIGHTS)


def _check_ties(model: nn.Module, places: Sequence[Place]) -> None:
    """Raise ValueError where a table shares its values with other modules."""
    owner = {id(part): place for place in places for part in place.module.modules()}
    holders: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(values_of(parameter), []).append((f"{path}.{name}" if path else name, module))
    for mine in holders.values():
        ours = {id(owner.get(id(module))) for _, module in mine}
        if len(ours) > 1 and any(id(module) in owner for _, module in mine):
            raise ValueError(
                f"compress: a table must not share its weight with other modules, got {[path for path, _ in mine]} "
                "tied; use one module in all places, untie them, or leave the table out"
            )


def values_of(parameter: Tensor) -> Any:
    """Return what two parameters of the same values have in common."""
    try:
        place = parameter.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of another kind, as shards are
        return id(parameter)
    return (parameter.device, place) if place else id(parameter)


def check_references(where: str, model: nn.Module, old: Mapping[int, str]) -> None:
    """Raise ValueError where a module is held where no other can be put in its place.

    Args:
        where: names the caller.
        model: holds the modules.
        old: their paths by `id`.
    """
    going = {id(part) for module in model.modules() if id(module) in old for part in module.modules()}
    for path, module in model.named_modules():
        if id(module) in going:
            continue
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            held = [old[id(each)] for each in _held(value) if id(each) in old]
            if held:
                raise ValueError(
                    f"{where}: {held[0]!r} must be held as a submodule alone, got {path}.{name} that holds it as "
                    "well; look it up by its attribute, or compress a copy (inplace=False)"
                )


def _held(value: Any, depth: int = 2) -> Iterator[Any]:
    """Yield what an attribute holds: itself, what a bound method is of, and what lies in plain containers."""
    yield value
    yield getattr(value, "__self__", None)
    if depth and isinstance(value, dict | list | tuple | set):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _held(each, depth - 1)
