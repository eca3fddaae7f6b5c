"""An l2 that pulls what a rare id learns as hard as what a frequent one does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.train.config import OptimConfig, StageConfig
from torchrec_compress.train.data.batch import EVERYTHING
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.loop import Task, train
from torchrec_compress.train.engine.objective import Loss
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.full import full_model

STAGE = StageConfig(epochs=1.0, batch_size=256, evals_per_epoch=2, patience=0)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2**31 - 1])
def test_a_byte_holds_any_count_to_a_twentieth(count):
    rarity = Rarity({"a": torch.tensor([count])}, 10**6, torch.device("cpu"))
    ids = KeyedJaggedTensor(["a"], torch.tensor([0]), lengths=torch.tensor([1]))
    assert float(rarity(ids, ["a"])) == pytest.approx(1e6 / count, rel=0.045)


def test_over_an_epoch_it_is_the_l2_of_whole_tables(config, data, ranks):
    """A row's gradient, summed over the look-ups of an epoch, is that of `table_l2` in all steps, rare or not."""
    counts, num_rows = data.counts(), data.num_rows("train")
    model = full_model(config, data)
    rarity = Rarity(counts, num_rows, torch.device("cpu"))
    loss = Loss(StageConfig(optim=OptimConfig(adaptive_l2=0.3)), ranks, None, model.fields, rarity)
    batches, size = data.batches("train", 320, 0, EVERYTHING), 320  # which divides the rows
    for batch in batches.epoch(0):
        found = model(batch.features, batch.dense)
        rest = (found.logits, found.embeddings, batch.labels, batch.rows, batch.weights, batch.features)
        minimised, entropy = loss(*rest)
        (minimised - entropy).backward()
    steps = num_rows / size
    for name, table in model.embeddings.embedding_bags.items():
        seen = counts[name] > 0
        wanted = 0.3 * steps * table.weight.detach()[seen]
        torch.testing.assert_close(table.weight.grad[seen], wanted, rtol=0.06, atol=1e-6)


def test_adaptive_l2_holds_rare_rows_back_the_most(config, data, ranks, tmp_path):
    counts = data.counts()["user"]
    rare, often = (counts > 0) & (counts < 5), counts > 20
    sizes, held = {}, {}
    for name, optim in (("free", OptimConfig()), ("pulled", OptimConfig(adaptive_l2=1e-3))):
        task = Task(data, dataclasses.replace(STAGE, optim=optim), 0, tmp_path / name, position=None)
        trained = train(full_model(config, data), task, ranks)
        state = {"model": full_model(config, data).state_dict()}
        read(trained.checkpoint, state)
        weight = state["model"]["embeddings.embedding_bags.user.weight"]
        sizes[name] = [float(weight[some].square().mean()) for some in (rare, often)]
        held[name] = trained.state_bytes
    kept = [after / before for before, after in zip(*sizes.values(), strict=True)]
    assert kept[0] < 0.65 < 0.75 < kept[1], kept
    assert held["pulled"] == held["free"] + sum(data.vocab)  # a byte an id
