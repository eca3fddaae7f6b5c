"""Hash embeddings: several hashes into one table of vectors, and weights that say what each is worth (1709.03933)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import (
    MethodConfig,
    TableData,
    TableDecoder,
    TableState,
    init_like,
    register,
    spread,
)
from torchrec_compress.methods.learned import LearnedWhole
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.methods.width import LANES
from torchrec_compress.ops import Rows, TableRows, gathered, hash_ids, pool_rows, pool_table, scale_rows, stable_salt

_MOST_HASHES = 16
_FIT_ROUNDS, _SWEEPS = 6, 4
_LEAST = 1e-12  # squared, of vectors that a weight is fitted to
_LANE_SALT = 0x1A9E  # of the place of hashed weights in a row, for all tables and seeds


@register
@dataclass(frozen=True, kw_only=True)
class HashEmbeddingsConfig(MethodConfig):
    """Store `num_buckets` vectors and k weights per id: row(i) = sum of p_ij E[h_j(i)] over k hashes.

    An id learns which of its vectors to trust, so that what it shares with a frequent one does it little harm.

    Bytes: 4 (B D + k N), with hashed weights 4 (B D + k W).

    Args:
        num_buckets: vectors, B.
        num_hashes: hashes, and weights per id, k, from 2 to 16; with one alone it would be `MEmComConfig`.
        num_weights: sets of weights, W; an id is hashed to one, as in the paper, and nothing is stored per id. None:
            every id has its own.

    Weights lie in native rows of a multiple of 4 numbers, those of two ids in a row where k is 2; a row-wise optimizer
    shares its state among them, an element-wise one is exact. They start at 1 / sqrt(k), and l2 leaves them alone.

    Example:
        >>> HashEmbeddingsConfig(num_buckets=1000).to_dict()
        {'method': 'hash_embeddings', 'num_buckets': 1000, 'num_hashes': 2, 'num_weights': None}
    """

    method: ClassVar[str] = "hash_embeddings"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the mean direction of its vectors; with hashed weights as another id of its weights"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "all"
    num_buckets: int
    num_hashes: int = 2
    num_weights: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a number of hashes that no table can have."""
        super().__post_init__()
        if not 2 <= self.num_hashes <= _MOST_HASHES:
            raise ValueError(
                f"hash_embeddings: num_hashes must be in [2, {_MOST_HASHES}], got {self.num_hashes}; with one, choose "
                "the method memcom"
            )

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless there are vectors, and no more of them, or of weights, than ids."""
        super().check(table)
        where = f"table {table.name!r}"
        if not 1 <= self.num_buckets <= table.num_embeddings:
            raise ValueError(f"{where}: num_buckets must be in [1, {table.num_embeddings}], got {self.num_buckets}")
        if self.num_weights is not None and not 1 <= self.num_weights < table.num_embeddings:
            raise ValueError(
                f"{where}: num_weights must be in [1, {table.num_embeddings}), got {self.num_weights}; leave it out "
                "for weights of every id"
            )

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are as many ids as vectors, and more than sets of weights."""
        return self.num_buckets <= table.num_embeddings and (self.num_weights or 0) < table.num_embeddings

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of vectors."""
        return (replace(self, num_buckets=number) for number in spread(table.num_embeddings))

    def smaller(self, level: int) -> HashEmbeddingsConfig:
        """Return the same with half the vectors, a quarter, and so on."""
        return replace(self, num_buckets=max(1, self.num_buckets >> (level + 1)))

    @property
    def _sets_in_row(self) -> int:
        """Sets of weights that lie in a native row."""
        return LANES // math.gcd(LANES, self.num_hashes)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return k ways into the vectors, which are one native table, and the weights."""
        start, name = partial(_start, table), f"{table.name}__vectors"
        size = (self.num_buckets, table.embedding_dim)
        vectors = [
            NativePart(f"vector_{j}", *size, remap, start, data_type=native_type(table), shared=name)
            for j, remap in enumerate(self._hashes(table, seed))
        ]
        in_row = self._sets_in_row
        num_rows = -(-(self.num_weights or table.num_embeddings) // in_row)
        remap = Remap("div", in_row) if self.num_weights is None else self._weights_hash(table, seed, num_rows)
        fill = partial(nn.init.constant_, val=self.num_hashes**-0.5)
        # l2 towards 0 would shrink whole rows away
        weights = NativePart("weights", num_rows, in_row * self.num_hashes, remap, fill, decay=False)
        return Parts(rows=(*vectors, weights))

    def _hashes(self, table: BaseEmbeddingConfig, seed: int) -> list[Remap]:
        names = [f"{table.name}:{j}" for j in range(self.num_hashes)]
        return [Remap("hash", self.num_buckets, stable_salt(seed, name)) for name in names]

    def _weights_hash(self, table: BaseEmbeddingConfig, seed: int, num_rows: int) -> Remap:
        return Remap("hash", num_rows, stable_salt(seed, f"{table.name}:weights"))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> WeightedSum:
        """Return the weighted sum."""
        return WeightedSum(self.num_hashes, self._sets_in_row, self.num_weights is not None)

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Find vectors and weights in turn, weighted by counts, each step nearer to the rows.

        Raises:
            ValueError: rows are a sample: what the ids of a vector have in common is found from all of them.
        """
        self.check_fit(table, data)
        rows, ids = data.all_rows(table), torch.arange(table.num_embeddings)
        lookups = torch.ones(len(rows)) if data.counts is None else data.counts.float().clamp(min=1e-3)
        *ways, stored = self.parts(table, data.seed).rows
        sets = _places(ids, stored.remap(ids), self._sets_in_row, self.num_weights is not None)
        num_sets = stored.num_embeddings * self._sets_in_row
        numbers = [way.remap(ids) for way in ways]
        vectors, weights = _alternate(rows, lookups, numbers, self.num_buckets, sets, num_sets)
        native = dict.fromkeys((way.name for way in ways), vectors)
        state = TableState(native={**native, "weights": weights.view(stored.num_embeddings, -1)})
        return LearnedWhole(table, state, self.parts(table, data.seed).native)


@torch.no_grad()
def _start(table: BaseEmbeddingConfig, weight: Tensor) -> None:
    """Initialise vectors in place: k of them, weighted, have the spread of the user's table."""
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)


