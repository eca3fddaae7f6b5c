"""What a fit of the trainer reads of clicks beside the look-ups: pairs, or sketches of all of them."""

from __future__ import annotations

import pytest
import torch

from torchrec_compress.fit import MinHashSketch
from torchrec_compress.methods import HashConfig, LMAConfig, QuantileCodesConfig
from torchrec_compress.train import fitting
from torchrec_compress.train.models.kinds import make_tables

METHODS = {
    "user": LMAConfig(num_codes=4, codebook_size=16, hashes_per_code=2),
    "item": QuantileCodesConfig(num_codes=4, codebook_size=16),
}


def test_a_sketch_takes_all_clicks_and_pairs_are_the_first(config, data, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = make_tables(config.model, data)
    methods = {table.name: METHODS.get(table.name, HashConfig(num_buckets=9)) for table in tables}
    (whole,) = [batch for batch in data.batches("train", 10**6, None).epoch(0)]
    clicked = (whole.labels > 0.5).nonzero().squeeze(1)
    users, items = (whole.features[name].values()[clicked].long() for name in ("user", "item"))
    monkeypatch.setattr(fitting, "_READ_ROWS", 300)
    monkeypatch.setattr(fitting, "_MAX_PAIRS", 500)
    found = fitting._contexts(config, data, tables, methods)
    assert found.keys() == {"user", "item"} and len(clicked) > 600
    sketch, pairs = found["user"], found["item"]
    assert isinstance(sketch, MinHashSketch) and isinstance(pairs, tuple)
    (table,) = [table for table in tables if table.name == "user"]
    expected = METHODS["user"].sketch(table, config.seed)
    assert expected is not None
    expected.add(users, items)
    assert torch.equal(sketch.minima, expected.minima)
    assert torch.equal(pairs[0], items[:500]) and torch.equal(pairs[1], users[:500])


def test_nothing_is_read_for_methods_that_ask_for_none(config, data, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = make_tables(config.model, data)
    monkeypatch.setattr(type(data), "batches", None)
    assert fitting._contexts(config, data, tables, {table.name: HashConfig(num_buckets=9) for table in tables}) == {}
