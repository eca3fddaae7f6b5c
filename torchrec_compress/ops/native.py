"""The C++ kernels: built by the system's compiler at first use into a per-user cache, loaded, and registered."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
# The stable ABI of torch 2.11, the oldest torch that is supported: one library serves it and every later torch.
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_ISA_FLAGS = {"codebook_bag_avx2": ("-mavx2", "-mfma")}


class CannotBuild(Exception):
    """Why there is no C++ library: no compiler, or one that failed."""


def cache_folder() -> Path:
    """Return where libraries are kept: $TORCHREC_COMPRESS_CACHE, or torchrec_compress in the user's cache folder.

    Raises:
        CannotBuild: the user has no home folder, as in some containers.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    own, base = os.environ.get("TORCHREC_COMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own or base:
        return Path(own or Path(str(base), "torchrec_compress")).absolute()
    try:
        return Path.home() / ".cache" / "torchrec_compress"
    except RuntimeError as error:
        raise CannotBuild(f"there is no cache folder: {error}; set TORCHREC_COMPRESS_CACHE") from error


def library_path() -> Path:
    """Return the library's place in the cache; its name is a hash of sources, flags, processor family and C library.

    Example:
        >>> library_path().suffix
        '.so'
    """
    key = hashlib.sha256(repr((_FLAGS, _ISA_FLAGS, platform.machine(), platform.libc_ver(sys.executable))).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            key.update(source.read_bytes())
    return cache_folder() / f"codebook_bag_{key.hexdigest()[:16]}.so"


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path.

    Raises:
        CannotBuild: there is none.

    Example:
        >>> isinstance(find_compiler(), list)  # doctest: +SKIP
        True
    """
    wanted = os.environ.get("CXX")
    if wanted:
        command = shlex.split(wanted)
        if shutil.which(command[0]):
            return command
        raise CannotBuild(f"$CXX = {wanted!r} is not a program")
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise CannotBuild("there is no C++ compiler (looked for $CXX, c++, g++, clang++)")


def build() -> Path:
    """Compile the library unless the cache has it; of many processes that start at once, one compiles.

    Returns:
        The library's path.

    Raises:
        CannotBuild: no compiler, a compiler error, or a cache folder that cannot be written.

    Example:
        >>> build().exists()  # doctest: +SKIP
        True
    """
    library = library_path()
    if library.exists():
        return library
    compiler = find_compiler()
    try:
        import fcntl

        library.parent.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # the one who held the lock before us may have built it
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                    # a rename is atomic: no process ever sees half a library
                    os.replace(_compile(compiler, Path(folder)), library)
    except (OSError, ImportError) as error:
        raise CannotBuild(f"the cache folder {library.parent} cannot be used: {error}") from error
    return library


def _compile(compiler: list[str], folder: Path) -> Path:
    """Compile all sources side by side, link them, and return the library, in `folder`."""
    # torch.utils.cpp_extension knows these folders too, but looks for CUDA when it is imported, and warns on stderr
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include"]
    flags = [*_FLAGS, *(flag for path in include for flag in ("-isystem", str(path)))]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    commands = []
    for source in sorted(SOURCES.glob("*.cpp")):
        extra = _ISA_FLAGS.get(source.stem, ()) if is_x86 else ()
        commands.append([*compiler, *flags, *extra, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
    _run_all(commands)
    library = folder / "library.so"
    objects = sorted(str(path) for path in folder.glob("*.o"))
    _run_all([[*compiler, "-shared", *objects, "-L", str(home / "lib"), "-ltorch_cpu", "-lc10", "-o", str(library)]])
    return library


def _run_all(commands: list[list[str]]) -> None:
    """Run commands side by side and wait for all of them, also when one fails."""
    try:
        started = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
    except OSError as error:
        raise CannotBuild(f"{commands[0][0]} does not run: {error}") from error
    ended = [(process.communicate()[1], process.returncode) for process in started]
    for errors, status in ended:
        if status:
            first = next((line for line in errors.splitlines() if "error" in line), errors[-200:])
            raise CannotBuild(f"{commands[0][0]} failed with status {status}: {first.strip()}")


def load() -> str:
    """Build the library if need be, load it and register shapes and gradients.

    Returns:
        The instruction set that its kernels use: "avx2" or "base".

    Raises:
        CannotBuild: see `build`; or the library does not load.

    Example:
        >>> load()  # doctest: +SKIP
        'avx2'
    """
    library = build()
    try:
        torch.ops.load_library(str(library))
        name = ctypes.CDLL(str(library)).torchrec_compress_instruction_set
    except (OSError, AttributeError) as error:
        raise CannotBuild(f"{library} does not load: {error}") from error
    name.restype = ctypes.c_char_p
    _register()
    return name().decode()


def _register() -> None:
    """Give the operators shapes without data (for torch.compile and torch.export) and gradients."""
    torch.library.register_fake("torchrec_compress::codebook_bag", _fake)
    torch.library.register_fake("torchrec_compress::codebook_bag_backward", _fake_backward)
    torch.library.register_fake("torchrec_compress::codebook_bag_backward_weights", _fake_backward_weights)
    torch.library.register_autograd("torchrec_compress::codebook_bag", _backward, setup_context=_setup_context)


def _fake(
    codes: Tensor,
    codebooks: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    hot_rows: Tensor | None,
    residual: bool,
) -> Tensor:
    num_bags = codes.shape[0] if offsets is None else offsets.shape[0] - 1
    return codebooks.new_empty(num_bags, codebooks.shape[1] * (1 if residual else codes.shape[1]))


def _fake_backward(
    grad: Tensor,
    codes: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    num_words: int,
    width: int,
    num_hot: int,
    wants_hot_rows: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    hot_rows = grad.new_empty(num_hot if wants_hot_rows else 0, width * (1 if residual else codes.shape[1]))
    return grad.new_empty(num_words, width), hot_rows


def _fake_backward_weights(
    grad: Tensor, codes: Tensor, codebooks: Tensor, offsets: Tensor | None, hot_rows: Tensor | None, residual: bool
) -> Tensor:
    return grad.new_empty(codes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebooks, offsets, weights, hot_rows, residual = inputs
    ctx.words, ctx.num_hot = tuple(codebooks.shape), 0 if hot_rows is None else hot_rows.shape[0]
    ctx.residual = residual
    # values are needed for the gradient of weights only: without it, codebooks may change between forward and backward
    is_weight_trained = weights is not None and weights.requires_grad
    tables = (codebooks, hot_rows) if is_weight_trained else (None, None)
    ctx.save_for_backward(codes, offsets, weights, *tables)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, offsets, weights, codebooks, hot_rows = ctx.saved_tensors
    _, wants_codebooks, _, wants_weights, wants_hot_rows, _ = ctx.needs_input_grad
    ops = torch.ops.torchrec_compress
    of_codebooks = of_hot_rows = of_weights = None
    if wants_codebooks or wants_hot_rows:
        of_codebooks, of_hot_rows = ops.codebook_bag_backward(
            grad, codes, offsets, weights, *ctx.words, ctx.num_hot, wants_hot_rows, ctx.residual
        )
    if wants_weights:
        of_weights = ops.codebook_bag_backward_weights(grad, codes, codebooks, offsets, hot_rows, ctx.residual)
    return (
        None,
        of_codebooks if wants_codebooks else None,
        None,
        of_weights,
        of_hot_rows if wants_hot_rows else None,
        None,
    )