def _alternate(
    rows: Tensor, lookups: Tensor, numbers: list[Tensor], num_buckets: int, sets: Tensor, num_sets: int
) -> tuple[Tensor, Tensor]:
    """Return vectors, (B, D), and weights, (sets, k).

    Args:
        rows: (N, D) float32.
        lookups: (N,) weights of the squared errors.
        numbers: k of (N,) int64, the vectors of every id.
        num_buckets: B.
        sets: (N,) int64, the set of weights of every id.
        num_sets: of weights.
    """
    vectors = rows.new_zeros(num_buckets, rows.shape[1])
    weights = rows.new_full((num_sets, len(numbers)), len(numbers) ** -0.5)
    for _ in range(_FIT_ROUNDS):
        for _ in range(_SWEEPS):
            vectors += _better_vectors(rows, vectors, lookups, numbers, weights[sets])
        left = rows - _served(vectors, numbers, weights[sets])
        for j, mine in enumerate(numbers):
            found = vectors[mine]
            norms = weights.new_zeros(num_sets).index_add_(0, sets, lookups * found.square().sum(1))
            shares = weights.new_zeros(num_sets).index_add_(0, sets, lookups * (left * found).sum(1))
            # a weight of zeros stays: were it 0 too, neither would ever get a gradient
            change = torch.where(norms < _LEAST, 0.0, shares / norms.clamp(min=_LEAST))
            weights[:, j] += change
            left -= change[sets].unsqueeze(1) * found
    return vectors, weights


def _served(vectors: Tensor, numbers: list[Tensor], weights: Tensor) -> Tensor:
    """Return the rows that ids are served, (N, D); `weights` are theirs, (N, k)."""
    return sum((vectors[mine] * weights[:, j, None] for j, mine in enumerate(numbers)), vectors.new_zeros(()))


def _better_vectors(rows: Tensor, vectors: Tensor, lookups: Tensor, numbers: list[Tensor], weights: Tensor) -> Tensor:
    """Return a step of all vectors at once, a k-th of what each would take alone, so that together they err less."""
    left, step, squares = (
        rows - _served(vectors, numbers, weights),
        torch.zeros_like(vectors),
        rows.new_zeros(len(vectors)),
    )
    for j, mine in enumerate(numbers):
        factors = lookups * weights[:, j]
        step.index_add_(0, mine, left * factors.unsqueeze(1))
        squares.index_add_(0, mine, factors * weights[:, j])
    return step / (len(numbers) * squares.clamp(min=_LEAST)).unsqueeze(1)


def _places(ids: Tensor, rows: Tensor, sets_in_row: int, is_hashed: bool) -> Tensor:
    """Return the set of weights of ids, (L,) int64, that lie in these native rows."""
    lanes = hash_ids(ids, sets_in_row, _LANE_SALT) if is_hashed else ids % sets_in_row
    return rows.long() * sets_in_row + lanes


class WeightedSum(TableDecoder):
    """Add the vectors of an id by its weights, and pool.

    Args:
        num_hashes: k.
        sets_in_row: sets of weights that lie in a native row.
        is_hashed: whether an id is hashed to its weights.
    """

    def __init__(self, num_hashes: int, sets_in_row: int, is_hashed: bool) -> None:
        super().__init__()
        self._num_hashes, self._sets_in_row, self._is_hashed = num_hashes, sets_in_row, is_hashed

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are k of (L, D), then the weights, (L, sets in a row * k)."""
        return pool_weighted(ids, offsets, weights, rows, self._num_hashes, self._sets_in_row, self._is_hashed)


@torch.fx.wrap
def pool_weighted(
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    rows: list[Rows],
    num_hashes: int,
    sets_in_row: int,
    is_hashed: bool,
) -> Tensor:
    """Return the sums over bags, (B, D); arguments as in `WeightedSum`."""
    *vectors, stored = rows
    if isinstance(stored, TableRows):  # F.embedding's gradient of a few values takes far longer
        places = _places(ids, stored.numbers, sets_in_row, is_hashed)
        factors = stored.weight.reshape(-1, num_hashes).index_select(0, places)
    else:
        lanes = _places(ids, torch.zeros_like(ids), sets_in_row, is_hashed)
        each = lanes[:, None, None].expand(-1, 1, num_hashes)
        factors = stored.unflatten(1, (sets_in_row, num_hashes)).gather(1, each).squeeze(1)
    tables = [found for found in vectors if isinstance(found, TableRows)]
    if offsets is not None and len(tables) == len(vectors):
        return _pool_in_place(offsets, weights, tables, factors)
    found = gathered(vectors)
    embeddings = sum((row * factors[:, j, None] for j, row in enumerate(found[1:], 1)), found[0] * factors[:, :1])
    return pool_rows(embeddings, offsets, weights)


def _pool_in_place(offsets: Tensor, weights: Tensor | None, tables: list[TableRows], factors: Tensor) -> Tensor:
    """Pool vectors that are never gathered: all k of an id lie in one table."""
    if weights is not None:
        factors = scale_rows(factors, weights, "hash_embeddings")
    numbers = torch.stack([table.numbers for table in tables], dim=1)
    return pool_table(TableRows(tables[0].weight, numbers.flatten()), offsets * len(tables), factors.flatten())
