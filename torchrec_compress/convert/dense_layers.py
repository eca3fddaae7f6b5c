"""Dense layers in low rank: of what a layer returns on real batches, the directions that vary most are kept."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from tqdm import tqdm

from torchrec_compress.convert.evaluated import evaluated
from torchrec_compress.convert.models import check_copied, with_modules
from torchrec_compress.convert.safety import check_references, check_wrappers, holders_of, is_hooked, values_of
from torchrec_compress.modules.arguments import check_call
from torchrec_compress.seams import has_own_forward, is_compiled

logger = logging.getLogger(__name__)

_WHERE = "compress_dense"


def compress_dense(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float,
    forward: Callable[[Any, Any], Any] | None = None,
    *,
    layers: str | Sequence[str] = "*",
    inplace: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Replace dense layers by two thinner ones each, fitted to what they return on some batches; nothing is trained.

    A layer y = W x + b becomes U (U^T W x) + c: U the directions in which y varies most, c what makes its mean right
    ("atomic feature mimicking", arXiv 2405.18146, section 3). Inputs of a recommender's layers are correlated, so that
    few directions hold nearly all of the variance where W itself has no low rank. Layers share the weights that are
    left so that the shares of their variances that are lost have the least sum.

    Args:
        model: trained; all its `nn.Linear` (the class itself) that get smaller by it may be replaced.
        batches: whatever `forward` takes; some thousand examples tell.
        ratio: how many times fewer weights the layers shall have together, above 1; biases are not counted.
        forward: (model, batch) -> anything; None: `model(batch)`.
        layers: their paths, or patterns of these.
        inplace: whether to change the model; else a copy is returned.
        progress: whether to show a progress bar.

    Returns:
        The model, in the same modes; in place of a layer of (in, out) an `nn.Sequential` of two, (in, r) without a bias
        and (r, out), of the same dtype and device, frozen where it was. The log (INFO) says the rank r of each.
        Optimizers of the old weights do not know the new ones.

    Raises:
        ValueError: no layer fits a name or gets smaller, one that was named is never called, the ratio cannot be
            reached, inputs are of another width than a layer's or outputs are not finite (layer and batch are named), a
            layer has hooks, is compiled or has tied weights, or the model is wrapped for many ranks: compress it
            before. The model is as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        >>> small = compress_dense(model, [torch.randn(4096, 64)], ratio=2.0)
        >>> sum(weight.numel() for weight in small.parameters()) < 0.51 * (64 * 128 + 128 * 32) + 128 + 32
        True
    """
    check_call(_WHERE, model, batches, forward)
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not ratio > 1.0:
        raise ValueError(f"{_WHERE}: ratio must be above 1, got {ratio}; 2 halves the weights")
    found = _find_layers(model, layers)
    if inplace:
        check_references(_WHERE, model, {id(layer): path for path, layer in found.items()})
    else:
        check_copied(_WHERE, model)
    outputs = _watched(model, found, batches, forward, progress)
    unread = [path for path, output in outputs.items() if not output.rows]
    if set(unread) & ({layers} if isinstance(layers, str) else set(layers)) or len(unread) == len(outputs):
        raise ValueError(f"{_WHERE}: layers must be called by the forward, got {unread} that never are; leave them out")
    if unread:
        logger.warning("%s: layers %s are never called by the forward, and stay as they are", _WHERE, unread)
    spectra = {path: _Spectrum.of(found[path], output) for path, output in outputs.items() if output.rows}
    return with_modules(_WHERE, model, _fitted(found, spectra, ratio), inplace)


def _fitted(found: Mapping[str, nn.Linear], spectra: Mapping[str, _Spectrum], ratio: float) -> dict[int, nn.Module]:
    """Return what comes in place of each layer that does not stay, by its `id`, and log the ranks."""
    new: dict[int, nn.Module] = {}
    for path, rank in _ranks(spectra, ratio).items():
        layer, spectrum = found[path], spectra[path]
        if rank is not None:
            new[id(layer)] = _in_rank(layer, spectrum, rank)
        logger.info(
            "%s: %s (%d to %d): %s", _WHERE, path or "the model", layer.in_features, layer.out_features,
            "whole" if rank is None else f"rank {rank}, {100 * spectrum.lost(rank):.3g} % of the variance lost",
        )  # fmt: skip
    return new


