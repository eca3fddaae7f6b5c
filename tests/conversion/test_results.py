"""A result is what was asked for, whole, and nothing of anyone else's is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests.cases import DIM, NUM_ROWS, rows
from tests.conversion.made import digest, run
from torchrec_compress import compress
from torchrec_compress.conversion import counts as counts_module
from torchrec_compress.conversion.counts import read_contexts, read_counts
from torchrec_compress.conversion.run import convert
from torchrec_compress.conversion.work import Work
from torchrec_compress.methods import HashConfig, PQConfig

PQ = PQConfig(num_codes=4, codebook_size=16)
TOLD = {"tables": {"emb.weight": {}}, "compression": {"emb": PQ.to_dict()}}


def saved(folder: Path, **more: object) -> Path:
    torch.save({"emb.weight": rows(), **more}, folder / "dense.pt")
    return folder / "dense.pt"


@pytest.mark.parametrize("name", ["small.pt", "small"])
def test_views_of_one_storage_keep_their_shapes(name, tmp_path):
    square = torch.arange(64.0).reshape(8, 8)
    path = saved(tmp_path, a=square, b=square.t(), c=square, d=torch.arange(6.0).reshape(2, 3).t())
    report = run(path, tmp_path / name, TOLD)
    run(tmp_path / name, tmp_path / "again.pt", report["back"])
    got = torch.load(tmp_path / "again.pt")
    assert torch.equal(got["a"], square) and torch.equal(got["b"], square.t()) and torch.equal(got["c"], square)
    assert torch.equal(got["d"], torch.arange(6.0).reshape(2, 3).t())


@pytest.mark.parametrize(
    "tied", [lambda w: w.reshape(-1), lambda w: [w[:1]], lambda w: {"in": [(w,)]}, lambda w: w[3:5]]
)
def test_a_table_that_shares_bytes_with_anything_is_refused(tied, tmp_path):
    weight = rows()
    torch.save({"emb.weight": weight, "other": tied(weight)}, tmp_path / "dense.pt")
    with pytest.raises(ValueError, match=r"a table must not share its weight with other modules, got .*other"):
        run(tmp_path / "dense.pt", tmp_path / "small.pt", TOLD)


def test_a_result_that_was_touched_is_not_called_done(tmp_path):
    path, target = saved(tmp_path), tmp_path / "small.pt"
    run(path, target, TOLD)
    before = digest(target)
    config = tmp_path / "small.pt.yaml"
    assert "is there already" in convert(path, target, config, 10**10, progress=False)
    target.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"small\.pt: must not exist, got something there; delete it"):
        convert(path, target, config, 10**10, progress=False)
    assert not (tmp_path / "small.pt.part").exists()
    target.unlink()
    convert(path, target, config, 10**10, progress=False)
    assert digest(target) == before


def test_what_stands_in_the_way_is_seen_before_anything_is_written(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "there.pt").write_text("mine")
    for name, said in (
        ("there.pt", "must not exist, got something"),
        ("x" * 245 + ".pt", "name must be 5 bytes shorter"),
    ):
        with pytest.raises(ValueError, match=said):
            run(path, tmp_path / name, TOLD)
        assert not list(tmp_path.glob("*.part"))


def test_hidden_files_of_a_stranger_are_not_deleted(tmp_path):
    part = tmp_path / "small.pt.part"
    (part / ".dir").mkdir(parents=True)
    (part / ".hidden").write_text("mine")
    with pytest.raises(ValueError, match=r"must be left by a killed conversion, got .*\.hidden"):
        run(saved(tmp_path), tmp_path / "small.pt", TOLD)
    assert (part / ".hidden").read_text() == "mine" and (part / ".dir").is_dir()


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    work = Work(tmp_path / "small.pt", False)
    work.start({})

    def write(path: Path) -> None:
        path.write_text("ours")
        (tmp_path / "small.pt").write_text("theirs")

    with pytest.raises(ValueError, match="must not exist, got something that has appeared"):
        work.publish(write, dict)
    work.close()
    assert (tmp_path / "small.pt").read_text() == "theirs"


@pytest.mark.parametrize("config", [PQ, HashConfig(num_buckets=40)])
def test_a_padding_row_must_be_told_of(config, tmp_path):
    model = nn.ModuleDict({"emb": nn.Embedding(NUM_ROWS, DIM, padding_idx=2)})
    torch.save(compress(model, config).state_dict(), tmp_path / "small.pt")
    sizes = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM}
    told = {"from": {"emb": config.to_dict()}, "compression": {"emb": {"method": "dense"}}}
    with pytest.raises(
        ValueError, match=r"must hold at 'emb.' what .* say alone, got \['emb.padding_row'\].*padding_idx"
    ):
        run(tmp_path / "small.pt", tmp_path / "dense.pt", {**told, "tables": {"emb.weight": sizes}})
    run(tmp_path / "small.pt", tmp_path / "dense.pt", {**told, "tables": {"emb.weight": {**sizes, "padding_idx": 2}}})
    assert list(torch.load(tmp_path / "dense.pt")) == ["emb.weight"]


@pytest.mark.parametrize("kind", [np.float32, np.bool_, np.complex64])
def test_contexts_are_integers(kind, tmp_path):
    ids = np.arange(4)
    for name, write in (("c.npz", np.savez), ("d.npy", None)):
        if write is None:
            np.save(tmp_path / name, np.stack([ids, ids + 0.7]).astype(kind))
        else:
            write(tmp_path / name, ids=ids, contexts=(ids + 0.7).astype(kind))
        with pytest.raises(ValueError, match=r"contexts: .* must hold integers, got torch\."):
            read_contexts("table 'emb'", str(tmp_path / name))


@pytest.mark.parametrize(
    "array",
    [np.array(["a", "b"]), np.array([b"a"]), np.array(["2020-01-01"], "datetime64[D]"), np.ones(2, np.longdouble)],
)
def test_arrays_that_are_no_numbers_are_named(array, tmp_path):
    np.save(tmp_path / "c.npy", array)
    for read in (lambda path: read_counts("table 'emb'", path, 2), lambda path: read_contexts("table 'emb'", path)):
        with pytest.raises(ValueError, match=r"^table 'emb': co\w+: .*c.npy: "):
            read(str(tmp_path / "c.npy"))


def test_damaged_archives_are_named(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", counts=np.arange(1000))
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)
    for name, content in (("cut.npz", whole[:200]), ("damaged.npz", bytes(damaged))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^table 'emb': counts: .*{name}: "):
            read_counts("table 'emb'", str(tmp_path / name), 1000)
    (tmp_path / "large.npy").write_bytes(large_header())
    with pytest.raises(ValueError, match=r"^table 'emb': counts: .*large.npy: "):
        read_counts("table 'emb'", str(tmp_path / "large.npy"), 2)


def large_header() -> bytes:
    """Return a file that says that it holds 10^13 numbers."""
    text = "{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_ids_are_counted_over_all_batches(tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": [0, 1, 1, 1, 2, 1, 0]}), tmp_path / "ids.parquet")
    monkeypatch.setattr(counts_module, "_BATCH", 3)
    assert read_counts("table 'emb'", f"{tmp_path}/ids.parquet:id", 4).tolist() == [2, 4, 1, 0]


def test_files_of_tables_that_are_not_converted_must_be_there(tmp_path):
    path = saved(tmp_path, **{"net.weight": torch.ones(4, 4)})
    told = {**TOLD, "tables": {"emb.weight": {}, "net.weight": {}}, "counts": {"net": str(tmp_path / "none.npy")}}
    with pytest.raises(ValueError, match=r"counts: 'net': .*none.npy: "):
        run(path, tmp_path / "small.pt", told)


def test_modes_that_nothing_reads_and_names_that_no_module_has(tmp_path):
    path = saved(tmp_path, **{"e.embedding_bags.user.weight": rows(), "e.embeddings.none.weight": torch.zeros(0, 4)})
    for tables, said in (
        ({"emb.weight": {"mode": "sum"}}, "tables.emb.weight: mode must come with pooled: true, got 'sum' alone"),
        ({"e.embedding_bags.user.weight": {"mode": "sum"}}, "user.weight must not set mode, which its config"),
    ):
        with pytest.raises(ValueError, match=said):
            run(path, tmp_path / "small.pt", {"tables": tables, "compression": {"*": PQ.to_dict()}})
    torch.save({"e.embedding_bags.keys.weight": rows()}, tmp_path / "keys.pt")
    with pytest.raises(ValueError, match=r"must be able to hold a table of the name, got 'keys'.*plain: true"):
        run(tmp_path / "keys.pt", tmp_path / "small.pt", {"compression": {"*": PQ.to_dict()}})
    run(path, tmp_path / "small.pt", TOLD)  # an empty table that nobody asked for is no hindrance
    assert torch.load(tmp_path / "small.pt")["e.embeddings.none.weight"].shape == (0, 4)


def test_tensors_without_values_of_their_own_are_refused(tmp_path):
    for value in (torch.ones(2, 2, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])):
        path = saved(tmp_path, other=value)
        with pytest.raises(ValueError, match=r"'other' must (be a dense tensor, got|hold)|must be a zip archive"):
            run(path, tmp_path / "small.pt", TOLD)
