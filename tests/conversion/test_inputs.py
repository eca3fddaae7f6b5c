"""What is wrong with a checkpoint, a config or a disk is said in one line, and nothing is lost or half there."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn

from tests.cases import DIM, NUM_ROWS, rows
from tests.conversion.made import Model, digest, run
from torchrec_compress import compress
from torchrec_compress.cli import main
from torchrec_compress.conversion import fits, outputs
from torchrec_compress.conversion.checkpoints import open_checkpoint
from torchrec_compress.conversion.work import Work
from torchrec_compress.methods import PQConfig

PQ = {"method": "pq", "num_codes": 4, "codebook_size": 16}
USER = "sparse.embedding_bags.user.weight"
TOLD = {"compression": {"user": PQ}}


@pytest.fixture
def dense(tmp_path) -> Path:
    path = tmp_path / "dense.pt"
    torch.save({USER: rows(), "net.weight": torch.ones(3, 3)}, path)
    return path


def refuse(source: Path, told: dict, match: str, target: str = "small.pt") -> None:
    """Fail unless a conversion is refused in these words, leaves the source and makes nothing."""
    before = digest(source) if source.exists() and not source.is_symlink() else ""
    out = source.parent / target
    with pytest.raises((ValueError, OSError, ImportError), match=match):
        run(source, out, told)
    assert not os.path.lexists(out) and (not before or digest(source) == before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compressions": {}}, "yaml: unknown key 'compressions'; did you mean 'compression'"),
        (
            {"compression": {"user": {"method": "pk"}}},
            "compression.user.method: must be one of .*got 'pk'; did you mean",
        ),
        ({"compression": {"user": {**PQ, "num_cods": 4}}}, "unknown key 'compression.user.num_cods'; did you mean"),
        ({"compression": {"usr": PQ}}, r"every key must fit a table, got \['usr'\]; did you mean 'user'"),
        (
            {"tables": {"net.wait": {}}},
            r"tables.net.wait must fit the weight of a table, got none; did you mean 'net.w",
        ),
        ({"tables": {USER: {"padding": 3}}}, "did you mean 'tables.*padding_idx'"),
        ({"tables": {USER: {"pooled": False}}}, "must not set pooled to False"),
        ({"tables": {"*t": {}, "net*": {}}}, "must fit one entry of tables, got"),
        ({"tables": {USER: {"num_embeddings": 3, "embedding_dim": 4}}}, "say in 'from'"),
        ({"tables": {USER: {"num_embeddings": 3}}}, "must come together"),
        ({"from": {"user": {"method": "x"}}}, "from.user.method: must be one of"),
        ({"from": {"user": PQ}}, "'from' must come with the sizes"),
        ({"from_seed": 3}, "from_seed: must come with 'from'"),
        ({"seed": -1}, "seed: must be in"),
        ({"counts": {"user": "nowhere.npy"}}, "counts: 'user': nowhere.npy: is missing"),
        ({"counts": {"usr": "x.npy"}}, "counts must name tables, got 'usr'; did you mean 'user'"),
        ({"counts": "optimiser"}, "counts: must be"),
        ({"counts": "optimizer"}, "counts: must be the sums of one Adagrad in the checkpoint, got none"),
        ({"compression": {"user": {**PQ, "num_codes": 3}}}, "num_codes"),
        ({"compression": {"user": {**PQ, "num_hot_rows": 3}}}, "num_hot_rows = 3 must come with counts"),
    ],
)
def test_bad_configs(dense, changes, match):
    refuse(dense, {**TOLD, **changes}, match)
    assert not (dense.parent / "small.pt.part" / "conversion.json").exists()


def test_bad_counts(dense, tmp_path):
    files = {
        "short.npy": (np.ones(3), r"must hold 403 numbers, one per id, got torch.float64 \(3,\)"),
        "objects.npy": (np.array([{}], dtype=object), "Object arrays cannot be loaded"),
        "negative.npy": (-np.ones(NUM_ROWS), "counts"),
    }
    for name, (values, match) in files.items():
        np.save(tmp_path / name, values, allow_pickle=True)
        refuse(dense, {**TOLD, "counts": {"user": str(tmp_path / name)}}, match)
    (tmp_path / "link.npy").symlink_to(tmp_path / "short.npy")
    refuse(dense, {**TOLD, "counts": {"user": str(tmp_path / "link.npy")}}, "must be a regular file, got a link")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/evil-was-here",))


def test_foreign_files_are_refused_and_nothing_in_them_runs(tmp_path):
    torch.save({USER: rows(), "x": Evil()}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", TOLD, "must be a zip archive of torch.save that holds tensors and plain data alone")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": Evil()}))
    refuse(tmp_path / "pickle.pt", TOLD, "nothing in it ran")
    torch.save([rows()], tmp_path / "list.pt")
    refuse(tmp_path / "list.pt", TOLD, "must hold a mapping, got list")
    torch.save({USER: rows()[:1].expand(10**9, DIM)}, tmp_path / "bomb.pt")
    refuse(tmp_path / "bomb.pt", TOLD, "must hold each of its values")
    refuse(tmp_path / "none.pt", TOLD, "must be a checkpoint, got nothing there")
    (tmp_path / "odd.xyz").write_bytes(b"")
    refuse(tmp_path / "odd.xyz", TOLD, "must be a folder .* or end in")
    assert not Path("/tmp/evil-was-here").exists()


def test_a_safetensors_file_that_is_none(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    refuse(tmp_path / "x.safetensors", TOLD, "must be a safetensors file")


def test_a_file_that_is_cut_short(dense):
    content = dense.read_bytes()
    dense.write_bytes(content[: len(content) // 2])
    refuse(dense, TOLD, "nothing in it ran")


@pytest.fixture
def folder(tmp_path) -> Path:
    dcp.save({USER: rows(), "epoch": 3}, checkpoint_id=tmp_path / "dense", no_dist=True)
    return tmp_path / "dense"


def test_a_damaged_folder(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "fine", TOLD)
    (data,) = folder.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-2000])
    refuse(folder, TOLD, "it is cut short")
    data.write_bytes(b"\0" * len(content))
    refuse(folder, TOLD, "must be a tensor that torch saved|its plain data")
    data.unlink()
    refuse(folder, TOLD, "must name regular files of its folder")
    data.symlink_to("/etc/hostname")
    refuse(folder, TOLD, "must name regular files of its folder")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    refuse(folder, TOLD, "is refused, nothing in it ran")
    (folder / ".metadata").unlink()
    refuse(folder, TOLD, "got no .metadata file in it")


def test_a_folder_that_lacks_a_shard_or_has_one_twice(tmp_path, monkeypatch):
    """Written in chunks; the metadata of one is taken away, or comes again."""
    monkeypatch.setattr(outputs, "CHUNK_BYTES", 4000)
    for name, change, match in (
        ("lacking", lambda chunks: chunks.pop(2), "a shard is missing"),
        ("twice", lambda chunks: chunks.append(chunks[1]), "chunks must not overlap"),
    ):
        path = tmp_path / name
        outputs.write_folder(path, {USER: rows()})
        about = dcp.FileSystemReader(path).read_metadata()
        assert len(about.state_dict_metadata[USER].chunks) > 3
        change(about.state_dict_metadata[USER].chunks)
        (path / ".metadata").write_bytes(pickle.dumps(about))
        refuse(path, TOLD, f"{USER}'.*{match}")


def test_links_are_refused(dense, folder, tmp_path):
    (tmp_path / "link.pt").symlink_to(dense)
    refuse(tmp_path / "link.pt", TOLD, "must be a file or a folder, got a link")
    (tmp_path / "link").symlink_to(folder)
    refuse(tmp_path / "link", TOLD, "must be a file or a folder, got a link")
    (tmp_path / "small.pt.part").symlink_to(folder)
    before = digest(folder)
    refuse(dense, TOLD, "small.pt.part: must be a folder of a killed conversion")
    assert digest(folder) == before


def test_nothing_that_stands_in_the_way_is_lost(dense, folder, tmp_path):
    (tmp_path / "small.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"small.pt: must not exist, got something there"):
        run(dense, tmp_path / "small.pt", TOLD)
    assert (tmp_path / "small.pt").read_text() == "mine"
    (tmp_path / "other.pt.part").mkdir()
    (tmp_path / "other.pt.part" / "precious").write_text("mine")
    refuse(dense, TOLD, r"other.pt.part: must be left by a killed conversion, got \['precious'\]", "other.pt")
    assert (tmp_path / "other.pt.part" / "precious").read_text() == "mine"
    refuse(dense, TOLD, "must lie in a folder that exists", "none/small.pt")
    (tmp_path / "third.pt.report.json").write_text("mine")
    refuse(dense, TOLD, "report.json: must be free for the report, got something else there", "third.pt")
    assert (tmp_path / "third.pt.report.json").read_text() == "mine"
    with pytest.raises(ValueError, match="must not be the checkpoint, nor lie in it"):
        run(folder, folder / "small.pt", TOLD)


def test_rows_that_are_not_finite_are_named(tmp_path):
    weight = rows()
    weight[77, 3] = float("nan")
    torch.save({USER: weight, "sparse.embedding_bags.item.weight": weight.clone()}, tmp_path / "dense.pt")
    told = {"compression": {"user": PQ, "item": {"method": "dense"}}}
    refuse(tmp_path / "dense.pt", told, "table 'user': pre-trained rows must be finite, got NaN .* in the row of id 77")


def test_tied_weights_are_refused_and_those_of_others_stay_tied(tmp_path):
    weight, tied = rows(), torch.randn(4, 4)
    torch.save({"a.weight": weight, "b.weight": weight, "c": tied, "d": tied}, tmp_path / "dense.pt")
    told = {"compression": PQ, "tables": {"a.weight": {}}}
    refuse(tmp_path / "dense.pt", told, r"must not share its weight with other modules, got \['a.weight', 'b.weight'\]")
    torch.save({"a.weight": weight, "c": tied, "d": tied}, tmp_path / "dense.pt")
    run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    got = torch.load(tmp_path / "small.pt")
    assert got["c"].data_ptr() == got["d"].data_ptr()
    run(tmp_path / "dense.pt", tmp_path / "small.safetensors", told)
    assert torch.equal(open_checkpoint(tmp_path / "small.safetensors").tensors["d"].rows(0, 4), tied)


def compressed(folder: Path) -> tuple[Path, dict]:
    small = compress(Model(), PQConfig(num_codes=4, codebook_size=16))
    state = {name.removeprefix("bags."): value for name, value in small.state_dict().items() if name[:5] == "bags."}
    torch.save(state, folder / "small.pt")
    key = "embedding_bags.user.weight"
    sizes = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM}
    return folder / "small.pt", {
        "compression": {"*": {"method": "dense"}},
        "from": {"user": PQ},
        "tables": {key: sizes},
    }


@pytest.mark.parametrize(
    ("change", "told", "match"),
    [
        ({"decoder.format_version": torch.tensor([9])}, {}, "format_version: must be 1, got 9"),
        (
            {"decoder.layout": torch.zeros(1, 3, dtype=torch.int64)},
            {},
            "the checkpoint's method and sizes and seed must",
        ),
        ({"code_tables.banks.user.codes": torch.zeros(NUM_ROWS, 2, dtype=torch.uint8)}, {}, "user"),
        ({"code_tables.banks.user.codes": torch.zeros(3, 2, dtype=torch.uint8)}, {}, r"must be \(403, 2\), as 'from'"),
        (
            {"code_tables.banks.user.codes": None},
            {},
            "must hold 'code_tables.banks.user.codes', as 'from' says, got none",
        ),
        ({}, {"from": {"user": {"method": "hash", "num_buckets": 4}}}, "as 'from' says, got none"),
        ({}, {"from": None, "tables": {}}, "must hold dense tables, got compressed ones"),
    ],
)
def test_compressed_ones_of_another_kind_or_of_the_future(change, told, match, tmp_path):
    path, config = compressed(tmp_path)
    run(path, tmp_path / "fine.pt", config)
    state = {**torch.load(path), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    refuse(path, {**config, **told}, match, "dense.pt")


def test_tables_that_lie_in_one_storage_are_not_tied(tmp_path):
    """As FBGEMM keeps those of a rank; what stays does not take the others along."""
    both = torch.cat([rows(), rows()])
    state = {USER: both[:NUM_ROWS], "sparse.embedding_bags.item.weight": both[NUM_ROWS:]}
    torch.save(state, tmp_path / "dense.pt")
    run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": {"user": PQ, "item": {"method": "dense"}}})
    item = torch.load(tmp_path / "small.pt")["sparse.dense.embedding_bags.item.weight"]
    assert torch.equal(item, rows()) and item.untyped_storage().nbytes() == item.nbytes


def test_a_full_disk_is_said_and_the_same_command_goes_on(dense, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = tmp_path / "wanted.pt"
    run(dense, wanted, TOLD)
    for where, name in ((os, "posix_fallocate"), (fits.Work, "save"), (torch, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            refuse(dense, TOLD, "No space left on device")
    run(dense, tmp_path / "small.pt", TOLD)
    assert digest(tmp_path / "small.pt") == digest(wanted)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_file_that_cannot_be_mapped_is_not_called_damaged(ending, dense, tmp_path, monkeypatch):
    """As one larger than memory and swap, whose error torch words so."""
    path = tmp_path / f"large{ending}"
    path.write_bytes(dense.read_bytes())

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"unable to mmap 25600000128 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", fail)
    if ending == ".safetensors":
        monkeypatch.setattr(pytest.importorskip("safetensors"), "safe_open", fail)
    refuse(path, TOLD, r"bytes could not be mapped: Linux .* vm.overcommit_memory is 1; set it, or save a folder")


def test_too_little_memory_is_said_before_anything_is_written(dense, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(TOLD))
    from torchrec_compress.conversion.run import convert

    with pytest.raises(ValueError, match=r"--memory: must be at least \d+MB, for table 'sparse.*', got 100MB"):
        convert(dense, tmp_path / "small.pt", config, 10**8, False)
    assert not (tmp_path / "small.pt.part").exists()


def test_the_command_says_what_it_did_and_errors_in_one_line(dense, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(TOLD))
    main(["convert", str(dense), str(tmp_path / "small.pt"), "--to", str(config), "--memory", "1GB"])
    said = capsys.readouterr().out
    assert f"{USER}: 403 x 16, dense -> pq, 25,792 -> " in said and "1 other entries copied bit for bit" in said
    assert json.loads((tmp_path / "small.pt.report.json").read_text())["tables"][USER]["rows"] == NUM_ROWS
    for arguments, match in (
        (
            [str(dense), str(tmp_path / "b.pt"), "--to", str(config), "--memory", "much"],
            "--memory: must be a size such as",
        ),
        ([str(dense), str(tmp_path / "b.pt"), "--to", str(tmp_path / "none.yaml")], "none.yaml: is missing"),
        ([str(dense)], "the following arguments are required"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", *arguments])
        error = capsys.readouterr().err
        assert error.startswith("torchrec-compress: error: ") and match in error and error.count("\n") == 1


def test_without_safetensors_it_says_what_to_install(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").write_bytes(b"")
    refuse(tmp_path / "x.safetensors", TOLD, r"pip install torchrec-compress\[convert\]")
    refuse(dense, TOLD, r"pip install torchrec-compress\[convert\]", "small.safetensors")


def test_plain_data_does_not_fit_into_safetensors(tmp_path):
    torch.save({USER: rows(), "epoch": 3}, tmp_path / "dense.pt")
    refuse(tmp_path / "dense.pt", TOLD, r"must hold tensors alone, got \['epoch'\]", "small.safetensors")


def test_a_module_that_looks_like_torchrecs_is_plain_where_the_config_says_so(tmp_path):
    model = nn.ModuleDict(
        {"bert": nn.ModuleDict({"embeddings": nn.ModuleDict({"words": nn.Embedding(NUM_ROWS, DIM)})})}
    )
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    told = {"compression": PQ, "tables": {"bert.embeddings.words.weight": {"plain": True}}}
    run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    wanted = compress(model, PQConfig(num_codes=4, codebook_size=16))
    assert list(torch.load(tmp_path / "small.pt")) == list(wanted.state_dict())


def test_rows_of_few_bits_that_no_training_made_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrec_compress.ops.trained._BLOCK_ROWS", 100)
    method = {"method": "narrow", "width": 8, "bits": 8}
    torch.save({USER: rows()}, tmp_path / "dense.pt")
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": {"user": method}})
    state = torch.load(tmp_path / "small.pt")
    state["sparse.trained.banks.user.rows"][333] = 127
    state["sparse.trained.banks.user.rows"][333, :-1] = 1
    torch.save(state, tmp_path / "bad.pt")
    refuse(tmp_path / "bad.pt", report["back"], "table 'user': rows of 8 bits .* first that of id 333", "dense2.pt")


def test_a_transposed_chunk_is_refused(tmp_path):
    dcp.save({USER: rows().T.contiguous().T}, checkpoint_id=tmp_path / "dense", no_dist=True)
    refuse(tmp_path / "dense", TOLD, r"must be a contiguous tensor, got strides \(1, 403\)")


def test_a_chunk_that_names_other_things_than_a_tensor(tmp_path):
    """The bytes of a chunk are another archive of torch's, of the same length."""
    folder = tmp_path / "dense"
    dcp.save({USER: rows()}, checkpoint_id=folder, no_dist=True)
    about = dcp.FileSystemReader(folder).read_metadata()
    ((_, info),) = about.storage_data.items()
    torch.save(Evil(), folder / info.relative_path)
    info.offset, info.length = 0, (folder / info.relative_path).stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    refuse(folder, TOLD, "must be a tensor that torch saved, got UnpicklingError: must not name posix.mkdir")
    assert not Path("/tmp/evil-was-here").exists()


def test_two_processes_do_not_work_in_one_folder(dense, tmp_path):
    first = Work(tmp_path / "small.pt", is_folder=False)
    with pytest.raises(ValueError, match=r"small.pt.part: must be used by one process, got another one at work"):
        run(dense, tmp_path / "small.pt", TOLD)
    first.close()
    run(dense, tmp_path / "small.pt", TOLD)
