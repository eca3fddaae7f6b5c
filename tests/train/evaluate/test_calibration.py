from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.evaluate.calibration import calibrate
from torchrec_compress.train.evaluate.metrics import auc, logloss
from torchrec_compress.train.evaluate.scoring import score


def _clicks(scale, bias, seed=0, size=4000):
    """Return labels that were drawn by logits, and logits that are off by a scale and a bias."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(-1.0, 1.5, size)
    labels = (draw.random(size) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, ((logits - bias) / scale).astype(np.float32)


@given(scale=st.floats(0.05, 40.0), sign=st.sampled_from([1, -1]), bias=st.floats(-30.0, 30.0), seed=st.integers(0, 99))
def test_it_undoes_a_scale_and_a_bias(scale, sign, bias, seed):
    labels, logits = _clicks(1.0, 0.0, seed)
    best = calibrate(labels, logits)
    off = calibrate(labels, (logits.astype(np.float64) - bias) / (sign * scale))
    assert best is not None and off is not None
    assert off.scale == pytest.approx(sign * scale * best.scale, rel=1e-3)
    assert logloss(labels, off((logits.astype(np.float64) - bias) / (sign * scale))) == pytest.approx(
        logloss(labels, best(logits)), abs=1e-9
    )


def test_nothing_beside_it_is_better():
    labels, logits = _clicks(2.0, 0.7)
    found = calibrate(labels, logits)
    assert found is not None
    least = logloss(labels, found(logits))
    assert least < logloss(labels, logits) - 0.01
    for scale, bias in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert logloss(labels, found._replace(scale=found.scale + scale, bias=found.bias + bias)(logits)) > least
    assert auc(labels, found(logits)) == pytest.approx(auc(labels, logits))


def test_equal_logits_become_the_share_of_clicks():
    found = calibrate(np.array([1, 0, 0, 0]), np.full(4, 3.0))
    assert found is not None
    assert 1 / (1 + np.exp(-found(np.full(1, 3.0)))) == pytest.approx(0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_that_part_the_classes_have_none(sign):
    assert calibrate(np.array([0, 0, 1]), sign * np.array([0.0, 1.0, 2.0])) is None


def test_it_is_fitted_on_validation_and_told_of_test(data, ranks):
    """The scale that is best on test is another one."""

    def logits(batch):
        return 3 * (batch.features["user"].values().float() / 300 - 0.5)

    found, left_out = score(logits, data, DataConfig(tail_count=0), ranks)
    assert not left_out
    parts = {name: getattr(data, name) for name in ("valid", "test")}
    scores = {name: 3 * (part.ids[:, 0].float().numpy() / 300 - 0.5) for name, part in parts.items()}
    valid = calibrate(parts["valid"].labels.numpy(), scores["valid"])
    assert valid is not None
    for name, part in parts.items():
        wanted = logloss(part.labels.numpy(), valid(scores[name]))
        assert found[name]["calibrated_logloss"] == pytest.approx(wanted, abs=1e-6)
        assert found[name]["logloss"] != pytest.approx(wanted, abs=1e-6)


def test_what_has_none_is_left_out_and_says_so(data, ranks):
    def logits(batch):
        return batch.labels * 2 - 1

    found, left_out = score(logits, data, DataConfig(tail_count=0), ranks)
    assert "calibrated_logloss" not in found["test"] and "calibrated_logloss" in left_out
