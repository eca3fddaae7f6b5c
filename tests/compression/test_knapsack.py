"""Budget allocation equals brute force."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_compress.compression.knapsack import Candidate, allocate

TABLES = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=5), min_size=1, max_size=4
)


def named(tables: list[list[tuple[int, float]]]) -> dict[str, list[Candidate[int]]]:
    return {
        f"t{i}": [Candidate(size, float(error), k) for k, (size, error) in enumerate(table)]
        for i, table in enumerate(tables)
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TABLES, st.integers(0, 120))
def test_equals_brute_force(tables: list[list[tuple[int, int]]], budget: int) -> None:
    choices = [c for c in itertools.product(*tables) if sum(size for size, _ in c) <= budget]
    candidates = named(tables)
    if not choices:
        cheapest = sum(min(size for size, _ in table) for table in tables)
        with pytest.raises(ValueError, match=f"cheapest choice's {cheapest} bytes, got {budget} bytes"):
            allocate(candidates, budget)
        return
    best = min(sum(error for _, error in c) for c in choices)
    result = allocate(candidates, budget)
    assert result.error == result.lower_bound == best
    assert result.num_bytes <= budget
    assert result.num_bytes == sum(c.num_bytes for c in result.choices.values())
    assert all(c is candidates[name][c.option] for name, c in result.choices.items())
    greedy = allocate(candidates, budget, max_states=0)
    assert greedy.num_bytes <= budget
    assert greedy.lower_bound <= best + 1e-9
    assert best <= greedy.error


def test_many_tables_are_solved_exactly_and_near_the_bound() -> None:
    chance = random.Random(0)
    tables = {}
    for i in range(40):
        scale = 10 ** chance.uniform(2, 6)
        tables[f"t{i}"] = [
            Candidate(int(scale * m), scale * 0.5**m * chance.uniform(0.8, 1.2), m) for m in range(1, 13)
        ]
    budget = 4 * sum(table[0].num_bytes for table in tables.values())
    result = allocate(tables, budget)
    relaxed = allocate(tables, budget, max_states=0)
    assert relaxed.lower_bound <= result.error <= relaxed.error
    assert result.error <= 1.01 * relaxed.lower_bound
    assert result.error == result.lower_bound


def test_budget_for_everything_takes_the_best() -> None:
    result = allocate({"a": [Candidate(1, 5.0, "small"), Candidate(9, 0.0, "large")]}, 100)
    assert result.choices["a"].option == "large"
    assert (result.num_bytes, result.error) == (9, 0.0)


def test_a_larger_option_that_is_worse_is_never_chosen() -> None:
    result = allocate({"a": [Candidate(5, 1.0, "good"), Candidate(9, 2.0, "bad"), Candidate(5, 3.0, "poor")]}, 100)
    assert result.choices["a"].option == "good"


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "must name at least one table, got none"),
        ({"a": []}, "table 'a' must have at least one candidate, got none"),
        ({"a": [Candidate(-1, 0.0, "x")]}, "table 'a': .* got -1 bytes and error 0.0 for 'x'"),
        ({"a": [Candidate(1, float("nan"), "x")]}, "got 1 bytes and error nan for 'x'"),
        ({"a": [Candidate(60, 0.0, "x")], "b": [Candidate(50, 0.0, "y")]}, r"got 100 bytes \(10 too few\); raise"),
    ],
)
def test_bad_input(candidates: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"allocate: .*{message}"):
        allocate(candidates, 100)


def test_a_budget_that_takes_everything_as_it_is():
    """The least error is then 0, beside which no rounding of bounds may count."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        errors = torch.rand(6, 9, generator=generator, dtype=torch.float64) * 1e6
        tables = {
            str(n): [*(Candidate(10 + m, float(e), m) for m, e in enumerate(row)), Candidate(100, 0.0, "dense")]
            for n, row in enumerate(errors)
        }
        assert {c.option for c in allocate(tables, 10**6).choices.values()} == {"dense"}
