"""Trained rows in the training loop: batches that are left out, on several ranks."""

from __future__ import annotations

import pytest
import torch

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import NarrowConfig
from torchrec_compress.seams import local_shards
from torchrec_compress.train.config import DataConfig, GeneratorConfig, ParallelConfig, RunConfig, StageConfig
from torchrec_compress.train.data.open import load_data
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import start

GENERATOR = GeneratorConfig(num_rows=2000, num_users=100, num_items=40, num_clusters=4)


def left_out(skip: int, bad_rank: int) -> tuple[list[bool], list[bool], str]:
    """Train on a good, a bad and a good batch; return what was skipped, what moved rows, and what was raised.

    Without skipping a fourth and a fifth batch are tried, as the pipeline sends ids ahead.
    """
    torch.manual_seed(3)
    data, ranks, config = load_data(DataConfig(generator=GENERATOR)), start(ParallelConfig(device="cpu")), RunConfig()
    tables = make_tables(config.model, data)
    embeddings = CompressedEmbeddingBagCollection(tables, compression=NarrowConfig(width=4, bits=8, state_bits=8))
    stage = StageConfig(batch_size=64, skip_bad_batches=skip)
    trainable = Trainable(make_model(embeddings, data.num_dense, config.model), stage, ranks, ParallelConfig())
    trainable.module.train()
    batches = [next(iter(data.batches("train", 64, seed).epoch(0))) for seed in range(7)]
    if ranks.rank == bad_rank:
        batches[1].labels.fill_(float("nan"))
    pipeline, stream = trainable.pipeline(), iter(batches)
    skipped, moved = [], []
    for _ in range(5):
        before = rows_of(trainable)
        try:
            pipeline.progress(stream)
        except ValueError as error:
            return skipped, moved, str(error)
        skipped.append(trainable.was_skipped)
        moved.append(any(not torch.equal(value, before[name]) for name, value in rows_of(trainable).items()))
    return skipped, moved, ""


def rows_of(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Return copies of this rank's rows and of their states."""
    state = trainable.state()
    found = {name: value for name, value in state["model"].items() if "trained" in name}
    optimizer = state["optimizer"]["state"]
    found |= {name: kept["state"] for name, kept in optimizer.items() if "trained" in name}
    return {name: part.clone() for name, value in found.items() for part, _ in local_shards(value)}


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_batch_that_is_left_out_moves_no_row_on_any_rank(two_ranks, bad_rank):
    for skipped, moved, error in two_ranks.run(left_out, 2, bad_rank):
        assert error == "" and skipped == [False, True, False, False, False]
        assert moved == [True, False, True, True, True]


def test_where_none_may_be_left_out_all_ranks_raise(two_ranks):
    for _, moved, error in two_ranks.run(left_out, 0, 1):
        assert "must be finite at step 1, got NaN or infinity" in error
        assert moved[:2] == [True, False]
