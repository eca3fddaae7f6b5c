import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_compress.train.evaluate.metrics import auc, bayes_metrics, evaluate, logloss, undefined


@pytest.mark.parametrize("decimals", [0, 1, 9])  # few decimals make many ties
def test_auc_and_logloss_equal_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    logits = np.round(rng.normal(labels * 0.7, 1), decimals)
    assert auc(labels, logits) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    probabilities = 1 / (1 + np.exp(-logits))
    assert logloss(labels, logits) == pytest.approx(log_loss(labels, probabilities), abs=1e-9)


def test_one_class_has_no_auc():
    assert np.isnan(auc(np.ones(3), np.arange(3)))


def test_extreme_logits_have_an_exact_logloss():
    assert logloss(np.array([0.0, 1.0]), np.array([2000.0, 2000.0])) == 1000.0


def test_evaluate_splits_tail_and_kinds():
    labels, logits = np.array([1, 0, 0, 1, 0, 0]), np.array([3.0, 1, 2, 0, -1, 1])
    kinds, tail = np.array([0, 1, 2, 0, 1, 2]), np.array([True, True, True, False, False, False])
    found = evaluate(labels, logits, tail, kinds)
    assert found["tail_auc"] == 1.0 and found["tail_share"] == 0.5
    assert found["tail_logloss"] == logloss(labels[:3], logits[:3]) != found["logloss"]
    assert found["kind1_auc"] == 0.75 and found["kind2_auc"] == 0.5


def test_what_is_not_defined_is_left_out_with_a_reason():
    labels, logits, tail = np.array([1, 0, 0]), np.array([1.0, 0, 0]), np.array([False, True, True])
    assert set(evaluate(labels, logits, tail, None)) == {"auc", "logloss", "tail_logloss", "tail_share"}
    assert undefined(labels, tail, None) == {"tail_auc": "all 2 rows have the label 0"}
    assert undefined(labels, tail, np.array([0, 1, 1])) == undefined(labels, tail, None)
    with pytest.raises(ValueError, match="must have clicks and others for an AUC, got 2 rows of one label"):
        evaluate(labels[1:], logits[1:], None, None)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="diverged"):
        evaluate(np.array([0, 1]), np.array([0.0, np.nan]), None, None)


def test_true_probabilities_bound_what_a_model_can_reach(data):
    best = bayes_metrics(data.test)
    noisy = data.test.probabilities.numpy() + np.random.default_rng(0).normal(0, 0.3, len(data.test))
    assert best["bayes_auc"] > auc(data.test.labels.numpy(), noisy) > 0.6
    assert best["bayes_logloss"] < logloss(data.test.labels.numpy(), np.zeros(len(data.test)))
