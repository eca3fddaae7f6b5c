"""The same cases on a GPU, where there is one."""

import importlib.util

import pytest
import torch

from tests.ops.gpu.cases import LARGE, SMALL, check
from torchrec_compress.ops.gpu import program

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_cuda_kernels(name):
    if program.missing():
        pytest.skip(program.missing())
    check({**SMALL, **LARGE}[name], "cuda", "cuda")


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_triton_kernels(name):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    check({**SMALL, **LARGE}[name], "triton", "cuda")
