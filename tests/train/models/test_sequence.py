"""The models of what comes next against a plain reference, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec import EmbeddingCollection, KeyedJaggedTensor

from tests.train.data.test_sequences import ITEMS, made
from torchrec_compress import CompressedEmbeddingCollection
from torchrec_compress.methods import HashConfig, MEmComConfig, NarrowConfig, PQConfig
from torchrec_compress.train.config import ModelConfig
from torchrec_compress.train.config_sequence import AttentionConfig
from torchrec_compress.train.models import sequence
from torchrec_compress.train.models.kinds import full_tables, make_model, make_tables
from torchrec_compress.train.models.sequence import SequenceModel, item_table

MODELS = ("hstu", "sasrec")
CONFIG = ModelConfig(name="hstu", embedding_dim=8, init_scale=0.5, attention=AttentionConfig(num_heads=2))


def _model(name: str = "hstu", method=None) -> SequenceModel:
    torch.manual_seed(1)
    config, data = dataclasses.replace(CONFIG, name=name), made()
    tables = make_tables(config, data)
    collection = full_tables(config, tables)
    if method is not None:
        collection = CompressedEmbeddingCollection(tables, compression=method)
    model = make_model(config, collection, data)
    assert isinstance(model, SequenceModel)
    return model


def _state(model: SequenceModel, items: list[int], table: torch.Tensor) -> torch.Tensor:
    """Return what the net makes of each item of one sequence, (T, D)."""
    rows = table[items] * table.shape[1] ** 0.5 + model.net.positions[: len(items)]
    return model.net.norm(model.net.blocks(rows[None]))[0]


def _lists(batch, key: str) -> list[list[int]]:
    return [values.int().tolist() for values in batch.features[key].to_dense()]


@pytest.mark.parametrize("name", MODELS)
def test_training_contrasts_each_next_item_with_the_pool(name):
    """Sequences of different lengths; negatives that are the next item itself do not count."""
    model, table = _model(name), None
    table = model.embeddings.embeddings["item"].weight
    (batch,) = made(num_negatives=30).batches("train", 20, 0).epoch(0)
    found = model.train()(batch.features).logits
    pool = batch.features["item_pool"].values().tolist()
    wanted, num_left_out = [], 0
    for was, came in zip(_lists(batch, "item"), _lists(batch, "item_next"), strict=True):
        losses = []
        for state, item in zip(_state(model, was, table), came, strict=True):
            others = [other for other in pool if other != item]
            num_left_out += len(pool) - len(others)
            scores = torch.stack([state @ table[other] for other in [item, *others]])
            losses.append(-torch.log_softmax(scores, 0)[0])
        wanted.append(torch.stack(losses).mean())
    assert num_left_out > 0
    torch.testing.assert_close(found[:, 0], torch.stack(wanted))
    gradients = torch.autograd.grad((found[:, 0] * batch.weights).mean(), [*model.parameters()])
    loss = (torch.stack(wanted) * batch.weights).mean()
    for mine, its in zip(gradients, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_ranks_all_items_that_the_sequence_did_not_hold(name):
    model = _model(name).eval()
    table = model.embeddings.embeddings["item"].weight
    (batch,) = made().batches("test", 9, None).epoch(0)
    with torch.no_grad():
        found = model(batch.features).logits
        lists = [_lists(batch, key) for key in ("item", "item_next", "item_held")]
        for row, was, (came,), held in zip(found, *lists, strict=True):
            assert len(held) >= len(was)
            scores = table @ _state(model, was, table)[-1]
            left = [item for item in range(ITEMS) if item not in held]
            torch.testing.assert_close(row[0], -torch.log_softmax(scores[left], 0)[left.index(came)])
            assert row[1:].tolist() == [sum(bool(scores[item] > scores[came]) for item in left), 0]


@pytest.mark.parametrize(("rows", "scores"), [(2, 2**24), (1, 2**24), (512, ITEMS), (512, 1)])
def test_rows_are_scored_a_few_at_a_time(monkeypatch, rows, scores):
    model = _model().eval()
    (batch,) = made().batches("test", 9, None).epoch(0)
    with torch.no_grad():
        whole = model(batch.features).logits
        monkeypatch.setattr(sequence, "_SCORED", rows)
        monkeypatch.setattr(sequence, "_SCORES", scores)
        torch.testing.assert_close(model(batch.features).logits, whole)


@pytest.mark.parametrize("method", [HashConfig(num_buckets=9), MEmComConfig(num_buckets=5), NarrowConfig(width=4)])
def test_what_was_and_what_may_come_share_one_compressed_table(method):
    """As a dense table of the same rows has them; all three look-ups send it gradients."""
    small, full = _model(method=method), _model()
    with torch.no_grad():
        rows = small.embeddings.table_rows("item", torch.arange(ITEMS))
        full.embeddings.embeddings["item"].weight.copy_(rows)
    full.net.load_state_dict(small.net.state_dict())
    (batch,) = made().batches("train", 20, 0).epoch(0)
    found, wanted = (model.train()(batch.features).logits[:, 0] for model in (small, full))
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    gradients = [value.grad for name, value in small.named_parameters() if name.startswith("embeddings.")]
    assert gradients and all(grad is not None and bool((grad != 0).any()) for grad in gradients)
    for key in ("item", "item_next", "item_pool"):
        read = small.embeddings(batch.features)[key].values()
        (grad,) = torch.autograd.grad(read.sum(), [next(iter(small.embeddings.parameters()))])
        assert bool((grad != 0).any()), key


def test_ids_that_share_a_row_are_level():
    model = _model(method=HashConfig(num_buckets=4)).eval()
    (batch,) = made().batches("test", 9, None).epoch(0)
    with torch.no_grad():
        found = model(batch.features).logits
        rows = model.embeddings.table_rows("item", torch.arange(ITEMS))
    for row, (came,), held in zip(found, _lists(batch, "item_next"), _lists(batch, "item_held"), strict=True):
        same = [item for item in range(ITEMS) if item not in held and torch.equal(rows[item], rows[came])]
        assert row[2] == len(same) - 1 > 0


def _features(was: list[list[int]], came: list[list[int]], pool: list[int], held: list[list[int]]) -> KeyedJaggedTensor:
    bags = [*was, *came, *([pool] + [[]] * (len(was) - 1) if was else []), *held]
    values = torch.tensor([item for bag in bags for item in bag], dtype=torch.int32)
    keys = ["item", "item_next", "item_pool", "item_held"]
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int32)
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, stride=len(was))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [None, PQConfig(num_codes=2, codebook_size=4)])
def test_sequences_of_nothing_change_nothing_and_score_all_items_alike(name, method):
    model = _model(name, method)
    alone, beside = ([[3, 4]], [[4, 5]]), ([[], [3, 4], []], [[], [4, 5], []])
    one, three = (model.train()(_features(*each, [1, 2], [[]] * len(each[0]))).logits for each in (alone, beside))
    torch.testing.assert_close(three[1], one[0])
    assert three[[0, 2], 0].tolist() == [0.0, 0.0]
    with torch.no_grad():
        found = model.eval()(_features([[], [3]], [[7], [4]], [*range(ITEMS)], [[], [3]])).logits
    assert found[0].tolist() == [pytest.approx(torch.tensor(float(ITEMS)).log().item()), 0.0, ITEMS - 1]
    assert found[1, 1:].sum() < ITEMS - 1


@pytest.mark.parametrize("method", [None, PQConfig(num_codes=2, codebook_size=4)])
def test_a_batch_of_no_sequences_is_refused(method):
    with pytest.raises(ValueError, match="a batch must have a sequence, got none"):
        _model(method=method)(_features([], [], [], []))


def test_bad_input_is_refused():
    model = _model()
    with pytest.raises(ValueError, match=r"at most data\.sequence\.max_length = 4 items, got 5"):
        model(_features([[1, 2, 3, 4, 5]], [[2, 3, 4, 5, 6]], [1], [[]]))
    with pytest.raises(ValueError, match="the pool must be all 40 items in evaluation, got 1"):
        model.eval()(_features([[1]], [[2]], [1], [[1]]))
    with pytest.raises(ValueError, match=r"num_heads: must divide model\.embedding_dim = 8, got 3"):
        item_table(dataclasses.replace(CONFIG, attention=AttentionConfig(num_heads=3)), "item", 9)
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        item_table(dataclasses.replace(CONFIG, embedding_dim=6), "item", 9)
    with pytest.raises(
        ValueError, match=r"model\.name: must be a model of sequences, which the data are, got 'deepfm'"
    ):
        make_model(ModelConfig(), EmbeddingCollection(tables=make_tables(CONFIG, made())), made())
