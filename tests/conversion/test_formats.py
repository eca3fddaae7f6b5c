"""What else is in a checkpoint, and the kinds of checkpoints: nothing of it changes but the tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from tests.cases import DIM, NUM_ROWS, counts, rows
from tests.conversion.made import PLAIN, Model, assert_same, digest, load_folder, run
from torchrec_compress import CompressedEmbedding, compress, decompress
from torchrec_compress.conversion import outputs
from torchrec_compress.conversion.checkpoints import open_checkpoint
from torchrec_compress.conversion.counts import counts_of_optimizer
from torchrec_compress.fit.checks import check_counts
from torchrec_compress.methods import HashConfig, Int8Config, PQConfig
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.ranks import Ranks

PQ = PQConfig(num_codes=4, codebook_size=16)
TOLD = {"compression": {"*": PQ.to_dict()}, "tables": PLAIN}


@pytest.fixture(scope="module")
def small() -> Model:
    return compress(Model(), PQ)


def save(model: Model, path) -> None:
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        dcp.save(model.state_dict(), checkpoint_id=path, no_dist=True)


def load(path, like):
    """Return what is in a checkpoint, in the order of `like`: a safetensors file has one of its own."""
    if not path.suffix:
        return load_folder(path, like)
    if path.suffix == ".pt":
        found = torch.load(path)
    else:
        from safetensors.torch import load_file

        found = load_file(path)
    assert set(found) == set(like)
    return {name: found[name] for name in like}


@pytest.mark.parametrize("source", ["dense.pt", "dense", "dense.safetensors"])
@pytest.mark.parametrize("target", ["small.pt", "small", "small.safetensors"])
def test_from_every_kind_to_every_kind(source, target, small, tmp_path, monkeypatch):
    """With chunks so small that every table has several."""
    monkeypatch.setattr(outputs, "CHUNK_BYTES", 1000)
    save(Model(), tmp_path / source)
    before = digest(tmp_path / source)
    report = run(tmp_path / source, tmp_path / target, TOLD)
    wanted = small.state_dict()
    assert_same(load(tmp_path / target, wanted), wanted)
    back = target.replace("small", "back")
    run(tmp_path / target, tmp_path / back, report["back"])
    wanted = decompress(small).state_dict()
    assert_same(load(tmp_path / back, wanted), wanted)
    assert digest(tmp_path / source) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["dense.pt", "dense"])
def test_half_precision_is_read_as_it_is_and_kept_where_a_table_stays(dtype, source, tmp_path):
    state = {
        "sparse.embedding_bags.user.weight": rows().to(dtype),
        "sparse.embedding_bags.item.weight": rows().to(dtype),
        "net.weight": torch.randn(3, 3).to(dtype),
    }
    path = tmp_path / source
    torch.save(state, path) if path.suffix else dcp.save(state, checkpoint_id=path, no_dist=True)
    run(path, tmp_path / "small.pt", {"compression": {"user": PQ.to_dict(), "item": {"method": "dense"}}})
    got = torch.load(tmp_path / "small.pt")
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=[name])
        for name in ("user", "item")
    ]
    stock = EmbeddingBagCollection(tables)
    with torch.no_grad():
        stock.embedding_bags["user"].weight.copy_(state["sparse.embedding_bags.user.weight"].float())
    wanted = compress(stock, {"user": PQ, "item": Int8Config()}).state_dict()
    assert torch.equal(got["sparse.code_tables.banks.user.codes"], wanted["code_tables.banks.user.codes"])
    item = got["sparse.dense.embedding_bags.item.weight"]
    assert item.dtype == dtype and torch.equal(item, state["sparse.embedding_bags.item.weight"])
    assert torch.equal(got["net.weight"], state["net.weight"]) and got["net.weight"].dtype == dtype


class Recommender(nn.Module):
    """A recommender of plain PyTorch, as many are written."""

    def __init__(self, users=None, items=None) -> None:
        super().__init__()
        self.user_emb = users or nn.Embedding(NUM_ROWS, DIM)
        self.item_emb = items or nn.Embedding(NUM_ROWS, DIM, padding_idx=0)
        self.net = nn.Sequential(nn.Linear(2 * DIM, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, user, item):
        return self.net(torch.cat([self.user_emb(user), self.item_emb(item)], dim=1))


def test_a_recommender_of_plain_pytorch_goes_to_and_fro(tmp_path):
    """Saved as training loops do, with epoch and optimizer; what is loaded serves what compress() would."""
    torch.manual_seed(3)
    model, ids = Recommender(), torch.arange(NUM_ROWS)
    optimizer = torch.optim.Adam(model.parameters())
    model(ids, ids).sum().backward()
    optimizer.step()
    state = {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 0.1, "x": [1]},
    }
    torch.save(state, tmp_path / "dense.pt")
    tables = {"model.user_emb.weight": {}, "model.item_emb.weight": {"padding_idx": 0}}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": PQ.to_dict(), "tables": tables})
    got = torch.load(tmp_path / "small.pt")
    assert got["epoch"] == 3 and got["args"] == state["args"] and "optimizer" not in got
    assert report["dropped_whole"] == ["optimizer"]
    sizes = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM, "compression": PQ}
    user = CompressedEmbedding(**sizes, name="user_emb")
    fresh = Recommender(user, CompressedEmbedding(**sizes, padding_idx=0, name="item_emb"))
    fresh.load_state_dict(got["model"])
    wanted = compress(model, PQ)
    assert torch.equal(fresh(ids, ids), wanted(ids, ids))
    run(tmp_path / "small.pt", tmp_path / "back.pt", report["back"])
    again = Recommender()
    again.load_state_dict(torch.load(tmp_path / "back.pt")["model"])
    assert torch.equal(again(ids, ids), decompress(wanted)(ids, ids))


def test_parts_of_compressed_tables_are_no_tables(tmp_path):
    """Buckets of a hash are a table of TorchRec's by their key; "*" is of the user's tables alone."""
    small = compress(Model(), HashConfig(num_buckets=40))
    report = run(save_dense(Model(), tmp_path), tmp_path / "small.pt", {
        "compression": {"*": {"method": "hash", "num_buckets": 40}}, "tables": PLAIN,
    })  # fmt: skip
    told = {**report["back"], "compression": {"*": {"method": "dense"}}}
    report = run(tmp_path / "small.pt", tmp_path / "back.pt", told)
    assert set(report["tables"]) == set(told["tables"])
    assert_same(torch.load(tmp_path / "back.pt"), decompress(small).state_dict())


def test_state_dicts_say_the_versions_of_their_modules_as_before(small, tmp_path):
    save(Model(), tmp_path / "dense.pt")
    run(tmp_path / "dense.pt", tmp_path / "small.pt", TOLD)
    got = torch.load(tmp_path / "small.pt")
    assert got._metadata["net.1"] == small.state_dict()._metadata["net.1"] == {"version": 2}


def test_state_of_an_optimizer_goes_with_its_weights(tmp_path):
    """By names, as TorchRec's optimizers have it: kept of the net, renamed of a table that stays, gone of others."""
    names = {name: f"sparse.embedding_bags.{name}.weight" for name in ("user", "item")}
    sums = {name: torch.rand(NUM_ROWS) for name in names}
    state = {
        "model": {**{key: rows() for key in names.values()}, "net.weight": torch.randn(3, 3)},
        "optimizer": {
            "state": {
                **{key: {f"{name}.momentum1": sums[name]} for name, key in names.items()},
                "net.weight": {"sum": torch.rand(3, 3), "step": 4},
            },
            "param_groups": [{"params": [*names.values(), "net.weight"], "lr": 0.1}],
        },
    }
    torch.save(state, tmp_path / "dense.pt")
    told = {"compression": {"user": PQ.to_dict(), "item": {"method": "dense"}}}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    got = torch.load(tmp_path / "small.pt")["optimizer"]
    item = "sparse.dense.embedding_bags.item.weight"
    assert list(got["state"]) == [item, "net.weight"]
    assert torch.equal(got["state"][item]["item.momentum1"], sums["item"])
    assert torch.equal(got["state"]["net.weight"]["sum"], state["optimizer"]["state"]["net.weight"]["sum"])
    assert got["state"]["net.weight"]["step"] == 4
    assert got["param_groups"] == [{"params": [item, "net.weight"], "lr": 0.1}]
    assert report["dropped"] == ["optimizer.state.sparse.embedding_bags.user.weight.user.momentum1"]
    assert report["dropped_whole"] == []


