"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.slow
def test_values_and_gradients_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ops/gpu/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\b2\d passed", done.stdout), done.stdout


def _compile(kernel: Any, tensors: dict, constants: dict, capability: int) -> str:
    """Compile a kernel as a launch with aligned tensors and 32-bit numbers would, and return its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget

    from torchrec_compress.ops.gpu.triton_kernels import OPTIONS

    signature, known, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or (name in tensors and tensors[name] is None):
            signature[name], known[name] = "constexpr", constants.get(name)
        else:
            signature[name] = POINTERS[tensors[name]] if name in tensors else "i32"
            if name in tensors or name == "row_stride":
                hints[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=hints)
    options = {"num_warps": constants["num_warps"], **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


VARIANTS = {
    "float32": (torch.float32, {}, {}),
    "bfloat16": (torch.bfloat16, {}, {"offsets": None, "ids": None}),
    "hot rows": (torch.float16, {"HAS_HOT": True, "MEAN": True}, {"hot_rows": torch.float16}),
    "weights": (torch.float32, {"M": 7, "BLOCK_M": 8, "W": 5}, {"weights": torch.float32, "ids": torch.int32}),
    "residual": (torch.bfloat16, {"RESIDUAL": True, "W": 128, "BLOCK_W": 128, "num_warps": 8}, {"codes": torch.int16}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_gpus(variant, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from torchrec_compress.ops.gpu.triton_kernels import backward_kernel, forward_kernel

    word, constants, tensors = VARIANTS[variant]
    constants = {
        "M": 16, "K": 256, "W": 8, "RESIDUAL": False, "MEAN": False, "HAS_HOT": False,
        "BLOCK_M": 16, "BLOCK_W": 8, "BAGS": 1, "num_warps": 1, **constants,
    }  # fmt: skip
    index = {"codes": torch.uint8, "ids": torch.int64, "offsets": torch.int64}
    tensors = {**index, "weights": None, "codebooks": word, "hot_rows": None, **tensors}
    ptx = _compile(forward_kernel, {**tensors, "out": word}, constants, capability)
    if variant in ("float32", "bfloat16"):
        # a codeword is read by one vector load, 16 or 8 bytes a lane; four ids at once, then the rest one by one
        width = "v4" if word == torch.float32 else "v2"
        loads = re.findall(r"ld\.global\.\S+", ptx)
        assert loads.count(f"ld.global.{width}.b32") == (5 if tensors["offsets"] else 1), loads
        assert "__assertfail" in ptx
    sums = {"grad_codebooks": torch.float32, "grad_weights": torch.float32}
    hot = {"grad_hot_rows": torch.float32 if tensors["hot_rows"] else None}
    assert "atom" in _compile(backward_kernel, {**tensors, "grad": word, **sums, **hot}, constants, capability)


def test_numbers_that_change_from_batch_to_batch_compile_nothing_anew():
    from torchrec_compress.ops.gpu.triton_kernels import backward_kernel, forward_kernel

    for kernel in (forward_kernel, backward_kernel):
        specialized = {param.name for param in kernel.params if not param.do_not_specialize and not param.is_constexpr}
        assert not specialized & {"num_bags", "first_id", "num_ids", "num_rows", "num_hot", "first_size"}
        assert "row_stride" in specialized  # its divisor decides how wide rows are read
