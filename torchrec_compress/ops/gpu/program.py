"""The CUDA C++ programs: constants and sources put together, and their compilation by NVRTC."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from torchrec_compress.ops.gpu.cubins import cached

_FOLDER = Path(__file__).parent / "cuda"
_CODE_TYPES = {torch.uint8: "unsigned char", torch.int16: "unsigned short", torch.int32: "unsigned int"}
_INDEX_TYPES = {torch.int32: "int", torch.int64: "long long"}
_WORD_TYPES = {torch.float32: "float", torch.bfloat16: "Bfloat", torch.float16: "Half"}
_FILES = {
    "FORWARD": ("common", "pool"),
    "BACKWARD_WEIGHTS": ("common", "pool"),
    "BACKWARD": ("common", "gradient"),
    "HOT_ROWS": ("common", "gradient"),
    "TRAINED_LOOK_UP": ("trained", "trained_look_up"),
    "TRAINED_UPDATE": ("trained", "trained_update"),
}
# the bits of trained rows are those of a CPU, where products are rounded before they are added
_EXACT = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


class CannotCompile(Exception):
    """Why there is no CUDA program: no NVRTC, or one that refused the source."""


class Tables(Protocol):
    """What tables a program is for: hashable, and told to it by constants."""

    def defines(self) -> dict[str, str | int]:
        """Return the constants, by name."""
        ...


@dataclass(frozen=True)
class Signature:
    """What the tables of one launch have in common; every difference is a program of its own.

    Args:
        num_codes: codes per id, M.
        codebook_size: codewords per codebook, K.
        width: columns of a codeword.
        residual: whether a row is the sum of its codewords.
        code: dtype of codes: uint8, int16 or int32.
        word: dtype of codebooks, hot rows and output: float32, bfloat16 or float16.
        index: dtype of ids into the code table, int32 or int64; None where codes are gathered already.
        offset: dtype of offsets, int32 or int64; None where every id is a bag of its own.
        has_weights: whether ids have weights.
        has_hot: whether escape codes stand for hot rows.
        mean: whether bags are averaged.

    Example:
        >>> Signature(16, 256, 8, False, torch.uint8, torch.float32, None, torch.int64, False, False, False).dim
        128
    """

    num_codes: int
    codebook_size: int
    width: int
    residual: bool
    code: torch.dtype
    word: torch.dtype
    index: torch.dtype | None
    offset: torch.dtype | None
    has_weights: bool
    has_hot: bool
    mean: bool

    @property
    def dim(self) -> int:
        """Columns of the output, D."""
        return self.width if self.residual else self.num_codes * self.width

    @property
    def code_bytes(self) -> int:
        """Bytes of an id's codes."""
        return self.num_codes * self.code.itemsize

    def defines(self) -> dict[str, str | int]:
        """Return the constants that all programs share, by name."""
        return {
            "NUM_CODES": self.num_codes,
            "CODEBOOK_SIZE": self.codebook_size,
            "CODEWORD_WIDTH": self.width,
            "RESIDUAL": int(self.residual),
            "CODE": _CODE_TYPES[self.code],
            "WORD": _WORD_TYPES[self.word],
            "ID": _INDEX_TYPES[self.index or torch.int64],
            "OFFSET": _INDEX_TYPES[self.offset or torch.int64],
            "HAS_IDS": int(self.index is not None),
            "HAS_OFFSETS": int(self.offset is not None),
            "HAS_WEIGHTS": int(self.has_weights),
            "HAS_HOT": int(self.has_hot),
            "MEAN": int(self.mean),
        }


@dataclass(frozen=True)
class Program:
    """One program: what it does, for which tables, and the sizes chosen for it.

    Args:
        purpose: "FORWARD", "BACKWARD", "BACKWARD_WEIGHTS" or "HOT_ROWS" of codes; "TRAINED_LOOK_UP" or
            "TRAINED_UPDATE" of trained rows.
        signature: of the tables.
        sizes: further constants, by name.

    Example:
        >>> signature = Signature(2, 4, 4, False, torch.uint8, torch.float32, None, None, False, False, False)
        >>> Program("HOT_ROWS", signature, ()).source().splitlines()[0]
        '#define HOT_ROWS'
    """

    purpose: str
    signature: Tables
    sizes: tuple[tuple[str, str | int], ...]

    def source(self) -> str:
        """Return the whole text."""
        defines = {**self.signature.defines(), **dict(self.sizes)}
        lines = [f"#define {self.purpose}", *(f"#define {name} {value}" for name, value in defines.items())]
        texts = [(_FOLDER / f"{name}.cuh").read_text() for name in ("base", *_FILES[self.purpose])]
        return "\n".join([*lines, *texts])

    def options(self, architecture: str) -> list[bytes]:
        """Return what the compiler is told.

        Args:
            architecture: for example "sm_90".
        """
        exact = _EXACT if self.purpose.startswith("TRAINED") else ()
        return [option.encode() for option in (f"--gpu-architecture={architecture}", "--std=c++17", *exact)]


def missing() -> str:
    """Return why CUDA programs cannot be compiled here, or ""; asks no GPU and loads nothing.

    Example:
        >>> isinstance(missing(), str)
        True
    """
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the Python package cuda-bindings is not installed"
    return ""


@functools.cache
def compile_program(program: Program, capability: tuple[int, int]) -> bytes:
    """Compile a program with NVRTC, or read it from the cache folder; needs no GPU.

    Args:
        program: what to compile.
        capability: compute capability of the GPU, for example (9, 0).

    Returns:
        The machine code (cubin).

    Raises:
        CannotCompile: NVRTC is missing or refuses the source.

    Example:
        >>> compile_program(program, (9, 0))[:4]  # doctest: +SKIP
        b'\\x7fELF'
    """
    reason = missing()
    if reason:
        raise CannotCompile(reason)
    from cuda.bindings import nvrtc  # pyright: ignore

    try:
        version = _call(nvrtc.nvrtcVersion)
    except RuntimeError as error:  # the package is there without the library
        raise CannotCompile(f"NVRTC does not load: {error}") from error
    options = program.options(f"sm_{capability[0]}{capability[1]}")
    return cached(program.source(), options, version, lambda: _compile(program, options))


def _compile(program: Program, options: list[bytes]) -> bytes:
    """Return a program's machine code."""
    from cuda.bindings import nvrtc  # pyright: ignore

    handle = _call(nvrtc.nvrtcCreateProgram, program.source().encode(), b"torchrec_compress.cu", 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize, handle))
            _call(nvrtc.nvrtcGetProgramLog, handle, log)
            raise CannotCompile(f"NVRTC refused {program}: {log.decode(errors='replace').strip()}")
        code = bytearray(_call(nvrtc.nvrtcGetCUBINSize, handle))
        _call(nvrtc.nvrtcGetCUBIN, handle, code)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return bytes(code)


def _call(function: Any, *arguments: Any) -> Any:
    """Return what a function of NVRTC returns, or raise CannotCompile with its status."""
    status, *rest = function(*arguments)
    if int(status) != 0:
        raise CannotCompile(f"{function.__name__} failed: {status!r}")
    return tuple(rest) if len(rest) > 1 else rest[0] if rest else None
