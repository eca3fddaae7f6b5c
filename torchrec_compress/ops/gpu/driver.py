"""What starts the CUDA kernels: the driver of a GPU, in torch's context and current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from torchrec_compress.ops.gpu.plan import Device
from torchrec_compress.ops.gpu.program import Program, compile_program

Grid = tuple[int, int, int]
# what a block may have without asking, on every GPU
_PLAIN_SHARED_BYTES = 48 * 1024


class Launcher(Protocol):
    """What starts kernels: a GPU's driver, or in tests an emulation."""

    device: Device

    def launch(
        self, program: Program, kernel: str, grid: Grid, threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        """Start `kernel` of a program with ctypes values as arguments."""
        ...


class Driver:
    """Starts kernels on a GPU, in torch's current stream.

    Args:
        index: of the GPU.
    """

    def __init__(self, index: int) -> None:
        found = torch.cuda.get_device_properties(index)
        self.device = Device(
            capability=(found.major, found.minor),
            num_sms=found.multi_processor_count,
            block_bytes=found.shared_memory_per_block_optin,
            sm_bytes=found.shared_memory_per_multiprocessor,
        )
        self._index = index
        self._context: Any = None
        self._modules: dict[Program, Any] = {}
        self._functions: dict[tuple[Program, str], Any] = {}

    def launch(
        self, program: Program, kernel: str, grid: Grid, threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        """Start `kernel` of a program; the first time compiles and loads it, which a CUDA graph cannot capture."""
        from cuda.bindings import driver  # pyright: ignore

        with torch.cuda.device(self._index):
            self._enter_context()
            if (program, kernel) not in self._functions:
                self._functions[program, kernel] = self._load(program, kernel, shared_bytes)
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
            stream = torch.cuda.current_stream().cuda_stream
            _checked(
                driver.cuLaunchKernel(
                    self._functions[program, kernel], *grid, threads, 1, 1, shared_bytes, stream,
                    ctypes.addressof(pointers), 0,
                ),
                kernel,
            )  # fmt: skip

    def _enter_context(self) -> None:
        """Make the context that torch uses the current one: a new thread, such as one of autograd's, has none yet.

        The runtime enters it at a thread's first call that needs it, which may come only after ours.
        """
        from cuda.bindings import driver  # pyright: ignore

        if self._context is None:
            device = _checked(driver.cuDeviceGet(self._index), "cuDeviceGet")
            self._context = _checked(driver.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain")
        if int(_checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) != int(self._context):
            _checked(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def _load(self, program: Program, kernel: str, shared_bytes: int) -> Any:
        """Return a kernel, ready for blocks with so much shared memory; a program has one size of them."""
        from cuda.bindings import driver  # pyright: ignore

        if program not in self._modules:
            code = compile_program(program, self.device.capability)
            self._modules[program] = _checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
        function = _checked(driver.cuModuleGetFunction(self._modules[program], kernel.encode()), kernel)
        attribute = driver.CUfunction_attribute
        size = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, size, shared_bytes), "cuFuncSetAttribute")
        if shared_bytes > _PLAIN_SHARED_BYTES:
            # as many blocks as were planned fit only where the first cache leaves its memory to them
            carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(function, carveout, 100), "cuFuncSetAttribute")
        return function


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """Return what a call of the driver returns, or raise RuntimeError with its status."""
    status, *rest = answer
    if int(status) != 0:
        raise RuntimeError(f"GPU kernels: the CUDA driver must answer CUDA_SUCCESS to {what}, got {status!r}")
    return rest[0] if rest else None


@functools.cache
def driver_of(index: int) -> Launcher:
    """Return the driver of a GPU.

    Example:
        >>> driver_of(0).device  # doctest: +SKIP
        Device(capability=(9, 0), num_sms=132, block_bytes=232448, sm_bytes=233472)
    """
    return Driver(index)
