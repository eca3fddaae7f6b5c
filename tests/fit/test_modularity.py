"""Clusters by modularity: planted ones are found, no move or merge of what is found would gain, order is no matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrec_compress.fit import modularity
from torchrec_compress.fit.modularity import Clusters, Graph, cluster_order, find_clusters, merge_clusters


def compact(ids: Tensor, contexts: Tensor) -> Graph:
    """Return the graph of distinct pairs; nodes are numbered in ascending order of their ids."""
    key = torch.unique(ids * 10**6 + contexts)
    left, left_place = torch.unique(key // 10**6, return_inverse=True)
    right, right_place = torch.unique(key % 10**6, return_inverse=True)
    return Graph(left_place, right_place, len(left), len(right))


def planted(num_groups: int = 20, own: float = 0.6, seed: int = 0) -> Graph:
    """Nodes i of group i % num_groups, with edges to 15 nodes of their group and to any."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40 * num_groups, (600 * num_groups,), generator=generator)
    near = torch.randint(0, 15, ids.shape, generator=generator) + 15 * (ids % num_groups)
    anywhere = torch.randint(0, 15 * num_groups, ids.shape, generator=generator)
    return compact(ids, torch.where(torch.rand(ids.shape, generator=generator) < own, near, anywhere))


def scattered(seed: int) -> Graph:
    """Few edges without any order, and of uneven nodes."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(2, 120, generator=generator).square()
    return compact((draw[0] * 40).long(), (draw[1] * 30).long())


def reference(graph: Graph, left: Tensor, right: Tensor) -> float:
    """Return the modularity by its definition: a sum over all pairs of nodes."""
    edges = torch.zeros(graph.num_left, graph.num_right, dtype=torch.float64)
    edges[graph.left, graph.right] = 1
    chance = edges.sum(dim=1)[:, None] * edges.sum(dim=0) / edges.sum()
    return float(((edges - chance) * (left[:, None] == right)).sum() / edges.sum())


def merged(graph: Graph, clusters: Clusters, salt: int = 0) -> tuple[Tensor, Tensor]:
    left, right = clusters.left, clusters.right
    for to in merge_clusters(graph, clusters, salt):
        left, right = to[left], to[right]
    return left, right


@pytest.mark.parametrize("seed", range(5))
def test_no_node_could_move_to_a_neighbours_cluster_and_gain(seed: int) -> None:
    graph = scattered(seed)
    found = find_clusters(graph, salt=seed)
    best = reference(graph, found.left, found.right)
    assert found.modularity(graph) == pytest.approx(best, abs=1e-12) and best > 0.2
    for side, other, mine, ends in ((0, 1, graph.left, graph.right), (1, 0, graph.right, graph.left)):
        for node in range((graph.num_left, graph.num_right)[side]):
            for cluster in found[other][ends[mine == node]].unique():
                moved = [found.left.clone(), found.right.clone()]
                moved[side][node] = cluster
                assert reference(graph, *moved) <= best + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_no_two_clusters_could_merge_and_gain(seed: int) -> None:
    graph = scattered(seed)
    found = find_clusters(graph, salt=seed)
    left, right = merged(graph, found)
    best = reference(graph, left, right)
    assert best >= found.modularity(graph) - 1e-12
    names = left.unique()
    assert len(names) < len(found.left.unique())
    for one in names:
        for other in names[names > one]:
            tried = [torch.where(side == one, other, side) for side in (left, right)]
            assert reference(graph, *tried) <= best + 1e-12


def test_edges_at_clusters_are_counted() -> None:
    graph = scattered(0)
    found = find_clusters(graph, salt=0)
    for side, mine, counted in ((found.left, graph.left, found[2]), (found.right, graph.right, found[3])):
        assert torch.equal(counted, torch.bincount(side[mine], minlength=graph.num_left).double())


def test_planted_groups_are_found_and_lie_together() -> None:
    graph = planted(own=0.7)
    assert graph.num_left == 800
    group = torch.arange(800) % 20
    left, _ = merged(graph, find_clusters(graph, salt=3), salt=3)
    assert len(left.unique()) == 20 == len(torch.stack([left, group]).unique(dim=1).T)
    for part in cluster_order(graph, salt=3).view(20, 40):
        assert len(group[part].unique()) == 1


def test_parts_of_a_cluster_are_those_that_it_was_merged_of() -> None:
    # 10 groups of 4 groups each: what lies together is of one group in parts of any size
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(800).repeat_interleave(30)
    small, large = ids % 40, ids % 10
    near = torch.randint(0, 15, ids.shape, generator=generator) + 15 * small
    wide = torch.randint(0, 60, ids.shape, generator=generator) + 1000 + 60 * large
    graph = compact(ids, torch.where(torch.rand(ids.shape, generator=generator) < 0.6, near, wide))
    order = cluster_order(graph, salt=1)
    for parts, modulus in ((order.view(40, 20), 40), (order.view(10, 80), 10)):
        assert all(len((part % modulus).unique()) == 1 for part in parts)


def test_the_order_of_edges_is_no_matter_and_the_salt_is() -> None:
    graph = planted(own=0.4)
    order = cluster_order(graph, salt=5)
    assert torch.equal(order.sort().values, torch.arange(graph.num_left))
    shuffled = torch.randperm(len(graph.left), generator=torch.Generator().manual_seed(1))
    again = Graph(graph.left[shuffled], graph.right[shuffled], graph.num_left, graph.num_right)
    assert torch.equal(cluster_order(again, salt=5), order)
    assert not torch.equal(cluster_order(graph, salt=6), order)


@pytest.mark.parametrize("current", [0, 1])
def test_of_equally_good_clusters_a_node_keeps_its_own(current: int) -> None:
    nodes, degrees, volumes = torch.tensor([0, 0]), torch.tensor([2.0]).double(), torch.tensor([3.0, 3.0]).double()
    for salt in range(5):
        found = modularity._best(nodes, torch.tensor([0, 1]), degrees, volumes, torch.tensor([current]), salt)
        assert found.tolist() == [current]


def test_one_cluster_is_one_cluster() -> None:
    graph = Graph(torch.arange(50), torch.zeros(50, dtype=torch.int64), 50, 1)
    found = find_clusters(graph, salt=0)
    assert len(found.left.unique()) == 1 and found.modularity(graph) == 0 and merge_clusters(graph, found, 0) == []
    assert torch.equal(cluster_order(graph, salt=0).sort().values, torch.arange(50))


def test_turns_and_merges_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modularity, "_MOST_TURNS", 1)
    monkeypatch.setattr(modularity, "_MOST_MERGES", 1)
    graph = planted()
    found = find_clusters(graph, salt=0)
    assert len(merge_clusters(graph, found, salt=0)) == 1 and found.modularity(graph) > 0
