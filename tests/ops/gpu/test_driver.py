"""What the GPU's driver is asked to do: cuda-bindings over a library that stands in for the driver's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu import program

ROOT = Path(__file__).resolve().parents[3]
PROLOGUE = """
import contextlib, ctypes, threading, types, torch
from torchrec_compress.ops.gpu import driver
from torchrec_compress.ops.gpu.driver import Driver
from torchrec_compress.ops.gpu.program import Program, Signature

current = [0]

@contextlib.contextmanager
def device(index):  # torch does not touch the driver where the GPU is the current one already
    before, current[0] = current[0], index
    yield
    current[0] = before

torch.cuda.device = device
torch.cuda.current_stream = lambda: types.SimpleNamespace(cuda_stream=0x70 + current[0])
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)
PROGRAM = Program(
    "HOT_ROWS", Signature(2, 4, 4, False, torch.uint8, torch.float32, None, None, False, False, False), ()
)
NAMES = "codebook_bag_sum_hot_rows", "codebook_bag_hot_index"

def start(of, kernel=NAMES[0], grid=(5, 1, 1), shared=0):
    of.launch(PROGRAM, kernel, grid, 32, shared, [ctypes.c_int(11), ctypes.c_int(22)])
"""


def _has_compiler() -> bool:
    try:
        return bool(build.find_compiler())
    except build.CannotBuild:
        return False


pytestmark = [
    pytest.mark.skipif(bool(program.missing()), reason=program.missing()),
    pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver would be hidden"),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source, library = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    command = [*build.find_compiler(), "-x", "c", "-w", "-shared", "-fPIC", str(source), "-ldl", "-o", str(library)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def run(libraries, tmp_path):
    def start(script: str) -> list[str]:
        environment = {
            **os.environ, "LD_LIBRARY_PATH": str(libraries), "TORCHREC_COMPRESS_CACHE": str(tmp_path),
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", PROLOGUE + script]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return start


LAUNCH = "launch 5x1x1 of 32 with 0 bytes in stream 70, arguments 11 22"


def test_a_program_is_loaded_once_and_a_kernel_made_ready_once(run):
    assert run("gpu = Driver(0); start(gpu); start(gpu); start(gpu, NAMES[1])") == [
        "retain 0",
        "enter 100",
        "load ELF into 100",
        "function codebook_bag_sum_hot_rows",
        "attribute 8 = 0",
        LAUNCH,
        LAUNCH,
        "function codebook_bag_hot_index",
        "attribute 8 = 0",
        LAUNCH,
    ]


def test_shared_memory_over_48_kb_is_asked_for_and_taken_from_the_cache(run):
    lines = run("start(Driver(0), shared=100_000)")
    assert [line for line in lines if "attribute" in line] == ["attribute 8 = 100000", "attribute 9 = 100"]
    assert lines[-1] == LAUNCH.replace("with 0", "with 100000")


def test_a_thread_that_has_not_touched_the_gpu_enters_its_context(run):
    lines = run("gpu = Driver(0); start(gpu); t = threading.Thread(target=start, args=(gpu,)); t.start(); t.join()")
    assert lines[-3:] == [LAUNCH, "enter 100", LAUNCH]


def test_every_gpu_has_its_own_module_context_and_stream(run):
    lines = run("first, second = Driver(0), Driver(1); start(first); start(second); start(first)")
    assert [line for line in lines if line.startswith(("enter", "load", "launch"))] == [
        "enter 100",
        "load ELF into 100",
        LAUNCH,
        "enter 101",
        "load ELF into 101",
        LAUNCH.replace("stream 70", "stream 71"),
        "enter 100",
        LAUNCH,
    ]


def test_what_the_driver_refuses_is_an_error_that_names_the_kernel(run):
    lines = run(
        "try:\n    start(Driver(0), grid=(0, 1, 1))\nexcept RuntimeError as error:\n    print(error, flush=True)"
    )
    assert lines[-1] == (
        "GPU kernels: the CUDA driver must answer CUDA_SUCCESS to codebook_bag_sum_hot_rows, got "
        "<CUresult.CUDA_ERROR_INVALID_VALUE: 1>"
    )
