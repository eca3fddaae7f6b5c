"""Clustering of pointers, against a plain reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from torchrec_compress.fit.clustered import ResidualSums
from torchrec_compress.fit.product import learn_product
from torchrec_compress.managers import Clustering, OwnedCodes, drawn_codes
from torchrec_compress.managers.clustering import _KMEANS, _seed

N, M, K, D = 500, 2, 8, 6
MANAGER = Clustering(M, K, every=3, until=9)


def owned(num_ids: int = N, dtype: torch.dtype = torch.uint8) -> OwnedCodes:
    seeded = torch.Generator().manual_seed(0)
    shape = (2 * M * K, D // M)
    books = {"codebooks": torch.randn(shape, generator=seeded)}
    states = {"codebooks": {"sum": torch.rand(shape, generator=seeded), "row": torch.rand(2 * M * K)}}
    codes = torch.randint(K, (num_ids, M), generator=seeded).to(dtype)
    return OwnedCodes("item", num_ids, 0, codes, books, {"draw": torch.tensor([[5, 0]])}, states)


def served(table: OwnedCodes, codes: Tensor, draw: Tensor) -> Tensor:
    """Return the vectors of all ids, one by one."""
    books = table.parameters["codebooks"]
    hashes = drawn_codes(torch.arange(table.num_ids), draw, M, K)
    rows = []
    for number in range(table.num_ids):
        slices = [books[m * K + int(codes[number, m])] + books[(M + m) * K + int(hashes[number, m])] for m in range(M)]
        rows.append(torch.cat(slices))
    return torch.stack(rows)


def reference(table: OwnedCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, codebooks and hashed codewords after a clustering, by loops over ids."""
    old = table.buffers["draw"].clone()
    vectors = served(table, table.codes, old)
    centroids = learn_product(vectors, M, K, seed=_seed(old, _KMEANS))[1]
    hashes = drawn_codes(torch.arange(table.num_ids), old + torch.tensor([[0, 1]]), M, K)
    codes = torch.zeros(table.num_ids, M, dtype=torch.int64)
    left: dict[int, list[Tensor]] = {}
    for number, vector in enumerate(vectors.double()):
        for m, part in enumerate(vector.split(D // M)):
            of_slice = centroids[m * K : (m + 1) * K].double()
            codes[number, m] = (of_slice - part).square().sum(1).argmin()
            left.setdefault(m * K + int(hashes[number, m]), []).append(part - of_slice[codes[number, m]])
    hashed = torch.zeros(M * K, D // M)
    for bucket, parts in left.items():
        hashed[bucket] = torch.stack(parts).mean(0).float()
    return codes, centroids, hashed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_clustering_is_what_the_plain_reference_says(dtype):
    table = owned(dtype=dtype)
    codes, centroids, hashed = reference(table)
    before = table.codes.clone()
    MANAGER.change(table)
    assert torch.equal(table.codes.long(), codes)
    assert not torch.equal(table.codes, before)
    assert torch.equal(table.parameters["codebooks"][: M * K], centroids)
    torch.testing.assert_close(table.parameters["codebooks"][M * K :], hashed, rtol=1e-5, atol=1e-6)
    assert table.buffers["draw"].tolist() == [[5, 1]]


@pytest.mark.parametrize("rows", [1, 7, 64, N])
def test_ids_are_assigned_in_blocks_as_at_once(rows):
    whole, blocks = owned(), owned()
    MANAGER.change(whole)
    replace(MANAGER, block_rows=rows).change(blocks)
    assert torch.equal(whole.codes, blocks.codes)
    torch.testing.assert_close(blocks.parameters, whole.parameters, rtol=1e-6, atol=1e-7)


def test_hashes_are_drawn_anew_each_time_and_nothing_else_is_random():
    one, other = owned(), owned()
    draws = []
    for _ in range(3):
        draws.append(drawn_codes(torch.arange(N), one.buffers["draw"], M, K))
        MANAGER.change(one)
        MANAGER.change(other)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.parameters["codebooks"], other.parameters["codebooks"])
    for first, second in pairwise(draws):
        assert 0.05 < float((first == second).float().mean()) < 0.25  # 1 / K by chance


def test_a_bucket_without_ids_is_zeros():
    few = owned(num_ids=K)  # eight ids, of sixteen buckets
    MANAGER.change(few)
    hashed = few.parameters["codebooks"][M * K :]
    used = drawn_codes(torch.arange(K), few.buffers["draw"], M, K) + torch.tensor([0, K])
    empty = torch.ones(M * K, dtype=torch.bool)
    empty[used.flatten()] = False
    assert empty.any()
    assert torch.isfinite(hashed).all()
    assert not hashed[empty].any()


@pytest.mark.parametrize("state", ["mean", "reset"])
def test_what_becomes_of_the_optimizers_state(state):
    table = owned()
    before = {key: value.clone() for key, value in table.optimizer_state["codebooks"].items()}
    replace(MANAGER, state=state).change(table)
    for key, value in table.optimizer_state["codebooks"].items():
        for book, old in zip(value.split(K), before[key].split(K), strict=True):
            torch.testing.assert_close(book, old.mean(0).expand_as(old) if state == "mean" else torch.zeros_like(old))


def test_it_is_due_at_the_stated_steps():
    assert [step for step in range(20) if MANAGER.is_due(step)] == [2, 5, 8]
    assert not any(replace(MANAGER, until=0).is_due(step) for step in range(20))


def test_codewords_that_are_not_finite_are_refused_before_anything_is_written():
    table = owned()
    table.parameters["codebooks"][3, 1] = float("nan")
    codes, draw = table.codes.clone(), table.buffers["draw"].clone()
    with pytest.raises(ValueError, match="table 'item': codebooks must be finite to be clustered, got NaN or infinity"):
        MANAGER.change(table)
    assert torch.equal(table.codes, codes)
    assert torch.equal(table.buffers["draw"], draw)


def test_a_sample_stands_for_all_ids():
    ids, weights = MANAGER._sample(10_000_000, seed=3)
    assert torch.equal(ids, ids.unique())
    assert float(weights.sum()) == 65536
    assert 4.9e6 < float(ids.double().mean()) < 5.1e6
    again = MANAGER._sample(10_000_000, seed=3)
    assert torch.equal(ids, again[0])
    all_ids, ones = MANAGER._sample(N, seed=3)
    assert torch.equal(all_ids, torch.arange(N))
    assert bool((ones == 1).all())


def test_centroids_are_those_of_the_sample_as_it_was_drawn(monkeypatch):
    """An id that was drawn three times weighs three times as much, as where it stands there three times."""
    ids, times = torch.arange(0, N, 5), 1.0 + torch.arange(N // 5) % 3
    monkeypatch.setattr(Clustering, "_sample", lambda *_: (ids, times))
    table = owned()
    vectors, seed = served(table, table.codes, table.buffers["draw"])[ids], _seed(table.buffers["draw"], _KMEANS)
    expected = learn_product(vectors, M, K, weights=times, seed=seed)[1]
    assert not torch.equal(expected, learn_product(vectors, M, K, seed=seed)[1])
    MANAGER.change(table)
    assert torch.equal(table.parameters["codebooks"][: M * K], expected)


def test_weighted_residuals():
    sums = ResidualSums(1, 3, 2)
    sums.add(torch.tensor([[1.0, 0.0], [4.0, 2.0]]), torch.tensor([[1], [1]]), torch.tensor([2.0, 1.0]))
    sums.add(torch.tensor([[7.0, 7.0]]), torch.tensor([[2]]), torch.tensor([0.0]))
    torch.testing.assert_close(sums.means(), torch.tensor([[0.0, 0.0], [2.0, 2 / 3], [0.0, 0.0]]))