@pytest.mark.parametrize("given", ["npy", "npz", "parquet", "pt", "optimizer"])
def test_counts_come_from_files_or_from_an_optimizer(given, tmp_path):
    method = PQConfig(num_codes=2, codebook_size=16, num_hot_rows=20, popularity="count")
    seen = counts()
    files = {each: str(tmp_path / f"counts.{each}") for each in ("npy", "npz", "pt", "parquet")}
    np.save(files["npy"], seen.numpy())
    np.savez(files["npz"], counts=seen.numpy())
    torch.save(seen, files["pt"])
    ids = torch.arange(NUM_ROWS).repeat_interleave(seen)
    column = pa.array(ids.reshape(-1, 1)[torch.randperm(len(ids))].tolist(), pa.list_(pa.int32()))
    pq.write_table(pa.table({"x": column, "y": column}), files["parquet"])
    files["parquet"] += ":x"
    stock = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])]
    )
    state = {f"sparse.{name}": value for name, value in stock.state_dict().items()}
    key = "sparse.embedding_bags.item.weight"
    optimizer = {"state": {key: {"item.momentum1": seen.float() * 7}}}
    torch.save({"model": state, "optimizer": optimizer}, tmp_path / "dense.pt")
    told = "optimizer" if given == "optimizer" else {"item": files[given]}
    run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": method.to_dict(), "counts": told})
    got = torch.load(tmp_path / "small.pt")["model"]
    used = seen.float() * 7
    used = used / used[used > 0].mean() if given == "optimizer" else seen
    wanted = compress(stock, method, counts={"item": used}).state_dict()
    assert_same({name.removeprefix("sparse."): value for name, value in got.items()}, wanted)


