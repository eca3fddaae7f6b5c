"""The folder of compiled code: whose it is, who may write there, damaged files, and what is said."""

import logging
import os
import stat
from pathlib import Path

import pytest

from tests.ops.cpp.test_kernels import has_compiler
from tests.ops.test_dispatch import LOOKUP, RIGHT, run
from torchrec_compress.ops.cache import CannotBuild, make_private
from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu import cubins

MODE = stat.S_IMODE


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a cache folder that is not there yet, with a compiler that writes "library", once a call."""
    script = tmp_path / "c++"
    lines = ["#!/bin/sh", f"echo call >> {tmp_path}/calls", "for to; do :; done", "echo library > $to", "chmod 777 $to"]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path / "above" / "cache"))
    return tmp_path / "above" / "cache"


def num_builds(folder: Path) -> int:
    calls = (folder.parent.parent / "calls").read_text().count("call")
    per_build = len(list(build.SOURCES.glob("*.cpp"))) + 1
    assert calls % per_build == 0
    return calls // per_build


def test_folders_and_files_are_the_users_alone(folder):
    umask = os.umask(0)
    try:
        library = build.compile_library()
    finally:
        os.umask(umask)
    assert [MODE(path.stat().st_mode) for path in (folder.parent, folder, library)] == [0o700] * 3
    assert MODE(build._digest_path(library).stat().st_mode) & 0o022 == 0


def test_the_one_that_compiles_says_so_in_one_line(folder, caplog):
    library = build.compile_library()
    (message,) = caplog.messages
    assert message.startswith("compiling the C++ kernels with ") and "about a minute, once a machine" in message
    assert message.endswith(f"{library}, there is none yet")
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    build.compile_library()
    assert caplog.messages == []
    assert num_builds(folder) == 1


def test_a_warning_needs_no_logging_set_up(tmp_path):
    code = (
        "from torchrec_compress.ops.cpp import build\nbuild._run_all = lambda commands: 1 / 0\nbuild.compile_library()"
    )
    _, _, err = run(code, tmp_path)
    assert err.startswith("compiling the C++ kernels with "), err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it is not what its checksum says"),
    "empty": (lambda path: path.write_bytes(b""), "it is not what its checksum says"),
    "flipped": (flip, "it is not what its checksum says"),
    "another": (lambda path: path.write_bytes(b"LIBRARY\n"), "it is not what its checksum says"),
    "without a checksum": (lambda path: build._digest_path(path).unlink(), "it has no checksum"),
    "a checksum that is no text": (
        lambda path: build._digest_path(path).write_bytes(b"\xff\xfe\x00"),
        "it is not what its checksum says",
    ),
    "group": (lambda path: path.chmod(0o770), r"others may write to it (mode 770)"),
    "others": (lambda path: path.chmod(0o702), r"others may write to it (mode 702)"),
    "link": (link, "it is no plain file"),
    "dangling link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "it is no plain file"),
    "another user's": (lambda path: os.chown(path, 12345, -1), "it is user 12345's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_must_not_be_loaded_is_compiled_anew_and_the_reason_said(folder, damage, caplog):
    if damage == "another user's" and os.geteuid() != 0:
        pytest.skip("only root may give files away")
    library = build.compile_library()
    caplog.clear()
    spoil, reason = DAMAGES[damage]
    spoil(library)
    assert build.compile_library() == library
    (message,) = caplog.messages
    assert message.endswith(f"{library}, {reason}")
    assert library.read_text() == "library\n" and not library.is_symlink()
    assert MODE(library.stat().st_mode) == 0o700
    build.compile_library()
    assert num_builds(folder) == 2


def test_without_a_compiler_a_damaged_library_is_not_loaded(folder, monkeypatch):
    library = build.compile_library()
    library.write_bytes(b"")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotBuild, match="there is no C\\+\\+ compiler"):
        build.compile_library()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_write_to_is_refused(folder, mode):
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(
        CannotBuild, match=rf"{folder} must not be writable by others.* got mode {mode:o}; run chmod go-w"
    ):
        build.compile_library()
    assert list(folder.iterdir()) == []


def test_a_folder_that_others_came_to_write_to_is_refused_with_all_that_lies_there(folder):
    build.compile_library()
    folder.chmod(0o777)
    with pytest.raises(CannotBuild, match="must not be writable by others"):
        build.compile_library()


def test_a_folder_that_is_a_link_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotBuild, match=rf"{folder} must not be a symbolic link"):
        build.compile_library()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_lock_that_is_a_link_is_not_followed(folder, tmp_path):
    library, precious = build.compile_library(), tmp_path / "precious"
    library.unlink()
    precious.write_text("kept")
    lock = library.with_suffix(".lock")
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(CannotBuild, match=rf"the cache folder {folder} cannot be used: .*{lock.name}"):
        build.compile_library()
    assert precious.read_text() == "kept"


def test_another_users_folder_is_refused(folder, monkeypatch):
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CannotBuild, match=rf"{folder} must be of user 12345, .* got one of user {os.getuid()}"):
        build.compile_library()
    assert list(folder.iterdir()) == []


def test_the_folder_may_be_read_by_others(folder):
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    make_private(folder)
    build.compile_library()


def test_a_library_that_another_process_has_replaced_is_not_compiled_again(folder):
    library = build.compile_library()
    before = build.Refused(library.stat(), "wrong")
    library.rename(folder / "old")  # its inode stays taken
    build.compile_library()
    build.compile_library(before)
    assert num_builds(folder) == 2
    build.compile_library(build.Refused(library.stat(), "wrong"))
    assert num_builds(folder) == 3


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("is_mended", [True, False])
def test_a_library_that_does_not_load_is_compiled_anew_once(tmp_path, is_mended):
    whole = build.compile_library()
    script = tmp_path / "c++"
    content = f'cp {whole} "$target"' if is_mended else 'echo "none" > "$target"'
    script.write_text(f"#!/bin/sh\nfor target; do :; done\n{content}\n")
    script.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache / whole.name).write_text("of another machine")
    (cache / whole.name).chmod(0o700)
    build._digest_path(cache / whole.name).write_text(build._digest(cache / whole.name))
    status, out, err = run(LOOKUP, cache, CXX=str(script))
    assert (status, out) == (0, RIGHT * 2 + ("['cpp']\n" if is_mended else "['fbgemm']\n")), err
    lines = err.splitlines()
    assert lines[0].startswith("compiling the C++ kernels") and "it does not load: " in lines[0]
    if is_mended:
        assert len(lines) == 1
        assert run(LOOKUP, cache, CXX=str(script)) == (0, out, "")
    else:
        assert len(lines) == 2 and "codebook_bag runs on FBGEMM" in lines[1] and "does not load" in lines[1]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that asks for a compiled CUDA program, and what it had to compile."""
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path / "cache"))
    cubins._warn.cache_clear()
    compiled = []

    def ask() -> bytes:
        return cubins.cached("source", [b"sm_90"], (13, 0), lambda: compiled.append(1) or b"code")

    yield ask, compiled
    cubins._warn.cache_clear()


