"""The end of a step, told to the tables whose rows or codes change other than by gradient."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import nn

from torchrec_compress.modules.arguments import check_model
from torchrec_compress.modules.changing_codes import change_codes, code_managers, discard_codes
from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.modules.managed import ManagedOwner


def managed_owners(model: nn.Module) -> list[ManagedOwner]:
    """Return the parts of a model that hold tables with managers, sharded or not."""
    return [module for module in model.modules() if isinstance(module, ManagedOwner)]


def has_managers(model: nn.Module) -> bool:
    """Return whether a model has tables whose rows or codes change at the end of a step."""
    return bool(managed_owners(model)) or any([*code_managers(part)] for part in _collections(model))


def _collections(model: nn.Module) -> list[CompressedParts]:
    return [module for module in model.modules() if isinstance(module, CompressedParts)]


def after_step(model: nn.Module, step: int, optimizer: Any = None) -> None:
    """Tell tables with managers (methods "cafe" and "cce") that the optimizers have stepped.

    A model without any is left alone. Call it after every `optimizer.step()`, on all ranks, before the next look-up. It
    is explicit because no hook of an optimizer runs in every loop: TorchRec's `KeyedOptimizerWrapper` never runs those
    of the optimizer inside it.

    Args:
        model: under DistributedModelParallel or not.
        step: the number of the step, from 0; a resumed training goes on counting.
        optimizer: that trains tables outside of the backward: needed where a table of "cafe" is not sharded, and for
            the codebooks of "cce" always.

    Raises:
        ValueError: the step is no number from 0 on, or the optimizer of a table or of codebooks is not known.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
        >>> from torchrec_compress import CompressedEmbeddingBagCollection
        >>> from torchrec_compress.methods import CafeConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10_000, embedding_dim=16, feature_names=["user"])
        >>> model = CompressedEmbeddingBagCollection([table], compression=CafeConfig(num_hot_rows=16, num_cold_rows=64))
        >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        >>> batch = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor([3, 3, 7]), torch.tensor([2, 1]))
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     model(batch).values().square().sum().backward()
        ...     optimizer.step()
        ...     after_step(model, step, optimizer)
        >>> int(model.managed.managers["user"].hot_ids.count_nonzero())
        2
    """
    check_model("after_step", model)
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
        raise ValueError(f"after_step: step must be an int of at least 0, got {step!r}")
    for owner in managed_owners(model):
        owner.after_step(int(step), optimizer)
    for collection in _collections(model):
        change_codes(collection, int(step), optimizer)


def discard(model: nn.Module) -> None:
    """Tell tables with managers that a batch is left out: nothing of it since the last `after_step` counts.

    Call it, instead of `after_step`, where the optimizers do not step. What a fused optimizer did to rows in the
    backward stays, as in any table.

    Args:
        model: under DistributedModelParallel or not.

    Raises:
        ValueError: it is no model.
    """
    check_model("discard", model)
    for owner in managed_owners(model):
        owner.discard()
    for collection in _collections(model):
        discard_codes(collection)
