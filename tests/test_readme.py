"""The README's Python examples run as they stand, and those of docs/compress.md, on the CPU."""

import dataclasses
import re
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology

from torchrec_compress.fit.mec import learn_mec
from torchrec_compress.methods import PQConfig, mec

README = Path(__file__).parents[1] / "README.md"
COMPRESS = README.parent / "docs" / "compress.md"


def examples(path: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_swap_runs_and_compresses() -> None:
    names: dict = {}
    exec(examples()[0], names)
    assert names["pooled"].keys() == ["user", "weekday"]
    assert names["pooled"].values().shape == (2, 128)
    footprint = names["embeddings"].footprint()
    assert footprint.tables["user"].ratio > 20
    assert footprint.tables["weekday"].method == "dense"


def test_a_trained_model_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(*rows, options, **given):
        return learn_mec(*rows, options=dataclasses.replace(options, num_steps=5), **given)

    monkeypatch.setattr(mec, "learn_mec", quick)  # a thousand steps take half a minute and show nothing more
    table = EmbeddingBagConfig(name="user", num_embeddings=20_000, embedding_dim=16, feature_names=["user"])
    model = torch.nn.ModuleDict({"sparse": EmbeddingBagCollection([table])})
    model["towers"] = torch.nn.ModuleList([torch.nn.EmbeddingBag(500, 16), torch.nn.Linear(16, 1)])
    names: dict = {"trained_model": model, "lookups_per_user": torch.arange(20_000)}
    exec(examples()[1], names)
    assert names["small"].sparse.footprint().ratio > 3
    assert names["small"].towers[0].method.method == "int8" and type(model["towers"][0]) is torch.nn.EmbeddingBag


def test_a_model_is_planned_and_sharded() -> None:
    names: dict = {}
    exec(examples()[0], names)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        names |= {"model": torch.nn.Sequential(names["embeddings"]), "device": torch.device("cpu")}
        names["topology"] = Topology(world_size=1, compute_device="cpu")
        exec(examples()[2], names)
        ours, before = names["model"](names["batch"])["user"], names["pooled"]["user"]
        torch.testing.assert_close(ours, before)
        assert "user" in str(names["planner"].report)
        stated = [sharder.fused_params for sharder in names["sharders"] if getattr(sharder, "fused_params", None)]
        assert len(stated) >= 5 and {params["learning_rate"] for params in stated} == {0.05}
    finally:
        dist.destroy_process_group()


def test_a_planner_chooses() -> None:
    table = EmbeddingBagConfig(name="user", num_embeddings=4000, embedding_dim=16, feature_names=["user"])
    names: dict = {
        "trained": torch.nn.ModuleDict({"sparse": EmbeddingBagCollection([table])}),
        "counts": {"user": torch.arange(4000)},
        "curvature": None,
        "topology": Topology(world_size=2, compute_device="cuda"),
        "budget": 300_000,
    }
    exec(examples()[3], names)
    assert names["choice"]["user"] == names["small"].sparse.methods()["user"]
    assert names["choice"].planned_bytes <= 300_000 and names["choice"]["user"].is_compressed


class Clicks(torch.nn.Module):
    """A model of one table, whose forward returns logits."""

    def __init__(self) -> None:
        super().__init__()
        table = EmbeddingBagConfig(name="user", num_embeddings=2000, embedding_dim=16, feature_names=["user"])
        self.sparse = EmbeddingBagCollection([table])
        self.over = torch.nn.Linear(16, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.over(self.sparse(features).values()).squeeze(1)


def test_a_model_is_compressed_in_the_metric_of_its_loss() -> None:
    names: dict = {"model": Clicks(), "counts": {"user": torch.arange(2000)}}
    names["batches"] = [types.SimpleNamespace(inputs=(features(),)) for _ in range(3)]
    exec(examples(COMPRESS)[0], names)
    assert names["small"].sparse.methods()["user"].method == "pq"
    assert type(names["dense"].sparse) is EmbeddingBagCollection


def test_a_sharded_model_is_compressed_and_wrapped_anew() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        before = DistributedModelParallel(Clicks(), device=torch.device("cpu"))
        names: dict = {"model": before, "methods": {"user": PQConfig(num_codes=2)}, "constraints": None}
        names["counts"] = {"user": torch.arange(2000)}
        exec(examples(COMPRESS)[1].replace('"cuda"', '"cpu"'), names)
        assert names["model"] is not before and type(names["model"]) is DistributedModelParallel
        assert names["model"].module.sparse.methods()["user"].method == "pq"
        assert names["model"](features()).isfinite().all()
    finally:
        dist.destroy_process_group()


def features() -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(["user"], torch.randint(0, 2000, (64,)), torch.ones(64, dtype=torch.int))


def test_every_method_has_a_row() -> None:
    from torchrec_compress.methods import METHODS

    table = README.read_text()
    assert [name for name in METHODS if f"`{name}`" not in table] == []
