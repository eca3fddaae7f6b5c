"""nDCG@10 and HR@10 by hand, with ties, and what popularity has."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from torchrec_compress.train.config_sequence import SequenceConfig
from torchrec_compress.train.data.sequences import SequenceData
from torchrec_compress.train.evaluate.ranking import next_item_metrics, popularity_metrics


def test_metrics_of_a_hand_made_example():
    """Places 1, 3, 10 and 11."""
    found = next_item_metrics(np.array([[0.5, 0, 0], [1.5, 2, 0], [2.5, 9, 0], [3.5, 10, 0]]))
    gains = [1.0, 1 / 2, 1 / math.log2(11), 0.0]
    assert found == pytest.approx({"logloss": 2.0, "ndcg10": sum(gains) / 4, "hr10": 0.75})


@pytest.mark.parametrize(("above", "level"), [(0, 3), (8, 3), (9, 1), (10, 4), (0, 5)])
def test_ties_count_as_the_mean_over_all_orders(above, level):
    gains, hits = [], []
    for order in permutations(range(level + 1)):
        place = above + order.index(0) + 1
        gains.append(1 / math.log2(place + 1) if place <= 10 else 0.0)
        hits.append(float(place <= 10))
    found = next_item_metrics(np.array([[0.0, above, level]]))
    assert found["ndcg10"] == pytest.approx(np.mean(gains)) and found["hr10"] == pytest.approx(np.mean(hits))


def test_scores_that_are_all_alike_have_what_chance_has():
    found = next_item_metrics(np.array([[math.log(1000), 0, 999]]))
    assert found["hr10"] == pytest.approx(0.01)


@pytest.mark.parametrize("found", [np.zeros((0, 3)), np.array([[np.nan, 0, 0]]), np.array([[np.inf, 0, 0]])])
def test_what_is_no_outcome_is_refused(found):
    with pytest.raises(ValueError, match="must have rows of finite scores"):
        next_item_metrics(found)


def test_popularity_leaves_out_what_a_sequence_held():
    """Counts in train, by item: 0: 3, 1: 3, 2: 2, 3: 1, the rest 0. Of 20 items."""
    sequences = [[0, 1, 2, 3, 5], [0, 1, 1, 2], [0, 2, 0, 1]]
    items = torch.tensor([item for each in sequences for item in each], dtype=torch.int32)
    offsets = torch.tensor([0, *np.cumsum([len(each) for each in sequences])])
    data = SequenceData(items, offsets, 20, SequenceConfig(by="user", max_length=1, num_negatives=1))
    assert data.counts()["item"].tolist()[:6] == [3, 2, 2, 0, 0, 0]
    # valid: 3 after 0 1 2 is level with the 17 others that were in no train; 1 after 0 1, the target itself, after none
    # but itself; 0 after 0 2 is the most popular of all
    wanted = [(0, 16), (0, 1), (0, 0)]
    places = [next_item_metrics(np.array([[0.0, *place]])) for place in wanted]
    for name in ("ndcg10", "hr10"):
        assert popularity_metrics(data)["valid"][name] == pytest.approx(np.mean([place[name] for place in places]))
