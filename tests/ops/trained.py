"""Formats, batches and backends that trained rows are tested with."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torchrec_compress.ops import TrainedFormat, TrainedStep, encode_trained
from torchrec_compress.ops.cpp import build

WHERE = "table 't'"


def has_compiler() -> bool:
    """Whether this machine can build the kernels."""
    try:
        return bool(build.find_compiler())
    except build.CannotBuild:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
BACKENDS = ["torch", pytest.param("cpp", marks=needs_compiler)]
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "partial_rowwise_adam")


def formats(width: int) -> list[TrainedFormat]:
    """Return every format of a width."""
    return [
        TrainedFormat(width, bits, optimizer, state_bits)
        for bits, optimizer, state_bits in itertools.product((8, 4), OPTIMIZERS, (32, 8))
        if width % 2 == 0 or bits == 8
    ]


def name_of(form: TrainedFormat) -> str:
    """Return a test's name."""
    return f"{form.width}x{form.bits}-{form.optimizer}-{form.state_bits}"


def step_of(number: int = 0, learning_rate: float = 0.05, seed: int = 7, first_id: int = 0) -> TrainedStep:
    """Return a step."""
    return TrainedStep(learning_rate, 1e-8, seed, number, first_id)


def table_of(num_rows: int, form: TrainedFormat, size: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return rows and a state that no step has changed."""
    rows = encode_trained(size * torch.randn(num_rows, form.width), form)
    return rows, torch.zeros(num_rows, form.state_bytes, dtype=torch.uint8)


class Bags(NamedTuple):
    """A batch."""

    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    grads: Tensor


def bags_of(lengths: list[int] | int, num_rows: int, width: int, weighted: bool = False) -> Bags:
    """Draw a batch of bags; a number instead of lengths: so many ids, each a bag of its own."""
    num_ids = lengths if isinstance(lengths, int) else sum(lengths)
    num_bags = lengths if isinstance(lengths, int) else len(lengths)
    offsets = None if isinstance(lengths, int) else torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.randn(num_ids) if weighted else None
    return Bags(torch.randint(num_rows, (num_ids,)), offsets, weights, torch.randn(num_bags, width))
