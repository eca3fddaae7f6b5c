"""Stands in for a GPU: compiles the CUDA kernels for the CPU, with g++, and runs them one block after another."""

import ctypes
import functools
import hashlib
import re
import subprocess
from pathlib import Path

from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu.plan import Device
from torchrec_compress.ops.gpu.program import Program

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# two multiprocessors as large as an H200's
DEVICE = Device(capability=(9, 0), num_sms=2, block_bytes=232448, sm_bytes=233472)


class Emulator:
    """A launcher whose kernels run here; fibres go in reverse order where `reverse` is set."""

    def __init__(self, folder: Path, device: Device = DEVICE, reverse: bool = False) -> None:
        self.device, self._folder, self._reverse = device, folder, reverse
        self.launched: list[tuple[str, tuple[int, int, int], Program]] = []

    def launch(self, program, kernel, grid, threads, shared_bytes, arguments) -> None:
        assert shared_bytes <= self.device.block_bytes
        assert sum(ctypes.sizeof(value) for value in arguments) <= 4096
        assert min(grid) >= 1 and grid[1] < 65536 and grid[2] < 65536 and threads <= 1024
        self.launched.append((kernel, grid, program))
        run = getattr(_library(self._folder, program.source()), "run_" + kernel)
        run.restype = ctypes.c_char_p
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        failure = run((ctypes.c_uint * 3)(*grid), threads, shared_bytes, self._reverse, pointers)
        if failure:
            raise RuntimeError(failure.decode())


@functools.cache
def _library(folder: Path, source: str) -> ctypes.CDLL:
    kernels = re.findall(r'extern "C" __global__ void[^;{]*?((?:codebook|trained)_bag_\w+)\(', _selected(source))
    runners = "".join(
        f'extern "C" const char* run_{name}(const unsigned* grid, unsigned threads, unsigned shared, bool reverse, '
        f"void** arguments) {{ return emulator::launch({name}, grid, threads, shared, reverse, arguments); }}\n"
        for name in kernels
    )
    stem = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    text = stem.with_suffix(".cpp")
    text.write_text(f'#include "{HEADER}"\n{source}\n{runners}')
    command = [
        *build.find_compiler(),
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",  # as --fmad=false of the programs whose bits count
        "-w",
        "-fPIC",
        "-shared",
        str(text),
        "-o",
        str(stem) + ".so",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(stem) + ".so")


def _selected(source: str) -> str:
    """Return what the preprocessor leaves of a source, includes aside."""
    command = [*build.find_compiler(), "-x", "c++", "-E", "-P", "-D__global__=__global__", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
