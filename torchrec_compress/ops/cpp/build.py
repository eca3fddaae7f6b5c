"""The C++ kernels: built by the system's compiler at first use into a per-user cache, loaded, and registered."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from torchrec_compress.ops.cache import CannotBuild, cache_folder, distrust, make_private
from torchrec_compress.ops.cpp import coded_ids, nearest, operators, trained

SOURCES = Path(__file__).parent / "csrc"
# The stable ABI of torch 2.11, the oldest torch that is supported: one library serves it and every later torch.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512vl")
_ISA_FLAGS = {
    "kernels_avx2": _AVX2,
    "kernels_avx512": _AVX512,
    "nearest_avx2": _AVX2,
    "nearest_avx512": _AVX512,
    "trained_avx2": _AVX2,
    "trained_avx512": _AVX512,
}
# what trained rows become must not depend on the processor, nor on who computes it: no fused multiply-adds; that no
# one looks at floating point exceptions changes no value, but lets choices between two values be vectorised
_PLAIN_FLAGS = ("-ffp-contract=off", "-fno-trapping-math")
_OTHER_COMPILER = "Set CXX to a compiler of C++17 for this machine"
_log = logging.getLogger(__name__)


def library_path() -> Path:
    """Return the library's place in the cache; its name is a hash of sources, flags, processor family and C library.

    Example:
        >>> library_path().suffix
        '.so'
    """
    flags = (FLAGS, _ISA_FLAGS, _PLAIN_FLAGS)
    key = hashlib.sha256(repr((*flags, platform.machine(), platform.libc_ver(sys.executable))).encode())
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
        try:
            command = shlex.split(wanted)
        except ValueError:  # a quotation without its end
            command = []
        if command and shutil.which(command[0]):
            return command
        raise CannotBuild(f"$CXX = {wanted!r} is not a program", _OTHER_COMPILER)
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise CannotBuild("there is no C++ compiler (looked for $CXX, c++, g++, clang++)", "Install a C++ compiler")


class Refused(NamedTuple):
    """A library that the loader refused.

    Args:
        status: of the file, which tells it from one that another process has put into its place since.
        reason: what the loader said.
    """

    status: os.stat_result
    reason: str


def compile_library(refused: Refused | None = None) -> Path:
    """Compile the library unless the cache has it whole; of many processes that start at once, one compiles.

    The one that does logs a warning, which is on stderr wherever nobody has set logging up: a first look-up that takes
    a minute should say why, and a library that must not be loaded should not be replaced in silence.

    Args:
        refused: a library that does not load; it is compiled anew, unless another process already has.

    Returns:
        The library's path.

    Raises:
        CannotBuild: no compiler, a compiler error, or a cache folder that cannot or must not be used.

    Example:
        >>> compile_library().exists()  # doctest: +SKIP
        True
    """
    library = library_path()
    try:
        if os.path.lexists(library.parent):
            make_private(library.parent)
        reason = _distrust(library, refused)
        if not reason:
            return library
        compiler = find_compiler()
        import fcntl

        make_private(library.parent)
        # a link would be followed to a file that is not ours to open
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(library.with_suffix(".lock"), flags, 0o600), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # the one who held the lock before us may have built it
            if reason := _distrust(library, refused):
                _make(compiler, library, reason)
    except (OSError, ImportError) as error:
        raise CannotBuild(f"the cache folder {library.parent} cannot be used: {error}") from error
    return library


def _distrust(library: Path, refused: Refused | None) -> str:
    """Return why a library must not be loaded, or ""."""
    if not os.path.lexists(library):
        return "there is none yet"
    if reason := distrust(library):
        return reason
    if refused is not None and os.path.samestat(library.stat(), refused.status):
        return f"it does not load: {refused.reason}"
    try:
        noted = _digest_path(library).read_text(errors="replace")
    except FileNotFoundError:
        return "it has no checksum"
    return "" if noted == _digest(library) else "it is not what its checksum says"


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _make(compiler: list[str], library: Path, reason: str) -> None:
    """Compile the library and put it into its place, in one rename: no process ever sees half of it."""
    _log.warning(
        "compiling the C++ kernels with %s, about a minute, once a machine: %s, %s", compiler[0], library, reason
    )
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = _compile(compiler, Path(folder))
        made.chmod(0o700)
        digest = Path(folder, "digest")
        digest.write_text(_digest(made))
        digest.chmod(0o600)
        # between the two renames the library is not what its checksum says, and a reader waits for our lock
        os.replace(digest, _digest_path(library))
        os.replace(made, library)


def _compile(compiler: list[str], folder: Path) -> Path:
    """Compile all sources side by side, link them, and return the library, in `folder`."""
    # torch.utils.cpp_extension knows these folders too, but looks for CUDA when it is imported, and warns on stderr
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include"]
    flags = [*FLAGS, *(flag for path in include for flag in ("-isystem", str(path)))]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    commands = []
    for source in sorted(SOURCES.glob("*.cpp")):
        extra = _ISA_FLAGS.get(source.stem, ()) if is_x86 else ()
        extra = (*extra, *(_PLAIN_FLAGS if source.stem.startswith("trained") else ()))
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
        raise CannotBuild(f"{commands[0][0]} does not run: {error}", _OTHER_COMPILER) from error
    ended = [(process.communicate()[1], process.returncode) for process in started]
    for errors, status in ended:
        if status:
            first = next((line for line in errors.splitlines() if "error" in line), errors[-200:])
            raise CannotBuild(f"{commands[0][0]} failed with status {status}: {first.strip()}", _OTHER_COMPILER)


def load() -> str:
    """Build the library if need be, load it and register shapes and gradients.

    Returns:
        The instruction set that its kernels use: "avx512", "avx2" or "base".

    A library that does not load, such as one for another C library, is compiled anew, once.

    Raises:
        CannotBuild: see `build`; or the library does not load.

    Example:
        >>> load()  # doctest: +SKIP
        'avx2'
    """
    library = compile_library()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        library = compile_library(Refused(library.stat(), str(error)))
    try:
        torch.ops.load_library(str(library))  # a second time does nothing
        name = ctypes.CDLL(str(library)).torchrec_compress_instruction_set
    except (OSError, AttributeError) as error:
        raise CannotBuild(f"{library} does not load: {error}", _OTHER_COMPILER) from error
    name.restype = ctypes.c_char_p
    operators.register()
    trained.register()
    nearest.register()
    coded_ids.register()
    return name().decode()