def _find_layers(model: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Linear]:
    """Return the layers that patterns fit and that can get smaller, by path, all of them safe to replace."""
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
        raise ValueError(f"{_WHERE}: layers must be a path or pattern, or a list of them, got {layers!r:.80}")
    check_wrappers(_WHERE, model)
    sharded = [path for path, module in model.named_modules() if isinstance(module, ShardedModule)]
    if sharded:
        raise ValueError(
            f"{_WHERE}: the model must not be sharded, got {sharded[0]!r} that is; do it before "
            "DistributedModelParallel, whose ranks then hold the same layers"
        )
    every = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in every):
            raise ValueError(f"{_WHERE}: layers must name an nn.Linear each, got {pattern!r}; they are {list(every)}")
    wanted = {path: layer for path, layer in every.items() if any(fnmatchcase(path, each) for each in patterns)}
    found = {path: layer for path, layer in wanted.items() if _most(layer)}
    if not found:
        raise ValueError(f"{_WHERE}: a layer must get smaller by it, got {list(wanted)}, which are too narrow")
    holders = holders_of(model)
    for path, layer in found.items():
        if is_hooked([layer], [*layer.parameters()]) or has_own_forward(layer) or [*layer.children()]:
            raise ValueError(
                f"{_WHERE}: {path!r} must have no hooks, parametrization or forward of its own, got some; remove them, "
                "or leave the layer out"
            )
        if is_compiled([layer]):
            raise ValueError(
                f"{_WHERE}: {path!r} must not be compiled, as others take its place, got one after compile(); leave "
                "the layer out, or compile the model that is returned"
            )
        for weight in layer.parameters():
            if len(mine := holders[values_of(weight)]) > 1:
                paths = [each for each, _ in mine]
                raise ValueError(f"{_WHERE}: layers must not share weights, got {paths} tied; leave them out")
    return found


def _most(layer: nn.Linear) -> int:
    """Return the largest rank at which a layer has fewer weights; 0 where there is none."""
    return (layer.in_features * layer.out_features - 1) // (layer.in_features + layer.out_features)


