"""Fits of rows that are not on the CPU: all that they make is where the rows are, and equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.away import AWAY, Away, elsewhere
from torchrec_compress.fit import MECFit, fit_mec, fit_product, fit_residual
from torchrec_compress.fit.codes import Encoder
from torchrec_compress.fit.mec import learn_mec
from torchrec_compress.fit.product import learn_product
from torchrec_compress.fit.residual import learn_residual

ROWS, WIDTH = 3000, 16
FEW = MECFit(num_steps=12, batch_size=256)
FITS: dict[str, Callable[..., Any]] = {
    "product": partial(fit_product, num_codes=4, codebook_size=16),
    "product, escapes": partial(fit_product, num_codes=4, codebook_size=16, first_size=13),
    "residual": partial(fit_residual, num_codes=3, codebook_size=16),
    "mec": partial(fit_mec, num_codes=4, codebook_size=16, options=FEW),
}
ENCODERS: dict[str, Callable[..., tuple[Encoder, Tensor]]] = {
    "product": partial(learn_product, num_codes=4, codebook_size=16),
    "residual": partial(learn_residual, num_codes=3, codebook_size=16),
    "mec": partial(learn_mec, num_codes=4, codebook_size=16, options=FEW),
}


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.rand(ROWS, generator=generator) + 0.1


def here(found: Tensor) -> Tensor:
    assert isinstance(found, Away)
    return found.inner


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_stays_where_its_rows_are(name: str, weighted: bool) -> None:
    rows, weights = drawn()
    wanted = FITS[name](rows, weights=weights if weighted else None, seed=3)
    with elsewhere():
        found = FITS[name](Away(rows), weights=Away(weights) if weighted else None, seed=3)
    assert torch.equal(here(found.codes), wanted.codes)
    assert torch.equal(here(found.codebooks), wanted.codebooks)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_was_learned_encodes_where_the_rows_are(name: str) -> None:
    rows, weights = drawn()
    encoder, _ = ENCODERS[name](rows, weights=weights, seed=3)
    wanted = encoder(torch.arange(100), rows[:100])
    with elsewhere():
        encoder, _ = ENCODERS[name](Away(rows), weights=Away(weights), seed=3)
        found = encoder(torch.arange(100, device=AWAY), Away(rows[:100]))
    assert torch.equal(here(found), wanted)


def test_weights_elsewhere_than_rows_are_moved() -> None:
    rows, weights = drawn()
    with elsewhere():
        found = fit_product(Away(rows), 4, 16, weights=weights)
    assert torch.equal(here(found.codes), fit_product(rows, 4, 16, weights=weights).codes)


def test_two_devices_do_not_meet() -> None:
    with elsewhere(), pytest.raises(RuntimeError, match="all tensors must be on one device"):
        torch.add(Away(torch.ones(3)), torch.ones(3))
