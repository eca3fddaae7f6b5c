"""A model that is called to learn something of it, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchrec_compress.seams import steps_uncounted


@contextmanager
def evaluated(model: nn.Module, with_gradients: bool) -> Iterator[None]:
    """Evaluate a model, and give it its modes and counts of steps back.

    Args:
        model: of any kind.
        with_gradients: whether calls can be differentiated, whatever the caller is in.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients), steps_uncounted(model):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
