from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_compress.train import stages
from torchrec_compress.train.config import DataConfig, GeneratorConfig, ParallelConfig, RunConfig, override
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.open import load_data
from torchrec_compress.train.machine import prepare
from torchrec_compress.train.ranks import Ranks, start

SMALL = GeneratorConfig(num_rows=4000, num_users=300, num_items=80, num_clusters=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    prepare(1)


@pytest.fixture(scope="session")
def data() -> ClickData:
    return load_data(DataConfig(generator=SMALL))


@pytest.fixture
def ranks() -> Ranks:
    return start(ParallelConfig(device="cpu"))


@pytest.fixture
def config(tmp_path) -> RunConfig:
    changes = {
        "output": str(tmp_path / "run"),
        "tensorboard": False,
        "data.generator": vars(SMALL),
        "model.embedding_dim": 8,
        "model.hidden": [16],
        "pretrain": {"epochs": 1.0, "batch_size": 256, "evals_per_epoch": 2},
    }
    return override(RunConfig(), changes)


@dataclass(frozen=True)
class Finished:
    """A finished run of three stages over a Parquet file, for tests to copy, and what it ended with."""

    config: RunConfig
    folder: Path
    summary: dict[str, Any]


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    labels = data.train.labels.to(torch.int8).numpy()[:600]
    rows = {name: data.train.ids[:600, number].numpy() for number, name in enumerate(data.features)}
    pq.write_table(pa.table({**rows, "label": labels}), folder / "rows.parquet", row_group_size=50)
    stage = {"epochs": 1.0, "batch_size": 240, "evals_per_epoch": 2, "checkpoint_every": 1, "patience": 0}
    changes = {
        "tensorboard": False,
        "data": {"kind": "parquet", "path": str(folder / "rows.parquet"), "split": None, "tail_count": 3},
        "model": {"embedding_dim": 4, "hidden": [4]},
        "pretrain": stage,
        "retrain": {**stage, "distill_weight": 0.5},
        "compression": {"*": {"method": "pq", "num_codes": 2, "codebook_size": 4}},
    }
    config = override(RunConfig(), changes)
    summary = stages.run(config, folder / "run", folder / "run" / "full", start(config.parallel), None)
    return Finished(config, folder / "run", summary)