class _Outputs:
    """Sums over what a layer returned, around the mean of the first batch.

    Attributes:
        rows: how many there were.
    """

    def __init__(self, path: str, width: int) -> None:
        self.rows = 0
        self._path, self._calls = path, 0
        self._shift, self._sum = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, width, dtype=torch.float64)

    def add(self, output: Tensor) -> None:
        """Add outputs, (..., D) floating point.

        Raises:
            ValueError: one is not finite.
        """
        rows = output.detach().reshape(-1, output.shape[-1]).double()
        self._calls += 1
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"{_WHERE}: outputs must be finite, got NaN or infinity of {self._path!r}, call {self._calls}"
            )
        if not self.rows and len(rows):
            self._shift = rows.mean(0).cpu()
        rows = rows - self._shift.to(rows.device)
        self.rows += len(rows)
        self._sum += rows.sum(0).cpu()
        self._squares += (rows.T @ rows).cpu()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean, (D,), and covariance, (D, D) float64."""
        mean = self._sum / self.rows
        return mean + self._shift, self._squares / self.rows - torch.outer(mean, mean)


def _watched(
    model: nn.Module, found: Mapping[str, nn.Linear], batches: Iterable[Any], forward: Any, progress: bool
) -> dict[str, _Outputs]:
    """Return what layers returned on batches; the model is evaluated, and left as it was."""
    outputs = {path: _Outputs(path, layer.out_features) for path, layer in found.items()}
    number = 0

    def check(path: str, layer: nn.Linear, given: tuple[Any, ...]) -> None:
        rows = given[0] if given else None
        if given and (not isinstance(rows, Tensor) or rows.shape[-1:] != (layer.in_features,)):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{_WHERE}: batch {number + 1}: inputs of {path!r} must be (..., {layer.in_features}), got {got}; give "
                "batches that the model takes"
            )

    with evaluated(model, with_gradients=False), ExitStack() as hooks:
        for path, layer in model.named_modules():
            if type(layer) is nn.Linear:
                hooks.callback(layer.register_forward_pre_hook(partial(check, path)).remove)
        for path, layer in found.items():
            hook = layer.register_forward_hook(partial(_note, outputs[path]))
            hooks.callback(hook.remove)
        for batch in tqdm(batches, desc="dense layers", unit="batch", disable=not progress, leave=False):
            model(batch) if forward is None else forward(model, batch)
            number += 1
    if not number:
        raise ValueError(f"{_WHERE}: batches must hold one, got none; an iterator is used up by its first reader")
    return outputs


def _note(outputs: _Outputs, layer: nn.Module, given: Any, output: Tensor) -> None:
    outputs.add(output)


@dataclass(frozen=True)
class _Spectrum:
    """How what a layer returns varies.

    Attributes:
        mean: (D,) float64.
        directions: (D, D) float64, orthonormal columns, that of the largest variance first.
        shares: (D,) float64, of the variance, which has the sum 1; all zeros where nothing varies.
        sizes: inputs and outputs of the layer.
    """

    mean: Tensor
    directions: Tensor
    shares: Tensor
    sizes: tuple[int, int]

    @staticmethod
    def of(layer: nn.Linear, outputs: _Outputs) -> _Spectrum:
        """Return that of outputs."""
        mean, covariance = outputs.moments()
        values, vectors = torch.linalg.eigh(covariance)
        values = values.flip(0).clamp(min=0.0)
        shares = values / values.sum() if bool(values.any()) else values
        return _Spectrum(mean, vectors.flip(1), shares, (layer.in_features, layer.out_features))

    @property
    def whole(self) -> int:
        """Weights of the layer as it is."""
        return self.sizes[0] * self.sizes[1]

    def lost(self, rank: int) -> float:
        """Return the share of the variance that a rank loses."""
        return float(self.shares[rank:].sum())


def _ranks(spectra: Mapping[str, _Spectrum], ratio: float) -> dict[str, int | None]:
    """Return the rank of each layer, None: whole; what a weight gains most is taken first.

    Raises:
        ValueError: even a rank of 1 for all has too many weights.
    """
    room = sum(each.whole for each in spectra.values()) / ratio
    spent = sum(sum(each.sizes) for each in spectra.values())
    if spent > room:
        most = sum(each.whole for each in spectra.values()) / spent
        raise ValueError(f"{_WHERE}: ratio must be at most {most:.4g}, a rank of 1 for all layers, got {ratio:g}")
    ranks: dict[str, int | None] = dict.fromkeys(spectra, 1)
    steps = [_step(path, spectrum, 1) for path, spectrum in spectra.items()]
    heapq.heapify(steps)
    while steps:
        _, path, cost, rank = heapq.heappop(steps)
        if spent + cost > room:
            continue  # nor do the next ones of this layer, which cost no less
        spent, ranks[path] = spent + cost, rank
        if rank is not None:
            heapq.heappush(steps, _step(path, spectra[path], rank))
    return ranks


def _step(path: str, spectrum: _Spectrum, rank: int) -> tuple[float, str, int, int | None]:
    """Return the next step of a layer: minus what a weight gains, path, weights, and the rank after it."""
    inputs, outputs = spectrum.sizes
    if (rank + 1) * (inputs + outputs) < spectrum.whole:
        return -float(spectrum.shares[rank]) / (inputs + outputs), path, inputs + outputs, rank + 1
    cost = spectrum.whole - rank * (inputs + outputs)
    return -spectrum.lost(rank) / cost, path, cost, None


@torch.no_grad()
def _in_rank(layer: nn.Linear, spectrum: _Spectrum, rank: int) -> nn.Sequential:
    """Return a layer as two."""
    weight, kept = layer.weight.double().cpu(), spectrum.directions[:, :rank]
    bias = torch.zeros(layer.out_features, dtype=torch.float64) if layer.bias is None else layer.bias.double().cpu()
    options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    with torch.inference_mode(False):  # and without a draw of start values
        down = nn.Linear(layer.in_features, rank, bias=False, **options).to_empty(device=layer.weight.device)
        up = nn.Linear(rank, layer.out_features, **options).to_empty(device=layer.weight.device)
    # the mean of what is returned stays, whatever is lost around it
    moved = spectrum.mean - kept @ (kept.T @ (spectrum.mean - bias))
    follows = layer.weight if layer.bias is None else layer.bias
    for found, value, old in (
        (down.weight, kept.T @ weight, layer.weight),
        (up.weight, kept, layer.weight),
        (up.bias, moved, follows),
    ):
        found.data.copy_(value)
        found.requires_grad_(old.requires_grad)
    return nn.Sequential(down, up).train(layer.training)
