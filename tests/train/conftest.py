from __future__ import annotations

import pytest

from torchrec_compress.train.config import DataConfig, GeneratorConfig, ParallelConfig, RunConfig, override
from torchrec_compress.train.data import ClickData, load_data
from torchrec_compress.train.machine import prepare
from torchrec_compress.train.ranks import Ranks, start

SMALL = GeneratorConfig(num_rows=4000, num_users=300, num_items=80, num_clusters=4)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    prepare(1)


@pytest.fixture(scope="session")
def data() -> ClickData:
    return load_data(DataConfig(generator=SMALL))


@pytest.fixture(scope="session")
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
