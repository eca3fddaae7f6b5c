"""Parts of a conversion by themselves: entries in pieces, means by blocks, names, seeds and limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cases import DIM, NUM_ROWS, rows
from tests.conversion.made import run
from torchrec_compress.conversion import run as run_module
from torchrec_compress.conversion import work
from torchrec_compress.conversion.checkpoints import Checkpoint
from torchrec_compress.conversion.counts import counts_of_optimizer
from torchrec_compress.conversion.entries import Chunk, Chunked, Held
from torchrec_compress.conversion.report import as_text
from torchrec_compress.methods import HashConfig, PQConfig

PQ, HASH = PQConfig(num_codes=4, codebook_size=16), HashConfig(num_buckets=40)


def test_rows_of_several_chunks(tmp_path):
    """Cut along both axes, in two files: runs and single rows are those of the whole."""
    whole = torch.arange(60.0).reshape(10, 6)
    chunks = []
    for number, (top, height) in enumerate(((0, 4), (4, 6))):
        for left, width in ((0, 2), (2, 4)):
            part = whole[top : top + height, left : left + width].contiguous()
            path = tmp_path / f"{number}_{left}"
            path.write_bytes(b"12345678" + part.numpy().tobytes())
            chunks.append(Chunk(path, 8, (top, left), (height, width)))
    entry = Chunked((10, 6), torch.float32, chunks)
    for ids in ([0, 3, 5, 9], [4, 6, 8], [2, 3, 4], [9], []):
        wanted = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(entry.read(wanted), whole[wanted]) and torch.equal(entry.gather(wanted), whole[wanted])


def test_sums_are_read_by_blocks():
    sums = torch.rand(70_000, 3) + torch.arange(70_000.0)[:, None] / 1000
    checkpoint = Checkpoint(Path("x"), "torch", tensors={"s.sum": Held(sums)})
    found = counts_of_optimizer("table", checkpoint, {"s.sum": None}, 70_000)
    torch.testing.assert_close(found / found.mean(), sums.mean(1) / sums.mean())


@pytest.mark.parametrize(("seed", "kept"), [(5, True), (3, False)])
def test_what_is_hashed_by_another_seed_is_stored_anew(seed, kept, tmp_path):
    pair = {"emb.weight": {}, "x.weight": {}}
    torch.save({"emb.weight": rows(), "x.weight": rows()}, tmp_path / "dense.pt")
    first = {"tables": pair, "compression": {"*": HASH.to_dict()}, "seed": 5}
    run(tmp_path / "dense.pt", tmp_path / "small.pt", first)
    sizes = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM}
    told = {"tables": dict.fromkeys(pair, sizes), "from": {"*": HASH.to_dict()}, "from_seed": 5, "seed": seed}
    report = run(
        tmp_path / "small.pt",
        tmp_path / "other.pt",
        {**told, "compression": {"emb": HASH.to_dict(), "x": PQ.to_dict()}},
    )
    assert report["tables"]["emb.weight"]["kept_bit_for_bit"] == kept
    before, after = (torch.load(tmp_path / name) for name in ("small.pt", "other.pt"))
    (key,) = [name for name in before if name.startswith("emb.") and before[name].shape == (40, DIM)]
    assert torch.equal(before[key], after[key]) == kept


def test_a_wrapper_is_no_part_of_a_name(tmp_path):
    torch.save({"module.emb.weight": rows()}, tmp_path / "dense.pt")
    told = {"tables": {"module.emb.weight": {}}, "compression": {"emb": PQ.to_dict()}}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    assert report["tables"]["module.emb.weight"]["name"] == "emb"
    assert all(name.startswith("module.emb.") for name in torch.load(tmp_path / "small.pt"))


def test_look_ups_of_other_tables_count_as_memory(tmp_path, monkeypatch):
    torch.save({"a.weight": rows(), "b.weight": rows()}, tmp_path / "dense.pt")
    np.save(tmp_path / "counts.npy", np.ones(NUM_ROWS, dtype=np.int64))
    needs = {}
    monkeypatch.setattr(run_module, "check_memory", lambda limit, found: needs.update(found))
    by_counts = PQConfig(num_codes=4, codebook_size=16, popularity="count").to_dict()
    told = {"tables": {"a.weight": {}, "b.weight": {}}, "compression": {"a": by_counts, "b": PQ.to_dict()}}
    found = []
    for names in (["a"], ["a", "b"]):
        counts = dict.fromkeys(names, str(tmp_path / "counts.npy"))
        run(tmp_path / "dense.pt", tmp_path / f"{len(names)}.pt", {**told, "counts": counts})
        found.append(needs["a.weight"])
    assert found[1] - found[0] == NUM_ROWS * 8


def test_what_a_newcomer_stumbles_over_is_said(tmp_path):
    """The order of a collection's tables, an optimizer of numbers, and a module that only `compression` names."""
    keys = [f"ebc.embedding_bags.{name}.weight" for name in "ba"]
    state = {"state": {0: {"sum": torch.rand(NUM_ROWS, DIM)}}, "param_groups": [{"params": [0, 1]}]}
    torch.save({"model": {key: rows() for key in [*keys, "own.weight"]}, "opt": state}, tmp_path / "dense.pt")
    by_counts = PQConfig(num_codes=4, codebook_size=16, popularity="count").to_dict()
    with pytest.raises(ValueError, match=r"got none by its name, \['opt'\] by numbers; save these by names"):
        run(tmp_path / "dense.pt", tmp_path / "x.pt", {"compression": {"*": by_counts}, "counts": "optimizer"})
    with pytest.raises(ValueError, match=r"PyTorch's own must be named in 'tables', as \['model.own.weight'\]"):
        run(tmp_path / "dense.pt", tmp_path / "x.pt", {"compression": {"own": PQ.to_dict(), "*.a": PQ.to_dict()}})
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": {"*": PQ.to_dict()}})
    assert report["orders"] == {"model.ebc": ["b", "a"]}
    assert "'model.ebc' has its tables in the order b, a: name them in 'tables'" in as_text(report)


class Killed(BaseException):
    """What a kill is to a test."""


def test_another_number_of_threads_does_not_go_on_from_it(tmp_path, monkeypatch):
    """Sums of floats hang on it."""
    torch.save({"emb.weight": rows()}, tmp_path / "dense.pt")
    told = {"tables": {"emb.weight": {}}, "compression": {"emb": PQ.to_dict()}}
    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(ValueError, match="threads must be"):
        run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
