"""The loss by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, PQConfig
from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig
from torchrec_compress.train.data.batch import EVERYTHING
from torchrec_compress.train.engine.objective import Loss
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.full import full_model
from torchrec_compress.train.models.click import make_model, make_tables

LOGITS, LABELS = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
EMBEDDINGS = torch.tensor([[1.0, 2.0], [0.0, 3.0], [100.0, 100.0]])
WEIGHTS = torch.tensor([1.0, 2.0, 0.0])  # the last row fills the batch up
ROWS = torch.tensor([4, 0, 1])
# one bag of two ids, one of one, one of none; and one id a row
IDS = KeyedJaggedTensor(["a", "b"], torch.tensor([0, 1, 1, 2, 2, 0]), lengths=torch.tensor([2, 1, 0, 1, 1, 1]))
GIVEN = (LOGITS, EMBEDDINGS, LABELS, ROWS, WEIGHTS, IDS)
FIELDS = {"a": 1, "b": 1}


def _entropy(labels: torch.Tensor) -> torch.Tensor:
    return (F.binary_cross_entropy_with_logits(LOGITS, labels, reduction="none") * WEIGHTS).mean()


def test_a_teacher_teaches_in_training_and_evaluation_is_against_the_labels(ranks):
    teacher = torch.tensor([3.0, -9.0, 0.0, 0.0, -2.0])
    loss = Loss(StageConfig(distill_weight=0.25), ranks, teacher, FIELDS)
    taught = 0.75 * LABELS + 0.25 * teacher[ROWS].sigmoid()
    for train, labels in ((True, taught), (False, LABELS)):
        minimised, entropy = loss.train(train)(*GIVEN)
        torch.testing.assert_close(entropy, _entropy(labels))
        torch.testing.assert_close(minimised, _entropy(labels))


def test_l2_of_look_ups_leaves_out_what_fills_a_batch_up(ranks):
    loss = Loss(StageConfig(optim=OptimConfig(lookup_l2=0.1)), ranks, None, FIELDS)
    minimised, entropy = loss(*GIVEN)
    torch.testing.assert_close(entropy, _entropy(LABELS))
    torch.testing.assert_close(minimised - entropy, torch.tensor(0.1 / 2 * (1 * 5 + 2 * 9) / 3))


def test_adaptive_l2_pulls_an_id_by_the_inverse_of_its_share(ranks):
    counts = {"a": torch.tensor([32, 8, 0]), "b": torch.tensor([1, 1, 64])}
    rarity = Rarity(counts, 64, torch.device("cpu"))
    loss = Loss(StageConfig(optim=OptimConfig(adaptive_l2=0.1)), ranks, None, FIELDS, rarity)
    minimised, entropy = loss(*GIVEN)
    # a: mean of 64 / 32 and 64 / 8; 64 / 8; b: 64 / 64 twice
    expected = 0.1 / 2 * (1 * (1 * 5 + 4 * 1) + 2 * (0 * 8 + 9 * 1)) / 3
    torch.testing.assert_close(minimised - entropy, torch.tensor(expected))
    assert rarity.num_bytes == 6


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


def test_start_l2_pulls_the_net_and_codebooks_and_no_native_table(config, data, ranks):
    tables = make_tables(config.model, data)
    methods = {tables[0].name: PQConfig(num_codes=2, codebook_size=4), "*": DenseConfig()}
    model = make_model(CompressedEmbeddingBagCollection(tables, compression=methods), 0, config.model)
    stage = StageConfig(start_l2=0.5, optim=OptimConfig(tables="adam"))
    trainable = Trainable(model, stage, ranks, ParallelConfig())
    loss = trainable.module.module.loss
    pulled = [name for name, _ in trainable.module.named_parameters() if name in loss.pulled]
    assert any("decoder" in name for name in pulled) and any("embeddings" not in name for name in pulled)
    assert not any(tables[1].name in name for name in pulled)
    with torch.no_grad():
        for parameter, _ in loss.pulled.values():
            parameter += 2
    minimised, entropy = loss(*GIVEN)
    moved = sum(parameter.numel() for parameter, _ in loss.pulled.values())
    assert float((minimised - entropy).detach()) == pytest.approx(0.5 / 2 * 4 * moved, rel=1e-4)