@pytest.mark.parametrize("num_columns", [0, DIM])
def test_equal_sums_of_an_optimizer_are_counts(num_columns, tmp_path):
    """Their mean, added up in float32, is above each of them."""
    key, shape = "sparse.embedding_bags.item.weight", (NUM_ROWS, num_columns) if num_columns else (NUM_ROWS,)
    for number in torch.linspace(0.1, 0.3, 20).tolist():
        state = {key: {"item.momentum1": torch.full(shape, number)}}
        torch.save({"model": {key: rows()}, "optimizer": {"state": state}}, tmp_path / "dense.pt")
        checkpoint = open_checkpoint(tmp_path / "dense.pt")
        found = counts_of_optimizer("table", checkpoint, {f"optimizer.state.{key}.item.momentum1": None}, NUM_ROWS)
        check_counts("table", found, NUM_ROWS)


def test_compressed_tables_become_others_and_those_that_stay_keep_their_bits(tmp_path):
    model = Model()
    first = {"bags.user": PQ, "towers.words.word": PQ, "shop": HashConfig(num_buckets=40)}
    small = compress(model, first)
    torch.save(small.state_dict(), tmp_path / "a.pt")
    report = run(save_dense(model, tmp_path), tmp_path / "b.pt", {
        "compression": {name: method.to_dict() for name, method in first.items()}, "tables": PLAIN,
    })  # fmt: skip
    assert_same(torch.load(tmp_path / "b.pt"), small.state_dict())
    second = {"bags.user": Int8Config(), "towers.words.word": PQ, "shop": {"method": "dense"}}
    told = {**report["back"], "compression": {}}
    for name, method in second.items():
        told["compression"][name] = method if isinstance(method, dict) else method.to_dict()
    report = run(tmp_path / "a.pt", tmp_path / "c.pt", told)
    got = torch.load(tmp_path / "c.pt")
    wanted = compress(decompress(small), {"bags.user": Int8Config()}).state_dict()
    for name in ("bags.code_tables.banks.user.codes", "shop.weight", "tags.weight"):
        assert torch.equal(got[name], wanted[name])
    for name, value in small.state_dict().items():
        assert not name.startswith("towers") or torch.equal(got[name], value)
    assert report["tables"]["towers.words.embeddings.word.weight"]["kept_bit_for_bit"]


def save_dense(model, folder):
    torch.save(model.state_dict(), folder / "dense.pt")
    return folder / "dense.pt"


def test_a_checkpoint_of_a_training_of_ours_is_verified_and_converted(tmp_path):
    ranks = Ranks(0, 1, 1, torch.device("cpu"), 60.0, None, None)
    store = Checkpoints(tmp_path / "checkpoints", {"seed": 0}, ranks)
    model = Model()
    store.save(7, {"model": model.state_dict()}, {"rows": 21})
    store.wait()
    saved = tmp_path / "checkpoints" / "step000000007"
    tables = {f"model.{name}": entry for name, entry in PLAIN.items()}
    told = {"compression": {"*": PQ.to_dict()}, "tables": tables}
    run(saved, tmp_path / "small.pt", told)
    assert_same(torch.load(tmp_path / "small.pt")["model"], compress(model, PQ).state_dict())
    (data,) = saved.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"distcp: is truncated or changed \(its checksum differs from SHA256SUMS\)"):
        run(saved, tmp_path / "other.pt", told)
    assert not (tmp_path / "other.pt").exists()
