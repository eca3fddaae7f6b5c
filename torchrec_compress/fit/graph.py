"""Graph codes: clusters of the graph of ids and contexts, from a stream of pairs (GraphHash, arXiv 2412.17245)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrec_compress.fit.codes import HashEncoder, SeenEncoder
from torchrec_compress.fit.contexts import NEVER, ContextSketch
from torchrec_compress.fit.modularity import Graph, cluster_order
from torchrec_compress.ops import hash_ids

_SALT_STEP = 7919
_BITS = 31  # of a hash
_ROWS_AT_ONCE = 2**12
_MOST_CUTS = 100
EDGE_BYTES = 190  # of an edge while clusters are found, at most as measured: both ends, sorted pairs, scores, ties


@dataclass(eq=False)
class GraphSketch(ContextSketch):
    """Of the contexts that each id occurred with, those of the least hashes: a bounded graph of any number of pairs.

    One hash for all ids, so what two ids have in common is kept of both. A context is known by its hash of 31 bits. A
    pair counts once, however often it comes, in whatever order and batches. Memory: 4 N C bytes, and a few MB (up to
    1 MB a context kept) while pairs are added.

    Args:
        num_rows: N, ids.
        num_contexts: C, contexts that are kept of each.
        salt: of the hash.
        where: names it in errors; sketches of a method name their table.

    Attributes:
        kept: (N, C) int32, hashes, ascending; 2**31 - 1 where there are no more.

    Raises:
        ValueError: sizes that are no sizes.

    Example:
        >>> sketch = GraphSketch(num_rows=3, num_contexts=2, salt=0)
        >>> sketch.add(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 8, 5, 8]))
        >>> (sketch.kept < 2**31 - 1).sum(dim=1).tolist(), bool(torch.isin(sketch.kept[1, 0], sketch.kept[0]))
        ([2, 1, 0], True)
    """

    num_rows: int
    num_contexts: int
    salt: int
    where: str = "GraphSketch"
    kept: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin without pairs, or raise ValueError for sizes that are none."""
        self._check_sizes("num_rows", "num_contexts")
        self.kept = torch.full((self.num_rows, self.num_contexts), NEVER, dtype=torch.int32)

    def _take(self, ids: Tensor, contexts: Tensor) -> None:
        self._keep_least(ids, hash_ids(contexts, NEVER, self.salt))

    def join(self, kept: Tensor) -> None:
        """Take what another sketch of the same sizes and salt has seen, such as that of another rank.

        Args:
            kept: (N, C) int32, its own.

        Raises:
            ValueError: they are of another shape or dtype.
        """
        kept = self._check_joined("kept", kept)
        for first in range(0, self.num_rows, _ROWS_AT_ONCE):
            some = kept[first : first + _ROWS_AT_ONCE]
            row, place = (some != NEVER).nonzero(as_tuple=True)
            self._keep_least(row + first, some[row, place].long())

    @property
    def is_empty(self) -> bool:
        """Whether no pair was added yet."""
        return not bool((self.kept[:, 0] != NEVER).any())

    def graph(self) -> tuple[Tensor, Graph]:
        """Return the ids that were in a pair, (S,) int64 ascending, and the edges between their places and contexts."""
        ids = (self.kept[:, 0] != NEVER).nonzero().squeeze(1)
        left, place = (self.kept[ids] != NEVER).nonzero(as_tuple=True)
        hashes, right = torch.unique(self.kept[ids[left], place], return_inverse=True)
        return ids, Graph(left, right, len(ids), len(hashes))

    def _keep_least(self, ids: Tensor, hashes: Tensor) -> None:
        """Put hashes, (P,) int64, among those of their ids, (P,) int64, and keep the least of each."""
        new = hashes < self.kept[ids, -1]
        ids, hashes = ids[new], hashes[new]
        rows = ids.unique()
        for some in rows.split(_ROWS_AT_ONCE):
            mine = (ids >= some[0]) & (ids <= some[-1]) if len(some) < len(rows) else slice(None)
            old = some[:, None] << _BITS | self.kept[some].long()
            keys = torch.cat([old.flatten(), ids[mine] << _BITS | hashes[mine]]).unique()
            owner = torch.searchsorted(some, keys >> _BITS)
            first = torch.searchsorted(owner, torch.arange(len(some)))
            rank = torch.arange(len(keys)) - first[owner]
            stays = rank < self.num_contexts
            self.kept[some[owner[stays]], rank[stays]] = (keys[stays] & NEVER).to(torch.int32)


