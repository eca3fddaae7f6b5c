"""Checkpoints, configs and conversions for the tests of the conversion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from tests.cases import DIM, NUM_ROWS, contexts, counts, rows
from torchrec_compress.conversion.run import convert

MEMORY = 10**10


class Model(nn.Module):
    """Tables of each kind, and a net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM}
        self.bags = EmbeddingBagCollection([EmbeddingBagConfig(name="user", feature_names=["user"], **sizes)])
        self.towers = nn.ModuleDict(
            {"words": EmbeddingCollection([EmbeddingConfig(name="word", feature_names=["word"], **sizes)])}
        )
        self.shop = nn.Embedding(NUM_ROWS, DIM, padding_idx=2)
        self.tags = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", padding_idx=3)
        self.net = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.Linear(DIM, 1))
        with torch.no_grad():
            for number, weight in enumerate(self.weights().values()):
                weight.copy_(rows() + number)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of the tables by the names that `compress` has for them."""
        return {
            "bags.user": self.bags.embedding_bags["user"].weight,
            "towers.words.word": self.towers["words"].embeddings["word"].weight,
            "shop": self.shop.weight,
            "tags": self.tags.weight,
        }  # type: ignore[return-value]


PLAIN = {"shop.weight": {"padding_idx": 2}, "tags.weight": {"pooled": True, "mode": "sum", "padding_idx": 3}}
NAMES = ("bags.user", "towers.words.word", "shop", "tags")


def given_files(folder: Path) -> dict[str, Any]:
    """Write counts and contexts of every table, and return what a config says of them."""
    np.save(folder / "counts.npy", counts().numpy())
    ids, others = contexts()
    np.savez(folder / "contexts.npz", ids=ids.numpy(), contexts=others.numpy())
    return {
        "counts": dict.fromkeys(NAMES, str(folder / "counts.npy")),
        "contexts": dict.fromkeys(NAMES, str(folder / "contexts.npz")),
    }


def run(source: Path, target: Path, config: dict[str, Any], memory: int = MEMORY) -> dict[str, Any]:
    """Convert, and return the report."""
    path = source.parent / f"{target.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    convert(source, target, path, memory, progress=False)
    assert not target.with_name(f"{target.name}.part").exists()
    return report_of(target)


def report_of(target: Path) -> dict[str, Any]:
    """Return what was written beside a result."""
    return json.loads(target.with_name(f"{target.name}.report.json").read_text())


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Fail unless names, order, types and all bits are the same."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def load_folder(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Return a state read from a folder of torch.distributed.checkpoint."""
    state = {name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in like.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def digest(path: Path) -> str:
    """Return what tells the bytes of a file, or of all files of a folder, from others."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes() if path.is_dir() else file.read_bytes())
    return found.hexdigest()
