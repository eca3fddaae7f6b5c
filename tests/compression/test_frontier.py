"""A frontier is measured once, read back as data, and asked for any number of budgets."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagConfig

from torchrec_compress.compression import Frontier, for_budget, frontier, measure_frontier
from torchrec_compress.compression.knapsack import Candidate, undominated
from torchrec_compress.methods import DenseConfig, Int4Config, Int8Config, PQConfig

FEW = PQConfig(num_codes=1, codebook_size=16, popularity="count")
WAYS = {
    "a": [(76, 9.0, Int4Config()), (112, 2.0, Int8Config()), (288, 0.0, DenseConfig())],
    "b": [(64, 0.0, DenseConfig())],
}
SIZES = {"a": (9, 8), "b": (2, 8)}


def made() -> Frontier:
    return Frontier(SIZES, {name: [Candidate(*way) for way in ways] for name, ways in WAYS.items()}, "squared error")


def test_several_budgets_share_one_measurement(monkeypatch):
    rows = {"user": torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), "day": torch.randn(7, 8)}
    counts = {"user": 900 // torch.arange(1, 501), "day": torch.full((7,), 500)}
    options = {"num_codes": (1, 2), "codes": FEW}
    found = measure_frontier(rows, counts, **options)
    expected = {budget: for_budget(rows, counts, budget, **options) for budget in (3000, 6000, 12_000)}
    monkeypatch.setattr("torchrec_compress.methods.CodebookConfig.serve_lengths", None)
    for budget, choice in expected.items():
        assert found.choose(budget) == choice
        assert found.choose(budget).num_bytes <= budget


def test_what_a_choice_tells():
    choice = made().choose(176)
    assert dict(choice) == {"a": Int8Config(), "b": DenseConfig()} and choice.excess == 0
    assert (choice.num_bytes, choice.error, choice.gain) == (176, 2.0, 0.0)
    assert str(choice).splitlines() == [
        "table  method  bytes  squared error  1 % of bytes more",
        "a      int8      112              2                  0",
        "b      dense      64              0                  0",
        "all              176              2                  0",
    ]
    near = made().choose(175)
    assert near["a"] == Int4Config() and near.gain == 7.0 and near.shares["b"].gain == 0
    coded = PQConfig(num_codes=2, num_hot_rows=3)
    assert frontier.told(coded) == "pq num_codes=2 num_hot_rows=3"


def test_it_is_read_back_as_it_was():
    plain = json.loads(json.dumps(made().to_dict()))
    assert Frontier.from_dict(plain) == made()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.pop("unit"), "must have tables and a unit"),
        (lambda plain: plain.update(unit="AUC"), "must have tables and a unit"),
        (lambda plain: plain.update(tables=[]), "must have tables and a unit"),
        (lambda plain: plain["tables"].update(a=3), "table 'a': must have rows, width and candidates"),
        (lambda plain: plain["tables"]["a"].update(rows=-9), r"rows and width must be ints above 0, got \(-9, 8\)"),
        (lambda plain: plain["tables"]["a"].update(rows=10), "takes 84 bytes, got 76"),
        (lambda plain: plain["tables"]["a"].update(candidates=[]), "candidates must be a list of one at least"),
        (lambda plain: plain["tables"]["a"]["candidates"].reverse(), "more bytes and less error"),
        (lambda plain: plain["tables"]["a"]["candidates"][0].pop(), "a candidate must be bytes, error and method"),
        (lambda plain: plain["tables"]["a"]["candidates"][0].__setitem__(1, float("nan")), "error must be a float"),
        (lambda plain: plain["tables"]["a"]["candidates"][0].__setitem__(2, {"method": "pq"}), "num_codes"),
        (
            lambda plain: plain["tables"]["a"]["candidates"][0].__setitem__(2, PQConfig(num_codes=3).to_dict()),
            "must have methods that can store it",
        ),
    ],
)
def test_what_is_read_back_is_checked(change, message):
    plain = copy.deepcopy(made().to_dict())
    change(plain)
    with pytest.raises(ValueError, match=message):
        Frontier.from_dict(plain)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 100))
def test_small_tables(data, seed):
    """Whatever the tables: bytes within the budget and as stored, more bytes never more error, nothing negative."""
    generator = torch.Generator().manual_seed(seed)
    rows, counts = {}, {}
    for name in data.draw(st.sets(st.sampled_from("abc"), min_size=1)):
        size, width = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([1, 2, 4, 6, 8]))
        rows[name] = torch.randn(size, width, generator=generator)
        counts[name] = torch.randint(0, 30, (size,), generator=generator)
    found = measure_frontier(rows, counts, num_codes=(1, 2, 3), codes=FEW)
    assert Frontier.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for name, ways in found.candidates.items():
        size, width = found.sizes[name]
        table = EmbeddingBagConfig(name=name, num_embeddings=size, embedding_dim=width, feature_names=[name])
        assert [each.num_bytes for each in ways] == [each.option.stored_bytes(table) for each in ways]
        assert ways == undominated(name, ways) and ways[-1].error == 0
    least = sum(ways[0].num_bytes for ways in found.candidates.values())
    errors = []
    for budget in (least, int(1.3 * least) + 1, 10 * least):
        choice = found.choose(budget)
        assert choice.num_bytes <= budget and choice.gain >= 0 and choice.error >= 0
        errors.append(choice.error)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"nobody": 1.0}, "factors must be of tables"),
        ({"user": 0.0}, "table 'user': the factor must be finite and above 0, got 0.0"),
        ({"user": float("nan")}, "table 'user': the factor must be finite and above 0, got nan"),
    ],
)
def test_factors_that_cannot_be_are_refused(factors, message):
    frontier = Frontier({"user": (9, 8)}, {"user": [Candidate(112, 2.0, Int8Config())]}, "loss")
    with pytest.raises(ValueError, match=message):
        frontier.scaled(factors)
    assert frontier.scaled({"user": 2.0}).choose(200).error == 4.0


@pytest.mark.parametrize("measure", [measure_frontier, lambda *given: for_budget(*given, 10**9)])
def test_an_error_names_what_was_called(measure):
    where = "measure_frontier" if measure is measure_frontier else "for_budget"
    for tables, counts in ((3, {}), ({"a": torch.ones(9, 4)}, {}), ({"a": torch.ones(9, 4)}, {"a": torch.ones(8)})):
        with pytest.raises(ValueError, match=f"^{where}: "):
            measure(tables, counts)
