"""What a budget gives to tables, and what their errors really cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from torchrec_compress.compression import Frontier, measure_frontier
from torchrec_compress.compression.knapsack import Candidate
from torchrec_compress.compression.measuring import share_of_signal
from torchrec_compress.compression.rows import rows_of
from torchrec_compress.methods import HashConfig, PQConfig
from torchrec_compress.train import asked, budgeting, rises, stages
from torchrec_compress.train.byte_budget import budget_of
from torchrec_compress.train.config import override
from torchrec_compress.train.fitting import FullTables
from torchrec_compress.train.full import best_checkpoint, trained_model
from torchrec_compress.train.models.kinds import make_tables

CODES = {"method": "pq", "num_codes": 1, "codebook_size": 16}
BUDGET = {"budget_ratio": 3.0, "num_codes": [1, 2], "codes": CODES}
ONE = PQConfig(num_codes=1, codebook_size=16, popularity="count")


def _asked(config, tmp_path, ranks, data):
    source = stages.pretrain(config, tmp_path / "full", ranks, None)
    return source, asked.curvature_of(config, data, source, ranks)


def test_a_measured_rise_is_that_of_a_run_in_which_one_table_alone_is_compressed(config, data, ranks, tmp_path):
    config = override(config, {"compression": {"user": ONE.to_dict(), "*": {"method": "dense"}}})
    summary = stages.run(config, tmp_path / "run", tmp_path / "full", ranks, None)
    source, curvature = _asked(config, tmp_path, ranks, data)
    full = json.loads((source / "summary.json").read_text())["metrics"]["valid"]["logloss"]
    known = rises.Known(config, data, source, data.counts(), curvature)
    found = rises.measured_rises({"user": ONE, "item": ONE}, known)
    assert found["user"].measured == pytest.approx(summary["fitted"]["valid"]["logloss"] - full, abs=1e-6)
    assert found["user"].measured != found["item"].measured
    alone = rises.measured_rises({"item": ONE}, known)
    assert alone["item"].measured == pytest.approx(found["item"].measured, abs=1e-12)  # the other table was put back
    predicted = json.loads((tmp_path / "run" / "predicted.json").read_text())
    assert found["user"].predicted == pytest.approx(predicted["user"], rel=1e-6)
    assert 0 < found["user"].spread < 0.1
    before = trained_model(config, data, source).state_dict()
    after = trained_model(config, data, source).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def rise(measured: float, predicted: float = 0.1) -> rises.Rise:
    return rises.Rise(measured, 0.0, predicted)


def test_a_budget_weighs_predictions_by_what_was_measured(config, data, ranks, tmp_path, monkeypatch):
    """A table whose errors are found to cost next to nothing gets fewer bytes than where they cost much."""
    sizes = {}
    for name, found in (("dear", {"user": 1.0, "item": 1e-9}), ("cheap", {"user": 1e-9, "item": 1.0})):
        monkeypatch.setattr(
            budgeting,
            "measured_rises",
            lambda chosen, _, found=found: {key: rise(found.get(key, 0.1)) for key in chosen},
        )
        mine = override(config, {"compression": BUDGET})
        stages.run(mine, tmp_path / name / "run", tmp_path / name / "full", ranks, None)
        summary = json.loads((tmp_path / name / "run" / "summary.json").read_text())
        sizes[name] = {key: table["total_bytes"] for key, table in summary["footprint"]["tables"].items()}
    assert sizes["cheap"]["user"] < sizes["dear"]["user"]
    assert sizes["cheap"]["item"] > sizes["dear"]["item"]


def test_what_is_felt_is_measured_where_codes_can_be_and_told(config, data, ranks, tmp_path, monkeypatch, caplog):
    source, curvature = _asked(config, tmp_path, ranks, data)
    known = rises.Known(config, data, source, data.counts(), curvature)
    asked = {}

    def codes(chosen, _):
        asked.update(chosen)
        return {name: rise(-0.1, 0.0001 if name == "item" else 0.1) for name in chosen}

    monkeypatch.setattr(budgeting, "measured_rises", codes)
    rows = rows_of("test", dict(FullTables(best_checkpoint(source), make_tables(config.model, data))))
    budget = budget_of(BUDGET)
    with caplog.at_level("INFO"):
        found = budgeting._felt(rows, budget, known)
    small = {name for name, mine in rows.items() if mine.table.num_embeddings < ONE.codebook_size}
    assert small and set(asked) == set(rows) - small
    assert set(found) == set(asked) - {"item"}  # whose errors are too small to measure
    assert {each.factor for each in found.values()} == {0.05}  # the least of a prediction that is believed
    assert "as 1 codes the loss on validation rises by -0.10000, predicted 0.10000" in caplog.text


def test_sharing_is_predicted_as_the_curvature_does(config, data, ranks, tmp_path):
    source, curvature = _asked(config, tmp_path, ranks, data)
    known = rises.Known(config, data, source, data.counts(), curvature)
    for name, sharing in rises.shared_rises(["user", "item"], known).items():
        counts = known.counts[name]
        assert float(sharing.costs.sum()) == pytest.approx(sharing.rise.predicted, rel=1e-4)
        assert 0.15 * counts.sum() < float(sharing.counts.sum()) <= 0.25 * counts.sum() + int(counts.max())
        assert float(sharing.counts.max()) <= float(counts[counts > 0].double().quantile(0.95))


@pytest.mark.parametrize("noise", [0.5, 7.0, 60.0])
def test_noise_is_found_from_what_was_measured(noise):
    counts = torch.arange(1, 90, dtype=torch.float64)
    costs = counts.sqrt() / 1e5
    measured = 1.7 * float(costs @ share_of_signal(counts, noise))
    sharing = rises.Sharing(rises.Rise(measured, 0.0, float(costs.sum())), costs, counts)
    assert rises.noise_of(sharing, 1.7) == pytest.approx(noise, rel=1e-6)


def test_noise_is_bounded_and_chance_spares_no_id():
    counts, costs = torch.arange(1, 90, dtype=torch.float64), torch.full((89,), 1e-5, dtype=torch.float64)
    whole = float(costs.sum())
    assert rises.noise_of(rises.Sharing(rises.Rise(-1.0, 0.1, whole), costs, counts), 1.0) == pytest.approx(89, rel=0.1)
    assert rises.noise_of(rises.Sharing(rises.Rise(2 * whole, 0.0, whole), costs, counts), 1.0) == 0.0
    sure, unsure = (rises.Rise(whole / 2, spread, whole) for spread in (0.0, whole / 4))
    found = [rises.noise_of(rises.Sharing(each, costs, counts), 1.0) for each in (sure, unsure)]
    assert found[1] < found[0]


def test_budgets_are_measured_with_the_noise_that_was_found(config, data, ranks, tmp_path, monkeypatch):
    asked = []

    def measure(*arguments, **options):
        asked.append(options["noise"])
        return measure_frontier(*arguments, **options)

    monkeypatch.setattr(budgeting, "measure_frontier", measure)
    monkeypatch.setattr(budgeting, "_felt", lambda rows, *_: dict.fromkeys(rows, budgeting._Felt(1.0, 7.0)))
    stages.run(override(config, {"compression": BUDGET}), tmp_path / "run", tmp_path / "full", ranks, None)
    (noise,) = asked
    assert "user" in noise and set(noise.values()) == {7.0}


@pytest.mark.parametrize("pooling", list(PoolingType)[:2])
def test_one_table_of_bags_is_served_otherwise(pooling):
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=9, embedding_dim=4, feature_names=features, pooling=pooling)
        for name, features in (("a", ["x", "y"]), ("b", ["z"]))
    ]
    trained = EmbeddingBagCollection(tables)
    other = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    wanted = EmbeddingBagCollection(tables)
    wanted.load_state_dict(trained.state_dict())
    with torch.no_grad():
        wanted.embedding_bags["a"].weight.copy_(other)
    rows = trained.embedding_bags["a"].weight
    altered = rises._Altered(trained, tables[0], lambda ids: rows[ids], lambda ids: other[ids])
    lengths = torch.tensor([2, 0, 1, 3, 1, 2])
    batch = KeyedJaggedTensor.from_lengths_sync(["x", "y", "z"], torch.tensor([3, 3, 8, 0, 1, 2, 5, 6, 7]), lengths)
    found, expected = altered(batch), wanted(batch)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.values(), expected.values())


def _ways(*ways: tuple[int, float]) -> list[Candidate]:
    return [Candidate(size, error, HashConfig(num_buckets=size)) for size, error in ways]


@pytest.mark.parametrize(("helps", "kept"), [(True, {"a": 20, "b": 10}), (False, {"a": 10, "b": 20})])
def test_a_choice_is_put_right_where_it_is_measured_to_cost_more(monkeypatch, caplog, helps, kept):
    """Predicted, b's bytes are worth more; measured, a's are, and so they get them unless that is worse in truth."""
    frontier = Frontier(
        {"a": (99, 4), "b": (99, 4)},
        {"a": _ways((10, 0.010), (20, 0.002)), "b": _ways((10, 0.012), (20, 0.003))},
        "loss",
    )
    costs = {("a", 10): 0.040, ("a", 20): 0.008 if helps else 0.090, ("b", 10): 0.009, ("b", 20): 0.003}
    asked = []

    def measure(chosen, _):
        asked.append(dict(chosen))
        return {name: rise(costs[name, method.num_buckets]) for name, method in chosen.items()}

    monkeypatch.setattr(budgeting, "measured_rises", measure)
    known = SimpleNamespace(curvature={"a": 1})
    with caplog.at_level("INFO"):
        found = budgeting._checked(frontier, 30, known)
    assert {name: method.num_buckets for name, method in found.items()} == kept
    assert len(asked) == 2 and "two choices" in caplog.text
    asked.clear()
    assert dict(budgeting._checked(frontier, 30, SimpleNamespace(curvature={}))) == dict(frontier.choose(30))
    assert not asked  # squared errors are no losses


def test_a_choice_that_costs_nothing_is_not_measured(monkeypatch):
    frontier = Frontier({"a": (99, 4)}, {"a": _ways((10, 0.0004))}, "loss")
    monkeypatch.setattr(budgeting, "measured_rises", lambda *_: pytest.fail("measured"))
    assert budgeting._checked(frontier, 30, SimpleNamespace(curvature={"a": 1})).num_bytes == 10
