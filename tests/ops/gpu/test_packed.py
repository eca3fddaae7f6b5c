"""Packed codes on a GPU: unpacked before the kernels, which the emulator runs."""

import pytest
import torch

from tests.ops.bags import random_codes
from tests.ops.cpp.test_kernels import has_compiler
from tests.ops.gpu.emulator import Emulator
from tests.tolerances import assert_near
from torchrec_compress.ops import BagLookup, IdBags, Span, bags, codebook_bags, pack_codes
from torchrec_compress.ops.gpu import cuda_kernels

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler to emulate with")


@pytest.mark.parametrize("is_gathered", [False, True])
def test_packed_codes_are_pooled_as_unpacked_ones(tmp_path, monkeypatch, is_gathered):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "torch")
    ids, offsets = torch.randint(0, 30, (40,)), torch.tensor([0, 3, 3, 20, 21, 40])
    codes, plain = random_codes(30, 5, 16, 7), torch.randint(0, 200, (30, 4), dtype=torch.uint8)
    leaves = [torch.randn(80, 4), torch.randn(800, 4), torch.randn(7, 20)]
    for leaf in leaves:
        leaf.requires_grad_()
    tables, spans = [pack_codes(codes), plain], [Span(0, 2, 0, 3), Span(2, 3, 3, 37)]
    if is_gathered:
        tables[0], spans[0] = tables[0][ids[:3]], spans[0]._replace(is_gathered=True)
    lookups = [BagLookup(0, "a", "a", is_mean=True, num_packed=5), BagLookup(1, "b", "b")]

    def run() -> list[torch.Tensor]:
        out = codebook_bags(lookups, spans, tables, leaves[:2], [leaves[2], None], IdBags(ids, offsets, None, True))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    emulator = Emulator(tmp_path)
    monkeypatch.setattr(cuda_kernels, "driver_of", lambda index: emulator)
    monkeypatch.setattr(bags, "is_gpu_input", lambda *arguments: True)
    monkeypatch.setattr(bags, "gpu_tier", lambda backend: "cuda")
    got = run()
    assert emulator.launched
    for ours, right in zip(got, expected, strict=True):
        assert_near(ours, right, 40)
