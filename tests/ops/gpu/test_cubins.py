"""The cache of compiled CUDA programs, with NVRTC itself, which needs no GPU."""

import os

import pytest
import torch

from tests.sharding.ranks import forkserver
from torchrec_compress.ops.gpu import cubins, program
from torchrec_compress.ops.gpu.program import CannotCompile, Program, Signature, compile_program

SIGNATURE = Signature(2, 4, 4, False, torch.uint8, torch.float32, None, None, False, False, False)
PROGRAM = Program("HOT_ROWS", SIGNATURE, ())
GPU = (9, 0)
pytestmark = pytest.mark.skipif(bool(program.missing()), reason=program.missing())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path / "cache"))
    _forget()
    yield tmp_path / "cache" / "cubins"
    _forget()


def _forget() -> None:
    """Be a process that starts."""
    compile_program.cache_clear()
    cubins._warn.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """Count what NVRTC compiles."""
    found = []
    compile_ = program._compile
    monkeypatch.setattr(program, "_compile", lambda *given: found.append(given) or compile_(*given))
    return found


def test_a_second_process_reads_what_the_first_compiled(folder, compilations):
    first = compile_program(PROGRAM, GPU)
    _forget()
    assert compile_program(PROGRAM, GPU) == first
    assert first[:4] == b"\x7fELF"
    assert len(compilations) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_another_architecture_source_or_compiler_is_another_file(folder, compilations, monkeypatch):
    compile_program(PROGRAM, GPU)
    compile_program(PROGRAM, (8, 0))
    compile_program(Program("HOT_ROWS", SIGNATURE, (("UNUSED", 1),)), GPU)
    _forget()
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 99, 1))
    compile_program(PROGRAM, GPU)
    assert len(compilations) == len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"x", "cut", "flipped"])
def test_a_damaged_file_is_compiled_anew(damage, folder, compilations):
    whole = compile_program(PROGRAM, GPU)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "flipped":
        damage = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    path.write_bytes(content[:-7] if damage == "cut" else damage)
    _forget()
    assert compile_program(PROGRAM, GPU) == whole
    assert path.read_bytes() == content
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path, monkeypatch, compilations, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path / "file"))
    for capability in (GPU, (8, 0)):
        assert compile_program(PROGRAM, capability)[:4] == b"\x7fELF"
    assert len(compilations) == 2
    (message,) = caplog.messages
    assert "compiled in every process, because" in message and str(tmp_path / "file") in message


def test_a_full_disk_leaves_no_file_behind(folder, monkeypatch, caplog):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert compile_program(PROGRAM, GPU)[:4] == b"\x7fELF"
    assert list(folder.iterdir()) == []
    assert "cannot be written: No space left on device" in caplog.text


def test_without_a_home_folder_there_is_no_cache(monkeypatch, compilations, caplog):
    def refuse():
        raise cubins.CannotBuild("there is no cache folder: no home")

    monkeypatch.setattr(cubins, "cache_folder", refuse)
    assert compile_program(PROGRAM, GPU)[:4] == b"\x7fELF"
    assert "because there is no cache folder: no home" in caplog.text


def test_what_does_not_compile_is_not_kept(folder):
    broken = Program("HOT_ROWS", SIGNATURE, (("CODE", "nonsense"),))
    with pytest.raises(CannotCompile, match="NVRTC refused"):
        compile_program(broken, GPU)
    assert not list(folder.glob("*"))


def _start(cache, barrier, queue) -> None:
    os.environ["TORCHREC_COMPRESS_CACHE"] = cache
    barrier.wait(60)
    queue.put(compile_program(PROGRAM, GPU))


@pytest.mark.slow
def test_many_processes_start_at_once(folder):
    context = forkserver()
    barrier, queue = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_start, args=(str(folder.parent), barrier, queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    codes = {queue.get(timeout=200) for _ in ranks}
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert codes == {compile_program(PROGRAM, GPU)}
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
