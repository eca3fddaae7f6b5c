"""The loss by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import DenseConfig, PQConfig
from torchrec_compress.train.config import OptimConfig, ParallelConfig, StageConfig
from torchrec_compress.train.engine.objective import Loss
from torchrec_compress.train.engine.rarity import Rarity
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables

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
