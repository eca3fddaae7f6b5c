from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.evaluate.scoring import predict, rare_ids, validate


def _sum_of_ids(batch):
    return batch.features.values().view(-1, len(batch.labels)).sum(0).float()


def test_a_split_is_scored_in_the_order_of_its_rows(data, ranks):
    scored = predict(_sum_of_ids, data, "test", ranks)
    assert scored is not None and scored.tail is None and scored.kinds is None
    assert np.array_equal(scored.logits, data.test.ids.sum(1).float().numpy())
    assert np.array_equal(scored.labels, data.test.labels.numpy())


def test_tail_is_counted_in_train_only(data, ranks):
    rare = rare_ids(data, DataConfig(tail_tables=["user"], tail_count=10), ranks)
    scored = predict(_sum_of_ids, data, "test", ranks, rare)
    counts = np.bincount(data.train.ids[:, 0].numpy(), minlength=300)
    assert scored is not None and np.array_equal(scored.tail, counts[data.test.ids[:, 0].numpy()] < 10)
    assert 0 < scored.tail.mean() < 1
    with pytest.raises(ValueError, match="tail_tables"):
        rare_ids(data, DataConfig(tail_tables=["usr"]), ranks)


@pytest.mark.parametrize(
    ("vocab", "tables"), [([300, 80], ["user"]), ([1001, 1000], ["user"]), ([1001, 1001], ["user", "item"])]
)
def test_the_tail_is_of_all_tables_over_a_thousand_rows_or_of_the_largest(data, ranks, vocab, tables):
    known = dataclasses.replace(data, vocab=[*vocab, *data.vocab[2:]])
    assert list(rare_ids(known, DataConfig(), ranks)) == tables


def test_nothing_is_counted_where_no_tail_is_asked_for(data, ranks, monkeypatch):
    monkeypatch.setattr(type(data), "counts", None)
    assert rare_ids(data, DataConfig(tail_count=0), ranks) == {}
    assert predict(_sum_of_ids, data, "test", ranks, {}).tail.sum() == 0


def test_a_row_of_several_ids_is_in_the_tail_with_one_rare_id(data, ranks):
    rare = {"user": torch.zeros(300, dtype=torch.bool)}
    rare["user"][data.valid.ids[7, 0]] = True
    scored = predict(_sum_of_ids, data, "valid", ranks, rare)
    assert (
        scored is not None
        and scored.tail[7]
        and scored.tail.sum() == (data.valid.ids[:, 0] == data.valid.ids[7, 0]).sum()
    )


def test_logits_that_are_not_finite_are_refused(data, ranks):
    with pytest.raises(ValueError, match="must be finite"):
        validate(lambda batch: torch.full((len(batch.labels),), float("nan")), data, ranks)


def test_kinds_come_along(data, ranks):
    kinds = torch.arange(len(data.valid)).remainder(3).to(torch.int8)
    known = dataclasses.replace(data, valid=dataclasses.replace(data.valid, kinds=kinds))
    scored = predict(_sum_of_ids, known, "valid", ranks)
    assert scored is not None and np.array_equal(scored.kinds, kinds.numpy())
