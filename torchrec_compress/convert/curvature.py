"""Measure, per table, how much the loss feels an error of its rows: one backward a batch, and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.types import ShardedModule
from tqdm import tqdm

from torchrec_compress.convert.curvature_sums import CurvatureSums
from torchrec_compress.convert.evaluated import evaluated
from torchrec_compress.convert.losses import Loss, probes_of
from torchrec_compress.convert.taps import Tapped, Taps, find_collections
from torchrec_compress.fit.checks import check_seed
from torchrec_compress.fit.curvature import Curvature
from torchrec_compress.modules.arguments import check_call

Forward = Callable[[Any, Any], Any]
_WHERE = "measure_curvature"


def measure_curvature(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    loss: Loss = "bce",
    *,
    weights: Callable[[Any], Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Curvature]:
    """Measure the curvature of the loss in every table's rows (docs/curvature.md).

    Per table the mean over its look-ups of s J H J^T: J the derivative of an example's logits by the bag that an id
    was looked up for, H the curvature of the loss in the logits, s the square of the id's factor in its bag. Features
    of one table, and tasks, add up. One backward a batch, with random probes where an example has several logits.

    Args:
        model: trained; its embedding collections may be stock, compressed, or sharded by `DistributedModelParallel`,
            and plain `nn.Embedding(Bag)` of it are tables too. It is evaluated, and left as it was in all it holds.
        batches: whatever `forward` takes, any number, on many ranks equally many; of validation rather than training.
        forward: (model, batch) -> logits, (B,) or (B, T) floating point; None: `model(batch)`.
        loss: "bce" with logits, each of T a task; "softmax" cross-entropy over T classes; "mse", without a factor 1/2;
            a list, one for each of as many logits that `forward` returns; or a function of what that returns and the
            batch -> (B,), the loss of every example: then it is the empirical Fisher.
        weights: batch -> (B,) >= 0, what each example's loss is multiplied by.
        group: ranks whose examples are taken together, by one all-reduce at the end; None: all ranks where the model is
            sharded or wrapped for many, else this one alone.
        seed: of the probes.
        progress: whether to show a progress bar.

    Returns:
        By table name, of a plain module its path with "_" for "."; a table that was never read has a matrix of zeros
        and no look-ups.

    Raises:
        ValueError: no model, no collection, no example, logits that depend on no table, or a gradient that is not
            finite (table and batch are named, on every rank).

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=50, embedding_dim=4, feature_names=["user"])
        >>> model, ones = EmbeddingBagCollection([table]), torch.ones(50, dtype=torch.int64)
        >>> batch = KeyedJaggedTensor.from_lengths_sync(["user"], torch.arange(50), ones)
        >>> found = measure_curvature(model, [batch], lambda model, batch: model(batch)["user"].sum(dim=1), "mse")
        >>> found["user"].matrix[0, :2].round()  # of the squared sum of a row
        tensor([2., 2.], dtype=torch.float64)
    """
    check_call(_WHERE, model, batches, forward)
    collections = find_collections(model)
    sums = CurvatureSums(collections, _group_of(model) if group is None else group)
    generator = torch.Generator().manual_seed((check_seed(_WHERE, seed) + sums.rank) % 2**63)
    bar = tqdm(batches, desc="curvature", unit="batch", disable=not progress or sums.rank > 0, leave=False)
    with evaluated(model, with_gradients=True), _unwrapped(model), Taps(collections) as taps, bar:
        for batch in bar:
            output = model(batch) if forward is None else forward(model, batch)
            given = None if weights is None else weights(batch)
            sums.add(*_gradients(*probes_of(output, batch, loss, given, generator), taps.take()))
            del output  # before the next batch is made
    return sums.result()


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return all ranks where a model is of many."""
    of_many = any(isinstance(module, ShardedModule | DistributedDataParallel) for module in model.modules())
    return dist.group.WORLD if of_many and dist.is_initialized() else None


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Have wrappers for many ranks pass calls on: no backward reaches their parameters, and they would wait for one."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    before = [vars(wrapper).get("forward") for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = partial(_pass_on, wrapper)
        yield
    finally:
        for wrapper, forward in zip(wrappers, before, strict=True):
            del vars(wrapper)["forward"]
            if forward is not None:
                vars(wrapper)["forward"] = forward


def _pass_on(wrapper: DistributedDataParallel, *given: Any, **named: Any) -> Any:
    return wrapper.module(*given, **named)


def _gradients(
    logits: Sequence[Tensor], probes: Sequence[Tensor], tapped: Sequence[Tapped]
) -> tuple[Sequence[Tapped], list[Tensor | None], int]:
    """Return the look-ups, the gradient of the probed logits by what each gave, and the number of examples.

    A gradient is (B, D), or None where the logits do not depend on it.
    """
    read = [(one, probe) for one, probe in zip(logits, probes, strict=True) if one.requires_grad]
    leaves = list({id(each.leaf): each.leaf for each in tapped}.values())
    if not read or not leaves:
        raise ValueError(
            f"{_WHERE}: logits must depend on embeddings that the model looks up in its forward, got none that do; "
            "return them with their graph, neither detached nor of a traced or scripted copy"
        )
    found = torch.autograd.grad([one for one, _ in read], leaves, [probe for _, probe in read], allow_unused=True)
    by_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
    whole = [by_leaf[id(each.leaf)] for each in tapped]
    cut = [
        None if gradient is None else gradient[:, each.first : each.first + each.width]
        for gradient, each in zip(whole, tapped, strict=True)
    ]
    return tapped, cut, len(logits[0])
