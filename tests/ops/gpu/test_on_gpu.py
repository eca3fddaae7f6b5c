"""The same cases on a GPU, where there is one."""

import importlib.util

import pytest
import torch

from tests.ops.gpu import trained_cases
from tests.ops.gpu.cases import LARGE, SMALL, check
from tests.ops.gpu.trained_cases import BATCHES, EVERY, REFUSALS
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


@pytest.fixture
def nvrtc():
    if program.missing():
        pytest.skip(program.missing())


@pytest.mark.parametrize("name", EVERY)
def test_every_format_of_trained_rows(name, nvrtc):
    trained_cases.check(trained_cases.Case(EVERY[name], weighted=True, mean=True), "cuda")


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_trained_rows(name, nvrtc):
    trained_cases.check(BATCHES[name], "cuda")


@pytest.mark.parametrize("name", REFUSALS)
def test_what_trained_rows_refuse(name, nvrtc):
    trained_cases.check_refusal(name, "cuda")


def test_states_come_before_values_and_bags_without_ids_reach_no_row(nvrtc):
    trained_cases.check_states_come_before_values("cuda")
    trained_cases.check_bags_without_ids_reach_no_row("cuda")


def test_a_long_table_of_trained_rows(nvrtc):
    """Rows whose bytes lie beyond what 32 bits reach."""
    trained_cases.check_far_rows(2**25 + 5, "cuda")
