"""Clusters of a bipartite graph by modularity, as one order of its nodes in which every cluster lies together.

Modularity of two sides (Barber, 2007) is the share of edges inside clusters less what it would be by chance; GraphHash
(arXiv 2412.17245) clusters ids and contexts by it. Here both sides take turns: with the clusters of one side fixed,
each node of the other takes the best of its neighbours' clusters, so no turn loses any. Then clusters merge, the most
connected for their size first. Merges are a tree, and its leaves in order can be cut into any number of equal parts.
Numbers are exact sums of integers and ties go by hashes, so neither the order of edges nor threads change a bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_compress.ops import hash_ids

_MOST_TURNS = 10
_MOST_MERGES = 64
_NO_RANK = 2**62


class Graph(NamedTuple):
    """Distinct edges between two sides, every node with one at least.

    Attributes:
        left, right: (E,) int64, from 0 to `num_left` - 1 and `num_right` - 1.
        num_left, num_right: nodes of each side.
    """

    left: Tensor
    right: Tensor
    num_left: int
    num_right: int


class Clusters(NamedTuple):
    """A cluster of every node, and the edges at them.

    Attributes:
        left, right: (num_left,), (num_right,) int64, names of clusters, in [0, num_left).
        left_edges, right_edges: (num_left,) float64, edges at a cluster's nodes of either side.
    """

    left: Tensor
    right: Tensor
    left_edges: Tensor
    right_edges: Tensor

    def modularity(self, graph: Graph) -> float:
        """Return the share of edges inside clusters less that by chance.

        Example:
            >>> graph = Graph(torch.tensor([0, 1]), torch.tensor([0, 1]), 2, 2)
            >>> find_clusters(graph, salt=0).modularity(graph)
            0.5
        """
        inside = float((self.left[graph.left] == self.right[graph.right]).sum())
        edges = len(graph.left)
        return inside / edges - float(self.left_edges @ self.right_edges) / edges**2


def find_clusters(graph: Graph, salt: int) -> Clusters:
    """Cluster both sides by turns, from a cluster of each left node alone; a turn sorts the edges once.

    Args:
        graph: the edges.
        salt: of the hashes that ties go by.

    Example:
        >>> two = Graph(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]), 4, 2)
        >>> found = find_clusters(two, salt=0).left
        >>> bool(found[0] == found[1]), bool(found[2] == found[3]), bool(found[0] == found[2])
        (True, True, False)
    """
    degrees = [torch.bincount(part).double() for part in (graph.left, graph.right)]
    left, right = torch.arange(graph.num_left), torch.full((graph.num_right,), -1)
    for _ in range(_MOST_TURNS):
        before = left, right
        volumes = _sums(left, degrees[0], graph.num_left)
        right = _best(graph.right, left[graph.left], degrees[1], volumes, right, salt)
        volumes = _sums(right, degrees[1], graph.num_left)
        left = _best(graph.left, right[graph.right], degrees[0], volumes, left, salt)
        if torch.equal(left, before[0]) and torch.equal(right, before[1]):
            break
    return Clusters(left, right, _sums(left, degrees[0], graph.num_left), _sums(right, degrees[1], graph.num_left))


def merge_clusters(graph: Graph, clusters: Clusters, salt: int) -> list[Tensor]:
    """Merge clusters where modularity gains, until it nowhere does.

    In each round a coin parts clusters into those that ask and those that are asked; who asks, asks whom it has the
    most edges with for what would be by chance, and joins it.

    Args:
        graph: the edges.
        clusters: of its nodes.
        salt: of coins and of the hashes that ties go by.

    Returns:
        By round, (num_left,) int64: the cluster that each cluster belongs to after it.

    Example:
        >>> star = Graph(torch.arange(3), torch.zeros(3, dtype=torch.int64), 3, 1)
        >>> merge_clusters(star, find_clusters(star, salt=0), salt=0)
        []
    """
    size, edges = graph.num_left, len(graph.left)
    one, other = clusters.left[graph.left], clusters.right[graph.right]
    weight = torch.ones(edges, dtype=torch.float64)
    at_left, at_right = clusters.left_edges, clusters.right_edges
    rounds, everyone = [], torch.arange(size)
    for number in range(_MOST_MERGES):
        pair, place = torch.unique(torch.minimum(one, other) * size + torch.maximum(one, other), return_inverse=True)
        weight, one, other = _sums(place, weight, len(pair)), pair // size, pair % size
        chance = (at_left[one] * at_right[other] + at_left[other] * at_right[one]) / edges
        apart = one != other
        gains = apart & (weight > chance)
        if not gains.any():
            break
        lift = (weight / chance)[gains]
        asks, asked = torch.cat([one[gains], other[gains]]), torch.cat([other[gains], one[gains]])
        coin = hash_ids(everyone, 2, salt + number)
        meets = (coin[asks] == 0) & (coin[asked] == 1)
        ties = hash_ids(asked[meets], _NO_RANK, salt)
        to = _largest(asks[meets], asked[meets], torch.cat([lift, lift])[meets], ties, everyone)
        rounds.append(to)
        at_left, at_right = _sums(to, at_left, size), _sums(to, at_right, size)
        one, other, weight = to[one[apart]], to[other[apart]], weight[apart]
    return rounds


def cluster_order(graph: Graph, salt: int) -> Tensor:
    """Return the left nodes so that clusters, and in each the clusters that it was merged of, lie together.

    Args:
        graph: the edges.
        salt: of the order of clusters, and of nodes in one.

    Returns:
        (num_left,) int64, nodes.

    Example:
        >>> two = Graph(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 1]), 4, 2)
        >>> sorted(sorted(half.tolist()) for half in cluster_order(two, salt=0).chunk(2))
        [[0, 2], [1, 3]]
    """
    clusters = find_clusters(graph, salt)
    name, names = torch.arange(graph.num_left), []
    for to in merge_clusters(graph, clusters, salt):
        name = to[name]
        names.append(name)
    order = _drawn(torch.arange(graph.num_left), salt)
    for each in names:  # from small clusters to those that they became: each sort keeps the order of the one before
        order = order[_drawn(each[order], salt)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(graph.num_left))
    nodes = _drawn(torch.arange(graph.num_left), salt + 1)
    return nodes[torch.argsort(place[clusters.left[nodes]], stable=True)]


def _drawn(values: Tensor, salt: int) -> Tensor:
    """Return the places of values, equal ones together and in order, others in an order that is drawn: (L,) int64."""
    return torch.argsort(hash_ids(values, _NO_RANK, salt), stable=True)


def _best(nodes: Tensor, clusters: Tensor, degrees: Tensor, volumes: Tensor, current: Tensor, salt: int) -> Tensor:
    """Return for each node the cluster among its neighbours' that gains the most modularity; of equal ones its own.

    Args:
        nodes, clusters: (E,) int64, by edge a node and the cluster at its other end.
        degrees: (nodes,) float64, edges of each node.
        volumes: (clusters,) float64, edges of each cluster's nodes of the other side.
        current: (nodes,) int64, where each is.
        salt: of the hashes that ties go by.
    """
    pair = nodes * len(volumes) + clusters
    pair, weight = torch.unique_consecutive(torch.from_numpy(np.sort(pair.numpy())), return_counts=True)
    node, cluster = pair // len(volumes), pair % len(volumes)
    gain = weight * len(nodes) - degrees[node] * volumes[cluster]
    ties = hash_ids(cluster, _NO_RANK, salt)
    return _largest(node, cluster, gain, torch.where(cluster == current[node], -1, ties), current)


def _largest(group: Tensor, choice: Tensor, score: Tensor, ties: Tensor, start: Tensor) -> Tensor:
    """Return each group's choice of the largest score, of several the one of the least tie; of none, its start."""
    top = torch.full(start.shape, -torch.inf, dtype=torch.float64).scatter_reduce_(0, group, score, "amax")
    some = score == top[group]
    group, choice, ties = group[some], choice[some], ties[some]
    least = torch.full(start.shape, _NO_RANK).scatter_reduce_(0, group, ties, "amin")
    some = ties == least[group]
    found = torch.full(start.shape, _NO_RANK).scatter_reduce_(0, group[some], choice[some], "amin")
    return torch.where(found == _NO_RANK, start, found)


def _sums(place: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sum of the values of each place, (size,) float64, exact for integers."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, place, values.double())