def test_compiled_cuda_programs_are_the_users_alone(program, tmp_path):
    ask, compiled = program
    assert [ask(), ask()] == [b"code"] * 2 and len(compiled) == 1
    folder = tmp_path / "cache" / "cubins"
    (path,) = folder.iterdir()
    assert [MODE(found.stat().st_mode) for found in (folder.parent, folder, path)] == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("which", ["cache", "cache/cubins"])
def test_a_folder_that_others_write_to_is_not_used_for_cuda_programs(program, tmp_path, which, caplog):
    ask, compiled = program
    ask()
    (tmp_path / which).chmod(0o777)
    assert [ask(), ask()] == [b"code"] * 2 and len(compiled) == 3
    (message,) = caplog.messages
    assert f"compiled in every process, because the cache folder {tmp_path / which} must not be writable" in message


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o606), link], ids=["mode", "link"])
def test_a_cuda_program_that_others_may_have_written_is_compiled_anew(program, tmp_path, spoil):
    ask, compiled = program
    ask()
    (path,) = (tmp_path / "cache" / "cubins").iterdir()
    spoil(path)
    assert [ask(), ask()] == [b"code"] * 2 and len(compiled) == 2
    assert not path.is_symlink() and MODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("command", ['"g++', " "])
def test_a_compiler_that_is_no_command(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.CannotBuild, match="is not a program"):
        build.find_compiler()
