"""A checkpoint from a stranger, whose checksums are right: nothing in it runs, and nothing outside it is read."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from torchrec_compress.train import sealed
from torchrec_compress.train.engine import checkpoint_reader
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.checkpoint_reader import read


class _Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


@pytest.fixture
def saved(tmp_path, ranks) -> Path:
    """A checkpoint of a tensor and of plain data."""
    store = Checkpoints(tmp_path, {}, ranks)
    store.save(1, {"value": torch.ones(3), "plain": {"rate": 0.5, "names": ["a"]}}, {})
    store.wait()
    return tmp_path / "step000000001"


def _replace(path: Path, content: bytes) -> None:
    """Change a file, and its checksum as a stranger would."""
    path.write_bytes(content)
    sums = sealed.listed(path.parent)
    assert sums is not None
    sealed.write_sums(path.parent, {**sums, path.name: sealed.digest(path)})


def _metadata(saved: Path) -> metadata.Metadata:
    return pickle.loads((saved / ".metadata").read_bytes())


def test_what_was_saved_is_read(saved):
    state = {"value": torch.zeros(3), "plain": {"rate": 0.0, "names": []}}
    read(saved, state)
    assert torch.equal(state["value"], torch.ones(3)) and state["plain"]["rate"] == 0.5


def test_our_reader_reads_what_torchs_own_reads(saved):
    mine, theirs = checkpoint_reader._Reader(saved, set(os.listdir(saved))), dcp.FileSystemReader(saved)
    one, other = mine.read_metadata(), theirs.read_metadata()
    for found in (one, other):
        assert found.storage_meta is not None
        found.storage_meta.load_id = None
    assert one == other


@pytest.mark.parametrize("where", ["whole", "planner_data", "key"])
def test_metadata_runs_nothing(saved, tmp_path, where):
    mark, found = tmp_path / "mark", _metadata(saved)
    if where == "planner_data":
        found.planner_data = _Runs(mark)
    elif where == "key":
        found.state_dict_metadata[(_Runs(mark),)] = metadata.BytesStorageMetadata()  # type: ignore[index]
    _replace(saved / ".metadata", pickle.dumps(_Runs(mark) if where == "whole" else found))
    with pytest.raises(ValueError, match=r"\.metadata: is refused, nothing in it ran .*must not name posix\.system"):
        read(saved, {"value": torch.zeros(3)})
    assert not mark.exists()


_ATTRIBUTE = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__new__'\ntR."
_BUILD = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'__eq__'\nctorch\nSize\nstb."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_ATTRIBUTE, "must not read an attribute of"),
        (_BUILD, "must fill instances of metadata only"),
        (b"cbuiltins\neval\n.", r"must not name builtins\.eval"),
        (b"ctorch\nload\n.", r"must not name torch\.load"),
        (b"ctorch.serialization\n_get_layout\n(S'os.system'\ntR.", "KeyError"),
        (b"ctorch.distributed.checkpoint.metadata\nos.system\n.", "must not name"),
        (b"}.", "must be a checkpoint's metadata, got dict"),
        (b"\x80", ""),
        (b"", ""),
    ],
)
def test_metadata_names_no_more_than_it_needs(saved, content, message):
    before = metadata.Metadata.__eq__
    _replace(saved / ".metadata", content)
    with pytest.raises(ValueError, match=rf"\.metadata: is refused, nothing in it ran .*{message}"):
        read(saved, {"value": torch.zeros(3)})
    assert metadata.Metadata.__eq__ is before


def test_plain_data_runs_nothing(saved, tmp_path):
    """torch's own planner unpickles what is no tensor, whatever it is."""
    buffer, found = io.BytesIO(), _metadata(saved)
    torch.save(_Runs(tmp_path / "mark"), buffer)
    path = saved / "__0_0.distcp"
    info = next(info for index, info in found.storage_data.items() if index.fqn == "plain.rate")
    info.offset, info.length = path.stat().st_size, len(buffer.getvalue())
    _replace(path, path.read_bytes() + buffer.getvalue())
    _replace(saved / ".metadata", pickle.dumps(found))
    with pytest.raises(ValueError, match="must fit the model"):
        read(saved, {"plain": {"rate": 0.0, "names": []}})
    assert not (tmp_path / "mark").exists()
    dcp.load({"plain": {"rate": 0.0}}, storage_reader=dcp.FileSystemReader(saved), no_dist=True)
    assert (tmp_path / "mark").exists()  # the attack is one


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "meta/../../x", 7])
def test_metadata_names_files_of_its_folder_only(saved, tmp_path, name):
    found = _metadata(saved)
    (tmp_path / "outside.distcp").write_bytes((saved / "__0_0.distcp").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = name
    _replace(saved / ".metadata", pickle.dumps(found))
    with pytest.raises(ValueError, match="must name files that SHA256SUMS lists, got"):
        read(saved, {"value": torch.zeros(3)})


def test_lists_name_files_of_their_folder_only(saved, tmp_path):
    (tmp_path / "outside").write_text("")
    for name in ("../outside", "..", "/etc/hostname"):
        (saved / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ValueError, match="SHA256SUMS: must be lines of a SHA-256 and a name"):
            read(saved, {"value": torch.zeros(3)})


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
def test_links_and_files_without_a_checksum_are_refused(saved, tmp_path, name):
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} must be a regular file, got a link"):
        read(saved, {"value": torch.zeros(3)})
    (saved / name).unlink()
    (tmp_path / "elsewhere").rename(saved / name)
    read(saved, {"value": torch.zeros(3)})
    sums = sealed.listed(saved) or {}
    sealed.write_sums(saved, {key: value for key, value in sums.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} (has no checksum|is truncated or changed)"):
        read(saved, {"value": torch.zeros(3)})


def test_a_checkpoint_under_another_name_is_refused(saved, ranks):
    saved.rename(saved.with_name("step000000002"))
    with pytest.raises(ValueError, match="must be that of step 1 by its name"):
        Checkpoints(saved.parent, {}, ranks).newest()


def test_files_are_read_once_by_a_process(saved, monkeypatch):
    """Not again for every table that the fit reads; but again where one has changed."""
    old = os.stat(saved / "__0_0.distcp").st_mtime - 60
    for path in saved.iterdir():
        os.utime(path, (old, old))
    reads, count = [], sealed._hash
    monkeypatch.setattr(sealed, "_hash", lambda file: (reads.append(file.name), count(file))[1])
    for _ in range(3):
        read(saved, {"value": torch.zeros(3)})
    assert sorted(Path(name).name for name in reads) == sorted(
        path.name for path in saved.iterdir() if path.suffix or path.name != "SHA256SUMS"
    )
    path = saved / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="truncated or changed"):
        read(saved, {"value": torch.zeros(3)})
