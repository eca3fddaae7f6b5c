"""Codebooks that there is no room to refit to all rows."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from torchrec_compress.fit.codes import Encoder
from torchrec_compress.fit.refit import RefitSums, refit_codebooks
from torchrec_compress.methods.learned_codes import Sample, with_refit


class ByRemainder(Encoder):
    """Give an id the code of its remainder, and record the ids."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return (L, 1) codes."""
        self.asked.append(ids)
        return (ids % 4).unsqueeze(1)


@pytest.mark.parametrize("num_rows", [900, 3000])
def test_codebooks_are_refitted_to_256_rows_a_codeword(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kmeans = import_module("torchrec_compress.fit.kmeans")  # the package's `kmeans` is the function
    monkeypatch.setattr(kmeans, "MIN_TRAIN_POINTS", 1)
    monkeypatch.setattr(RefitSums, "fits", staticmethod(lambda *_: False))
    seeded = torch.Generator().manual_seed(0)
    ids, rows = torch.arange(num_rows), torch.randn(num_rows, 2, generator=seeded)
    weights, encoder = 0.5 + torch.rand(num_rows, generator=seeded), ByRemainder()
    found = with_refit(encoder, torch.zeros(4, 2), Sample(ids, rows, weights), 4, "residual")
    (asked,) = encoder.asked
    assert len(asked) == min(num_rows, 256 * 4) and len(asked.unique()) == len(asked)
    assert found.refit is None
    expected = refit_codebooks(
        (ids % 4).unsqueeze(1), rows, weights, codebook_size=4, kind="residual", start=torch.zeros(4, 2)
    )
    torch.testing.assert_close(found.codebooks, expected, rtol=0, atol=1e-5 if num_rows < 1024 else 0.2)
