"""Optimizers that step in the backward: what `apply_optimizer_in_backward` leaves, and FBGEMM counts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

# what `apply_optimizer_in_backward` leaves on a parameter for TorchRec's sharders
_READ_BY_SHARDERS = ("_optimizer_classes", "_optimizer_kwargs")
# what tells a shard that is held still from others: its own flag cannot be changed
_FROZEN = "_is_held_still"


@contextmanager
def steps_uncounted(model: nn.Module) -> Iterator[None]:
    """Give FBGEMM's kernels back the count of steps that they had: those of Adam's kind count every forward."""
    counts = [
        (tensor, tensor.clone())
        for module in model.modules()
        for tensor in (getattr(module, "iter", None), getattr(module, "iter_cpu", None))
        if isinstance(tensor, Tensor)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in counts:
                tensor.copy_(before)


def backward_optimizer(parameter: Tensor) -> str | None:
    """Return the name of the optimizer that `apply_optimizer_in_backward` gave a parameter, or None."""
    classes = getattr(parameter, _READ_BY_SHARDERS[0], None)
    return classes[0].__name__ if classes else None


def num_backward_optimizers(parameter: Tensor) -> int:
    """Return how many optimizers `apply_optimizer_in_backward` gave a parameter."""
    return len(getattr(parameter, _READ_BY_SHARDERS[0], ()))


def backward_settings(parameter: Tensor) -> dict[str, Any]:
    """Return the settings that `apply_optimizer_in_backward` gave the optimizer of a parameter, or none."""
    given = getattr(parameter, _READ_BY_SHARDERS[1], None)
    settings = dict(given[0]) if given else {}
    # TorchRec's sharders write into what parameters share, whichever of them comes first
    if "learning_rate" in settings:
        settings["lr"] = settings.pop("learning_rate")
    settings.pop("optimizer", None)
    return settings


def copy_backward_optimizer(source: Tensor, target: Tensor) -> None:
    """Have TorchRec's sharders train one parameter as `apply_optimizer_in_backward` said of another, if it did."""
    for mark in _READ_BY_SHARDERS:
        if hasattr(source, mark):
            setattr(target, mark, getattr(source, mark))


def steps_in_backward(parameter: nn.Parameter) -> bool:
    """Return whether a parameter steps in the backward, as long as no sharder has taken it."""
    return hasattr(parameter, "_in_backward_optimizers")


def optimizers_in_backward(parameter: Tensor) -> list[torch.optim.Optimizer]:
    """Return the optimizers that train a parameter in its own backward, as long as no sharder has taken it."""
    return list(getattr(parameter, "_in_backward_optimizers", ()))


def hold_still(module: nn.Module) -> set[str]:
    """Have TorchRec's sharders train what is frozen at rate 0, unless an optimizer was given to it; return its names.

    They do not ask whether a table is frozen, and train what has no optimizer by one of their own.

    Args:
        module: not sharded yet.
    """
    for part in module.modules():
        for parameter in part.parameters() if isinstance(part, EmbeddingBagCollection | EmbeddingCollection) else ():
            if not parameter.requires_grad and not hasattr(parameter, _READ_BY_SHARDERS[0]):
                for mark, value in zip(_READ_BY_SHARDERS, (torch.optim.SGD, {"lr": 0.0}), strict=True):
                    setattr(parameter, mark, [value])
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """Freeze what was frozen before it was sharded.

    Args:
        module: sharded. A shard in a fused kernel is a view, whose flag cannot be changed: it is noted there.
        names: that `hold_still` returned.
    """
    for name, parameter in module.named_parameters():
        if name in names and parameter.is_leaf:
            parameter.requires_grad_(False)
        elif name in names:
            setattr(parameter, _FROZEN, True)


def is_frozen(parameter: Tensor) -> bool:
    """Return whether a parameter is frozen, or a shard that `freeze` noted so."""
    return not parameter.requires_grad or getattr(parameter, _FROZEN, False)
