"""A fit in its two halves: what is learned from a sample, and rows that are encoded block by block."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, contexts, counts, rows, table
from torchrec_compress.fit import lookups, residual
from torchrec_compress.fit.kmeans import sample_points
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.managers import drawn_codes
from torchrec_compress.methods import (
    CceConfig,
    HashConfig,
    Int8Config,
    LMAConfig,
    MECConfig,
    MEmComConfig,
    MethodConfig,
    NarrowConfig,
    PQConfig,
    QuantileCodesConfig,
    RandomCodesConfig,
    TableData,
    TableState,
    base,
    learned,
)
from torchrec_compress.methods.learned import Learned, check_sample, with_sample
from torchrec_compress.ops import coded_ids

WHOLE = TableData(rows(), counts(), contexts(), seed=3)


def tensors(state: TableState) -> dict[str, Tensor]:
    codes = {} if state.codes is None else {"codes": state.codes}
    return {**codes, **state.decoder, **state.native, **state.managed, **state.trained}


def in_blocks(config: MethodConfig, data: TableData, blocks: list[Tensor]) -> TableState:
    found, kept = config.learn(table(), data), None
    for ids in blocks:
        kept = encoded(found, ids, kept)
    state = found.finish()
    return state if kept is None else found.with_rows(state, kept)


def encoded(found: Learned, ids: Tensor, kept: Tensor | None) -> Tensor | None:
    """Return what is kept by id once these ids are encoded too."""
    block = found.encode(ids, rows()[ids])
    if block is None:
        return None
    kept = block.new_zeros(found.num_rows, block.shape[1]) if kept is None else kept
    kept[found.row_numbers(ids)] = block
    return kept


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_what_two_have_encoded_adds_up(config: MethodConfig) -> None:
    """As on two ranks, each of which encodes rows of its own."""
    expected = tensors(config.fit(table(), WHOLE))
    mine, theirs = config.learn(table(), WHOLE), config.learn(table(), WHOLE)
    kept = encoded(mine, torch.arange(150, NUM_ROWS), None)
    kept = encoded(theirs, torch.arange(150), kept)
    sums: list[Tensor] = []
    theirs.add_up(sums.append)
    with pytest.raises(ValueError, match="got all but 150"):
        mine.finish()
    others = iter(sums)
    mine.add_up(lambda each: each.add_(next(others)))
    assert next(others, None) is None
    state = mine.finish()
    found = tensors(state if kept is None else mine.with_rows(state, kept))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_blocks_of_any_size_and_order_are_the_fit(config: MethodConfig) -> None:
    expected = tensors(config.fit(table(), WHOLE))
    mixed = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    for blocks in (torch.arange(NUM_ROWS).split(64), mixed.split([1, 200, NUM_ROWS - 201])):
        found = tensors(in_blocks(config, WHOLE, list(blocks)))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_fit_walks_the_table_in_blocks(config: MethodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tensors(config.fit(table(), WHOLE))
    monkeypatch.setattr(learned, "BLOCK_ROWS", 100)
    for name, value in tensors(config.fit(table(), WHOLE)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


SAMPLED = [config for config in CONFIGS if config.learns_from != "all"]


@pytest.mark.parametrize("config", SAMPLED, ids=[f"{c.method}-{n}" for n, c in enumerate(SAMPLED)])
def test_a_sample_of_all_rows_is_all_rows(config: MethodConfig) -> None:
    everyone = torch.arange(NUM_ROWS)
    found = tensors(in_blocks(config, replace(WHOLE, ids=everyone), [everyone]))
    for name, value in tensors(config.fit(table(), WHOLE)).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_a_weighted_sample_teaches_nearly_what_all_rows_do(structure: Any) -> None:
    config = PQConfig(num_codes=2, codebook_size=12, structure=structure, popularity="count", num_hot_rows=9)
    weights = popularity_weights(counts(), "count", NUM_ROWS)
    ids, stands_for = sample_points(weights, 250, torch.Generator().manual_seed(0))
    data = TableData(rows()[ids], counts(), seed=3, ids=ids, weights=stands_for)

    @torch.no_grad()
    def error(state: TableState) -> float:
        decoder = config.decoder(table(), None)
        decoder.load_state_dict(state.decoder)
        served = decoder(torch.arange(NUM_ROWS), None, None, state.codes, [])
        return float(((served - rows()).square().sum(1) * weights).sum())

    whole = error(config.fit(table(), WHOLE))
    few = error(in_blocks(config, data, list(torch.arange(NUM_ROWS).split(100))))
    assert whole <= few * 1.05  # k-means ends in a local optimum either way
    assert few < 1.25 * whole


@pytest.mark.parametrize("config", SAMPLED, ids=[f"{c.method}-{n}" for n, c in enumerate(SAMPLED)])
def test_weights_of_a_sample_may_want_gradients(config: MethodConfig) -> None:
    ids, weights = torch.arange(350), torch.rand(350) + 0.1
    states = []
    for given in (weights, weights.clone().requires_grad_()):
        data = replace(WHOLE, rows=rows()[ids], ids=ids, weights=given)
        states.append(tensors(in_blocks(config, data, [torch.arange(NUM_ROWS)])))
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value) and not states[1][name].requires_grad, name


def test_hot_rows_of_a_sample_weigh_nothing_in_it() -> None:
    config = PQConfig(num_codes=2, codebook_size=12, popularity="count", num_hot_rows=9)
    hot, ids = config.hot_ids(table(), WHOLE), torch.arange(NUM_ROWS)
    moved = rows()
    moved[hot] += 100
    states = []
    for values in (rows(), moved):
        found = config.learn(table(), TableData(values, counts(), ids=ids, weights=torch.ones(NUM_ROWS)))
        found.encode(ids, values)
        states.append(found.finish())
    assert torch.equal(states[0].decoder["codebooks"], states[1].decoder["codebooks"])


class LargestInt64(TorchDispatchMode):
    """Record the most values of an int64 tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.dtype == torch.int64:
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(
    "config",
    [
        PQConfig(num_codes=4, codebook_size=8),
        PQConfig(num_codes=4, codebook_size=8, structure="residual", num_hot_rows=20),
        MECConfig(num_codes=4, codebook_size=8, fit_options=MECFit(num_steps=3, batch_size=64)),
        QuantileCodesConfig(num_codes=4, codebook_size=8),
        LMAConfig(num_codes=4, codebook_size=8),
        RandomCodesConfig(num_codes=4, codebook_size=8),
        RandomCodesConfig(num_codes=4, codebook_size=8, structure="residual"),
        Int8Config(),
    ],
    ids=lambda config: f"{config.method}-{getattr(config, 'structure', '')}",
)
def test_no_fit_makes_int64_codes_of_the_whole_table(config: MethodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = 6000
    monkeypatch.setattr(learned, "BLOCK_ROWS", 500)
    monkeypatch.setattr(lookups, "_DIGIT", 8)  # whose values are counted
    for module in (import_module("torchrec_compress.fit.kmeans"), residual):  # the package's `kmeans` is the function
        monkeypatch.setattr(module, "train_size", lambda *_: 1000)
    many = table(num_embeddings=num_rows)
    seeded = torch.Generator().manual_seed(0)
    values = torch.randn(num_rows, 16, generator=seeded)
    pairs = torch.randint(0, num_rows, (3000,), generator=seeded), torch.randint(0, 50, (3000,), generator=seeded)
    data = TableData(values, torch.randint(0, 9, (num_rows,), generator=seeded), pairs)
    with LargestInt64() as largest:
        state = config.fit(many, data)
    assert state.codes is not None and len(state.codes) == num_rows
    assert largest.numel < 2 * num_rows  # vectors of ids, and codes of a block


class LargestMade(TorchDispatchMode):
    """Record the bytes of the largest tensor that is made, views aside."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.data_ptr() not in given:
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


@pytest.mark.parametrize(
    "config",
    [
        PQConfig(num_codes=4, codebook_size=8, popularity="count", num_hot_rows=20),
        PQConfig(num_codes=2, codebook_size=8, popularity="log2", width=8, num_coded=2000),
        PQConfig(num_codes=4, codebook_size=8, popularity="count", structure="residual", num_hot_rows=20),
        NarrowConfig(width=4),
        CceConfig(num_codes=2, codebook_size=8),
        HashConfig(num_buckets=5),
    ],
    ids=lambda config: f"{config.method}-{getattr(config, 'structure', '')}-{getattr(config, 'num_coded', '')}",
)
def test_learning_by_look_ups_makes_nothing_of_more_than_four_bytes_an_id(config: MethodConfig, monkeypatch) -> None:
    """Weights, float32; a table of 10^8 ids has no room for more."""
    num_rows = 20000
    blocks = {"kmeans": "CHUNK_ROWS", "lookups": "BLOCK_IDS", "popularity": "_BLOCK", "checks": "_BLOCK"}
    for module, name in blocks.items():
        monkeypatch.setattr(import_module(f"torchrec_compress.fit.{module}"), name, 500)
    monkeypatch.setattr(lookups, "_DIGIT", 8)
    monkeypatch.setattr(coded_ids, "_AT_ONCE", 4)
    monkeypatch.setattr(base, "train_size", lambda *_: 300)
    seeded = torch.Generator().manual_seed(0)
    data = TableData(None, torch.randint(0, 900, (num_rows,), generator=seeded))
    with LargestMade() as largest:
        config.learn_blocks(table(num_embeddings=num_rows), data, lambda ids: torch.randn(len(ids), 16))
    assert largest.nbytes <= 4 * num_rows


def test_what_is_no_sample_is_refused() -> None:
    config, ids = HashConfig(num_buckets=5), torch.arange(10)
    cases = [
        (replace(WHOLE, weights=torch.ones(10)), "weights must come with the ids of a sample"),
        (replace(WHOLE, ids=ids.int()), "ids must be a vector of int64, got torch.int32"),
        (replace(WHOLE, ids=[1, 2]), "ids must be a vector of int64, got list"),
        (replace(WHOLE, ids=ids.to("meta")), "ids must be on the cpu"),
        (replace(WHOLE, ids=ids[:0]), "ids of a sample must ascend, one at least"),
        (replace(WHOLE, ids=ids.flip(0)), "ids of a sample must ascend"),
        (replace(WHOLE, ids=ids + NUM_ROWS - 9), r"ids must be in \[0, 403\), got 403"),
        (replace(WHOLE, ids=ids, weights=torch.ones(9)), "weights of a sample must be 10 numbers in .0, 2..53., one"),
        (replace(WHOLE, ids=ids, weights=-torch.ones(10)), "weights of a sample must be 10 numbers in"),
        (replace(WHOLE, ids=ids, weights=torch.full((10,), 1e38)), "weights of a sample must be 10 numbers in"),
        (replace(WHOLE, ids=ids, weights=torch.full((10,), torch.nan)), "weights of a sample must be 10 numbers in"),
        (replace(WHOLE, ids=ids, weights=[1.0] * 10), "weights of a sample must be a tensor of floating-point numbers"),
        (
            replace(WHOLE, ids=ids, weights=torch.ones(10).to_sparse()),
            "weights of a sample must be a tensor of floating",
        ),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=f"table 'item': {message}"):
            config.learn(table(), data)
    nothing = TableData(rows()[:10], ids=ids, weights=torch.zeros(10))
    for method in (NarrowConfig(width=4), PQConfig(num_codes=2, codebook_size=4), config):
        with pytest.raises(ValueError, match="table 'item': at least one weight of a sample must be above 0, got all"):
            method.learn(table(), nothing)
    sample = replace(WHOLE, rows=rows()[:10], ids=ids)
    with pytest.raises(ValueError, match="table 'item': this method must learn from all 403 rows, got a sample of 10"):
        MEmComConfig(num_buckets=5).learn(table(), sample)
    with pytest.raises(ValueError, match="table 'item': a fit must be given all rows, got those of 10 ids"):
        config.fit(table(), sample)
    with pytest.raises(ValueError, match="the pre-trained table must be 10 x 16, got"):
        PQConfig(num_codes=2, codebook_size=4).learn(table(), replace(WHOLE, ids=ids))


@pytest.mark.parametrize("curvature", [None, torch.eye(16, dtype=torch.float64)], ids=["squares", "metric"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_block_may_be_empty(config: MethodConfig, curvature: Tensor | None) -> None:
    """As a rank that holds no rows of a table has them."""
    data = replace(WHOLE, curvature=curvature if config.uses_curvature else None)
    expected = tensors(config.fit(table(), data))
    nothing = torch.zeros(0, dtype=torch.int64)
    found = tensors(in_blocks(config, data, [nothing, torch.arange(NUM_ROWS), nothing]))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_id_is_encoded_once(config: MethodConfig) -> None:
    found = config.learn(table(), WHOLE)
    found.encode(torch.arange(400), rows()[:400])
    with pytest.raises(ValueError, match=r"each of 403 ids must be encoded once before finish\(\), got all but 3"):
        found.finish()
    for ids, message in (
        (torch.tensor([402, 399]), "each id must be encoded once, got 399 twice"),
        (torch.tensor([401, 401]), "each id must be encoded once, got 401 twice"),
        (torch.tensor([402, -1]), r"ids must be in \[0, 403\), got -1"),
        (torch.tensor([402, 403]), r"ids must be in \[0, 403\), got 403"),
        (torch.tensor([401.0, 402.0]), "ids must be a vector of int64, got torch.float32"),
        ([401, 402], "ids must be a vector of int64, got list"),
    ):
        with pytest.raises(ValueError, match=f"table 'item': {message}"):
            found.encode(ids, rows()[:2])  # type: ignore[arg-type]
    found.encode(torch.arange(400, 403), rows()[400:])
    found.finish()
    with pytest.raises(ValueError, match=r"rows must be encoded before finish\(\)"):
        found.encode(torch.arange(0), rows()[:0])


def test_blocks_are_checked_and_the_id_is_named() -> None:
    wrong = rows()[20:30]
    wrong[4, 2] = torch.nan
    for config in (HashConfig(num_buckets=5), Int8Config(), PQConfig(num_codes=2, codebook_size=4)):
        found = config.learn(table(), WHOLE)
        with pytest.raises(ValueError, match="got NaN or infinity in the row of id 24"):
            found.encode(torch.arange(20, 30), wrong)
        with pytest.raises(ValueError, match="must be fitted to a pre-trained table, got none"):
            found.encode(torch.arange(20, 30), None)


def test_a_sample_that_is_read_weighs_what_it_stands_for():
    weights, asked = counts().float(), []

    def read(ids: Tensor) -> Tensor:
        asked.append(ids)
        return rows()[ids].double()

    found = with_sample(TableData(None, counts(), seed=3), weights, 100, read)
    assert found.ids is not None and found.weights is not None and found.rows is not None
    check_sample(table(), found)
    assert torch.equal(torch.cat(asked), found.ids) and len(found.ids) == 100
    assert torch.equal(found.rows, rows()[found.ids])
    assert bool((found.weights >= weights[found.ids]).all())
    assert float(found.weights.sum()) == pytest.approx(float(weights.sum()), rel=0.1)
    everything = with_sample(TableData(None), weights, NUM_ROWS, read)
    assert everything.ids is None and everything.weights is None and torch.equal(everything.rows, rows())


def test_what_pointers_leave_is_a_mean_as_look_ups_weigh_it():
    config = CceConfig(num_codes=2, codebook_size=16)
    state = config.fit(table(), TableData(rows(), counts()))
    assert state.codes is not None
    books, width = state.decoder["codebooks"], DIM // 2
    hashes = drawn_codes(torch.arange(NUM_ROWS), state.decoder["draw"], 2, 16)
    weights = popularity_weights(counts(), "count", NUM_ROWS).double()[:, None]
    for m in range(2):
        pointed = books[16 * m : 16 * (m + 1)][state.codes[:, m].long()]
        left = (rows()[:, m * width : (m + 1) * width] - pointed).double()
        for bucket in range(16):
            mine = hashes[:, m] == bucket
            expected = (left * weights)[mine].sum(0) / weights[mine].sum()
            torch.testing.assert_close(books[32 + 16 * m + bucket], expected.float(), rtol=1e-4, atol=1e-5)


def test_rows_of_a_sample_weigh_what_they_stand_for():
    """Those of ids that weigh nothing, as hot ones, nothing; without weights, and of all rows, their own."""
    data = TableData(rows()[[2, 5, 7]], ids=torch.tensor([2, 5, 7]), weights=torch.tensor([4.0, 4.0, 9.0]))
    own = torch.arange(8.0).index_fill(0, torch.tensor([5]), 0.0)
    assert data.row_weights(own).tolist() == [4.0, 0.0, 9.0]
    assert replace(data, weights=None).row_weights(own).tolist() == [2.0, 0.0, 7.0]
    assert TableData(rows()).row_weights(own) is own
