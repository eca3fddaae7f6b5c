"""How a loss bends in its logits, by random probes: vectors whose mean outer product is its curvature.

Of an example with T logits, a probe v in R^T with E[v v^T] = H turns T backward passes into one: the gradient of v^T z
by an embedding is J v, and E[J v v^T J^T] = J H J^T (Hutchinson's estimator; for softmax the gradient of a drawn class,
the sampled Fisher of Kunstner et al., NeurIPS 2019). With one logit it is exact. Signs are drawn per example, so that
examples that meet in one embedding, as in-batch negatives do, add up without their products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["bce", "softmax", "mse"]
Loss = LossKind | Sequence[LossKind] | Callable[[Any, Any], Tensor]
_WHERE = "measure_curvature"


def probes_of(
    output: Any,
    batch: Any,
    loss: Loss,
    weights: Tensor | None,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what to differentiate and the probes to multiply it by.

    Args:
        output: what the model returned: logits, (B,) or (B, T) floating point, or a list or tuple of several such.
        batch: what it was given.
        loss: a kind, a list or tuple of one for each of several logits, or a function of output and batch that returns
            (B,) losses.
        weights: (B,) >= 0, of each example's loss, or None.
        generator: on the CPU.

    Returns:
        Tensors of B examples and probes of their shapes.

    Raises:
        ValueError: logits, losses or weights are not what they should be.

    Example:
        >>> logits = torch.zeros(1, requires_grad=True)
        >>> _, (probe,) = probes_of(logits, None, "bce", None, torch.Generator())
        >>> probe.square()  # p (1 - p)
        tensor([0.2500])
    """
    if callable(loss):
        losses = loss(output, batch)
        _check(losses, "loss must return one number per example, (B,)", dims=(1,))
        return [losses], [_weighted(_signs(losses, generator), weights)]
    kinds: list[Any] = list(loss) if isinstance(loss, tuple | list) else [loss]
    logits: list[Any] = [output]  # a named tuple of one loss is not several logits
    if isinstance(loss, tuple | list) and isinstance(output, tuple | list):
        logits = list(output)
    known = get_args(LossKind)
    if len(kinds) != len(logits) or not logits or any(kind not in known for kind in kinds):
        raise ValueError(
            f"{_WHERE}: loss must be a function, one of {list(known)}, or a list of one for each of several logits, "
            f"got {loss!r} for {len(logits)}"
        )
    for one in logits:
        _check(one, "forward must return logits, (B,) or (B, T)", dims=(1, 2))
    if len({len(one) for one in logits}) > 1:
        raise ValueError(f"{_WHERE}: logits must be of the same examples, got {[tuple(one.shape) for one in logits]}")
    probes = [_probe(kind, one.detach(), generator) for kind, one in zip(kinds, logits, strict=True)]
    return logits, [_weighted(probe, weights) for probe in probes]


def _probe(kind: LossKind, logits: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "mse":
        return _signs(logits, generator) * 2**0.5
    if kind == "bce":
        chances = torch.sigmoid(logits)
        return _signs(logits, generator) * (chances * torch.sigmoid(-logits)).sqrt()
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"{_WHERE}: logits must be (B, classes) with softmax, got {tuple(logits.shape)}")
    chances = torch.softmax(logits, dim=1)
    drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    classes = (chances.double().cumsum(dim=1) < drawn).sum(dim=1).clamp(max=logits.shape[1] - 1)
    return torch.nn.functional.one_hot(classes, logits.shape[1]).to(chances.dtype) - chances


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs of a tensor's shape, dtype and device, the same on every kind of device."""
    return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)


def _weighted(probe: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return probe
    right = isinstance(weights, Tensor) and tuple(weights.shape) == (len(probe),)
    if not right or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"{_WHERE}: weights must be {len(probe)} finite numbers >= 0, one per example")
    factors = weights.detach().to(probe).sqrt()
    return probe * (factors if probe.dim() == 1 else factors.unsqueeze(1))


def _check(values: object, what: str, dims: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.dim() not in dims:
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{_WHERE}: {what} in floating point, got {got}")