def learn_graph_codes(
    sketch: GraphSketch, others: HashEncoder, num_clusterings: int, counts: Tensor | None = None
) -> SeenEncoder:
    """Code ids by clusters of the graph, and so that those of one cluster differ.

    Codes that are clusters are parts of one order of all ids, see `fit.modularity`: of equally many look-ups, of which
    an id counts at most one part's, or without counts of equally many ids (sizes differ by at most one). A code that
    follows numbers the ids that have all former codes in common, from a number drawn for them, in a drawn order: they
    share it only where they are more than K. So two ids share all codes only where more than K^(codes that follow) are
    in one cluster. Ids without contexts have hashed codes.

    Args:
        sketch: has seen pairs.
        others: codes of ids without; its sizes are those of all codes.
        num_clusterings: codes that are clusters, the first ones.
        counts: (N,) look-ups per id, or None. An id with contexts counts at least one.

    Returns:
        The encoder.

    Example:
        >>> sketch = GraphSketch(num_rows=4, num_contexts=8, salt=0)
        >>> sketch.add(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))
        >>> encoder = learn_graph_codes(sketch, HashEncoder(2, 2, 0, 2), num_clusterings=1)
        >>> codes = encoder(torch.arange(4), None)
        >>> codes[0, 0] == codes[1, 0], codes[2, 0] == codes[3, 0], len(codes.unique(dim=0))
        (tensor(True), tensor(True), 4)
    """
    ids, graph = sketch.graph()
    weights = torch.ones(len(ids)).double() if counts is None else counts[ids].double().clamp(min=1)
    codes = torch.empty(len(ids), others.num_codes, dtype=torch.int32)
    group = torch.zeros(len(ids), dtype=torch.int64)
    for m in range(others.num_codes):
        size = others.codebook_size if m else others.first_size
        salt = sketch.salt + _SALT_STEP * (m + 1)
        if m < num_clusterings:
            order = cluster_order(graph, salt)
            code = torch.empty_like(order).scatter_(0, order, _parts(weights[order], size))
        else:
            code = _numbered(group, ids, size, salt)
        codes[:, m] = code.to(torch.int32)
        group = torch.unique(group * size + code, return_inverse=True)[1]
    return SeenEncoder(ids, codes, others, others.first_size)


def _parts(weights: Tensor, size: int) -> Tensor:
    """Return numbers below `size`, ascending, that share the weights out evenly: (S,) float64 > 0 -> (S,) int64.

    A weight counts at most one part's, so none of them is left over where there are so many; fewer have one each.
    """
    if len(weights) < size:
        return torch.arange(len(weights)) * size // len(weights)
    ends = weights.cumsum(0)
    for _ in range(_MOST_CUTS):
        share = float(ends[-1]) / size
        if float(weights.max()) <= share:
            break
        weights = weights.clamp(max=share)  # which makes the share smaller again, and the next cut as well
        ends = weights.cumsum(0)
    return ((ends - weights / 2) * size / ends[-1]).long().clamp_(max=size - 1)


def _numbered(group: Tensor, ids: Tensor, size: int, salt: int) -> Tensor:
    """Return numbers below `size` that differ in a group where they can, (S,) int64, as of hashes everywhere else."""
    order = torch.argsort(hash_ids(ids, 2**62, salt), stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.bincount(group)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(ids)) - (sizes.cumsum(0) - sizes)[group[order]]
    return (rank + hash_ids(group, size, salt + 1)) % size
