from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from torchrec_compress.train.config import GeneratorConfig
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.mlperf import MULTI_HOT_SIZES, TABLE_ROWS
from torchrec_compress.train.evaluate.metrics import bayes_metrics


def test_the_default_shape_is_what_it_was():
    data = generate(GeneratorConfig(num_rows=2000, num_users=100, num_items=50))
    found = hashlib.sha256(b"".join(split.ids.numpy().tobytes() for split in (data.train, data.valid, data.test)))
    found.update(data.train.labels.numpy().tobytes())
    assert found.hexdigest()[:16] == "e08096c571990540"


@pytest.mark.parametrize("multi_hot", [False, True])
def test_criteo_shape(multi_hot):
    data = generate(GeneratorConfig(num_rows=3000, criteo_rows=500, multi_hot=multi_hot))
    assert data.vocab == [min(size, 500) for size in TABLE_ROWS.values()] and data.num_dense == 13
    assert data.layout.widths == (tuple(MULTI_HOT_SIZES.values()) if multi_hot else (1,) * 26)
    assert data.train.ids.shape == (2400, 214 if multi_hot else 26) and data.train.dense.shape == (2400, 13)
    best = bayes_metrics(data.train)
    assert 0.72 < best["bayes_auc"] < 0.9 and 0.2 < float(data.train.labels.mean()) < 0.5
    if multi_hot:  # an id always brings the same others along
        ids = data.train.ids[:, data.layout.columns("cat_0")]
        assert len(torch.unique(ids, dim=0)) == len(torch.unique(ids[:, 0]))
    counts = data.counts()["cat_9"]
    assert int(counts.sum()) == 2400 * (7 if multi_hot else 1) and int(counts.max()) > 5 * float(counts.double().mean())


def test_settings_that_do_not_fit_are_refused():
    for config in (GeneratorConfig(multi_hot=True), GeneratorConfig(criteo_rows=1), GeneratorConfig(num_rows=3)):
        with pytest.raises(ValueError, match=r"data\.generator"):
            generate(config)
    assert np.array_equal(
        generate(GeneratorConfig(num_rows=200, criteo_rows=20)).test.ids,
        generate(GeneratorConfig(num_rows=200, criteo_rows=20)).test.ids,
    )
