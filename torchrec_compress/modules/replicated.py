"""What every rank holds a copy of: parameters that must not train in the backward, and parts that no sharder took."""

from __future__ import annotations

import logging

import torch
from torch import nn

from torchrec_compress.seams import copy_backward_optimizer, steps_in_backward

logger = logging.getLogger(__name__)

SHARDERS = "pass sharders=torchrec_compress.get_default_sharders() to the planner and to DistributedModelParallel"


def strip_in_backward_optimizers(module: nn.Module) -> list[str]:
    """Replace parameters that carry an optimizer for the backward pass by fresh ones without, and return their names.

    A replicated parameter may only step after the ranks have reduced its gradient, so the dense optimizer trains it.
    TorchRec's own data-parallel tables drop such optimizers as well. What TorchRec's sharders read stays: a parameter
    that is moved to its device first and sharded then has the optimizer that the user chose.
    """
    stripped = []
    for path, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and steps_in_backward(parameter):
                fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                copy_backward_optimizer(parameter, fresh)
                owner._parameters[name] = fresh
                stripped.append(f"{path}.{name}" if path else name)
    if stripped:
        logger.warning(
            "parameters %s do not step in the backward where every rank holds a copy; the dense optimizer trains them",
            stripped,
        )
    return stripped


def strip_where_replicated(module: nn.Module) -> None:
    """Do so where there are several ranks, so that every rank holds a copy of the parameters.

    And on the CPU of one rank, where DistributedDataParallel fails on optimizers in the backward.
    """
    if not torch.distributed.is_initialized():
        return
    is_on_cpu = any(parameter.device.type == "cpu" for parameter in module.parameters())
    if torch.distributed.get_world_size() > 1 or is_on_cpu:
        strip_in_backward_optimizers(module)


def warn_of_missing_sharders(tables: list[str], effect: str) -> None:
    """Log, when there are several ranks, that TorchRec was not given the sharders of compressed collections."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        logger.warning(
            "tables %s: %s; pass sharders=torchrec_compress.get_default_sharders() to the planner and to "
            "DistributedModelParallel",
            sorted(set(tables)),
            effect,
        )
