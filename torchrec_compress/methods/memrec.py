"""MEM-REC: a few hashed tokens an id, and a weight that is hashed too, of two tables for all features (2305.07205)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.methods.base import MethodConfig, TableData, TableDecoder, TableState, register, spread
from torchrec_compress.methods.learned import LearnedWhole
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.methods.width import LANES
from torchrec_compress.ops import Rows, TableRows, gathered, hash_ids, pool_rows, pool_table, scale_rows, stable_salt

_MOST_HASHES = 16
_FIT_ROUNDS, _SWEEPS = 6, 4
_LEAST = 1e-12


@register
@dataclass(frozen=True, kw_only=True)
class MemRecConfig(MethodConfig):
    """Store tokens and weights for all tables: row(i) = a_i (T[h_1(i)] + ... + T[h_k(i)]), a_i = w[g_1(i)] + ....

    Two Bloom filters say, of a feature and an id, which tokens and which weights are theirs; the weight tells apart ids
    whose tokens are alike. Nothing is stored per id.

    From the paper (its abstract, and z = a M phi as third parties print it; its text was not at hand) and Intel's
    published program: two tables for all features, a token summed over k hashes, a scalar summed over k_w hashes,
    their product. Ours: hashes; a token that two hashes of an id pick counts twice, where a Bloom filter would set one
    bit; weights lie four to a row, start so that an id has the spread of a full row, where the program draws them
    around zero, and l2 leaves them alone; bags of several ids, which are sums of such rows; the fit.

    Bytes: 4 T D + 4 W, once for all tables that share them.

    Args:
        num_tokens: rows of the token table, T.
        num_hashes: tokens of an id, k, from 1 to 16.
        num_weights: scalars of the weight table, W, rounded up to a multiple of 4. None: as many as tokens.
        num_weight_hashes: scalars of an id, k_w, from 1 to 16.
        memory: name of the token table, and before "_weights" of the other; tables that give one name share both, and
            agree in width and sizes. None: the table's own. No fit of one table fills what others read.
        bound: tokens start uniform in [-bound, bound], whatever their tables say of their start. None: as TorchRec
            starts a table of its size; then tables must not say how they start.

    Example:
        >>> MemRecConfig(num_tokens=1000).to_dict()  # doctest: +NORMALIZE_WHITESPACE
        {'method': 'memrec', 'num_tokens': 1000, 'num_hashes': 2, 'num_weights': None, 'num_weight_hashes': 1,
         'memory': 'memrec', 'bound': None}
    """

    method: ClassVar[str] = "memrec"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "tokens and a weight that others trained"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "all"
    num_tokens: int
    num_hashes: int = 2
    num_weights: int | None = None
    num_weight_hashes: int = 1
    memory: str | None = "memrec"
    bound: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that no table can have, and a name that is no text."""
        super().__post_init__()
        for name, number in (("num_hashes", self.num_hashes), ("num_weight_hashes", self.num_weight_hashes)):
            if not 1 <= number <= _MOST_HASHES:
                raise ValueError(f"memrec: {name} must be in [1, {_MOST_HASHES}], got {number}")
        if not isinstance(self.memory, str | None):
            raise ValueError(f"memrec: memory must be a name or None, got {self.memory!r}")

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless there are tokens, weights and a start."""
        super().check(table)
        where = f"table {table.name!r}"
        for name, number in (("num_tokens", self.num_tokens), ("num_weights", self._weights)):
            if number < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {number}")
        most = 65504.0 if table.data_type == DataType.FP16 else 1e18
        if self.bound is not None and not 0 < self.bound <= most:
            raise ValueError(
                f"{where}: bound must be in (0, {most:g}], got {self.bound:g}; leave it out for TorchRec's own"
            )

    @property
    def _weights(self) -> int:
        return self.num_tokens if self.num_weights is None else self.num_weights

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of tokens."""
        return (replace(self, num_tokens=number) for number in spread(table.num_embeddings))

    def smaller(self, level: int) -> MemRecConfig:
        """Return half the tokens, a quarter, and so on, of its own: others would not want theirs halved."""
        return replace(self, num_tokens=max(1, self.num_tokens >> (level + 1)), memory=None)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return k ways into the tokens and k_w into the weights."""
        name = f"{table.name}__memory" if self.memory is None else self.memory
        start = None if self.bound is None else _Start(-self.bound, self.bound)
        size, kind = (self.num_tokens, table.embedding_dim), native_type(table)
        tokens = [
            NativePart(f"token_{j}", *size, self._hash(table, seed, f"token {j}", size[0]), start, True, kind, name)
            for j in range(self.num_hashes)
        ]
        rows, value = -(-self._weights // LANES), 1 / (self.num_weight_hashes * self.num_hashes**0.5)
        weights = [
            NativePart(
                f"weight_{j}",
                rows,
                LANES,
                self._hash(table, seed, f"weight {j}", rows),
                _Start(value, value),
                decay=False,  # l2 towards 0 would shrink whole rows away
                shared=f"{name}_weights",
            )
            for j in range(self.num_weight_hashes)
        ]
        return Parts(rows=(*tokens, *weights))

    def _hash(self, table: BaseEmbeddingConfig, seed: int, way: str, number: int) -> Remap:
        return Remap("hash", number, stable_salt(seed, f"{table.name}:{way}"))

    def _lane_salts(self, table: BaseEmbeddingConfig) -> list[int]:
        """Return the salts of the places of weights in their rows; no seed changes them."""
        return [stable_salt(0, f"{table.name}:lane {j}") for j in range(self.num_weight_hashes)]

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> WeighedTokens:
        """Return the weighed sum."""
        return WeighedTokens(self.num_hashes, self._lane_salts(table))

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Find tokens and weights in turn, weighted by counts, each step nearer to the rows.

        Raises:
            ValueError: rows are a sample: what the ids of a token have in common is found from all of them.
        """
        self.check_fit(table, data)
        rows, ids, parts = data.all_rows(table), torch.arange(table.num_embeddings), self.parts(table, data.seed)
        counts = torch.ones(len(rows)) if data.counts is None else data.counts.float().clamp(min=1e-3)
        tokens, stored = parts.rows[: self.num_hashes], parts.rows[self.num_hashes :]
        picks = torch.stack([part.remap(ids) for part in tokens], dim=1)
        places = torch.stack(
            [_place(part.remap(ids), ids, salt) for part, salt in zip(stored, self._lane_salts(table), strict=True)],
            dim=1,
        )
        weights = torch.full((stored[0].num_embeddings * LANES,), 1 / (places.shape[1] * picks.shape[1] ** 0.5))
        found = _alternate(rows, counts, picks, self.num_tokens, places, weights)
        native = dict.fromkeys((part.name for part in tokens), found)
        native |= dict.fromkeys((part.name for part in stored), weights.view(-1, LANES))
        return LearnedWhole(table, TableState(native=native), parts.native)


@dataclass(frozen=True)
class _Start:
    """Initialise rows in place, uniform; a value, so that tables that share them agree."""

    low: float
    high: float

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.uniform_(weight, self.low, self.high)


def _place(rows: Tensor, ids: Tensor, salt: int) -> Tensor:
    """Return which weights ids have, (L,) int64, of those in these rows, (L,)."""
    return rows.long() * LANES + hash_ids(ids, LANES, salt)


def _alternate(rows: Tensor, counts: Tensor, picks: Tensor, num_tokens: int, places: Tensor, weights: Tensor) -> Tensor:
    """Return the tokens, (T, D), and write their weights over `weights`, (W,).

    Args:
        rows: (N, D) float32.
        counts: (N,) of the squared errors.
        picks, places: (N, k) and (N, k_w) int64, the tokens and weights of every id.
        num_tokens: T.
        weights: as they start.
    """
    tokens = rows.new_zeros(num_tokens, rows.shape[1])
    for _ in range(_FIT_ROUNDS):
        for _ in range(_SWEEPS):  # of all tokens at once, a k-th of what each would take alone
            factors = weights[places].sum(1)
            left = (rows - factors.unsqueeze(1) * tokens[picks].sum(1)) * (counts * factors).unsqueeze(1)
            step, squares = torch.zeros_like(tokens), rows.new_zeros(num_tokens)
            for mine in picks.T:
                step.index_add_(0, mine, left)
                squares.index_add_(0, mine, counts * factors.square())
            tokens += step / (picks.shape[1] * squares.clamp(min=_LEAST)).unsqueeze(1)
        sums = tokens[picks].sum(1)
        for mine in places.T:
            left = rows - weights[places].sum(1).unsqueeze(1) * sums
            shares = torch.zeros_like(weights).index_add_(0, mine, counts * (left * sums).sum(1))
            norms = torch.zeros_like(weights).index_add_(0, mine, counts * sums.square().sum(1))
            # a weight of zeros stays: were it 0 too, neither would ever get a gradient
            weights += torch.where(norms < _LEAST, 0.0, shares / (places.shape[1] * norms.clamp(min=_LEAST)))
    return tokens


class WeighedTokens(TableDecoder):
    """Add the tokens of an id, times the sum of its weights, and pool.

    Args:
        num_hashes: k.
        lane_salts: of the places of weights in their rows.
    """

    def __init__(self, num_hashes: int, lane_salts: list[int]) -> None:
        super().__init__()
        self._num_hashes, self._lane_salts = num_hashes, lane_salts

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are k of (L, D), then k_w of (L, 4)."""
        return pool_weighed(ids, offsets, weights, rows, self._num_hashes, self._lane_salts)


@torch.fx.wrap
def pool_weighed(
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    rows: list[Rows],
    num_hashes: int,
    lane_salts: list[int],
) -> Tensor:
    """Return the sums over bags, (B, D); arguments as in `WeighedTokens`."""
    picked = zip(rows[num_hashes:], lane_salts, strict=True)
    factors = torch.stack([_weight_of(ids, stored, salt) for stored, salt in picked]).sum(0).unsqueeze(1)
    tables = [found for found in rows[:num_hashes] if isinstance(found, TableRows)]
    if offsets is not None and len(tables) == num_hashes:  # all tokens of an id lie in one table: they are not gathered
        if weights is not None:
            factors = scale_rows(factors, weights, "memrec")
        numbers = torch.stack([table.numbers for table in tables], dim=1)
        each = factors.expand(-1, num_hashes).flatten()
        return pool_table(TableRows(tables[0].weight, numbers.flatten()), offsets * num_hashes, each)
    return pool_rows(torch.stack(gathered(rows[:num_hashes])).sum(0) * factors, offsets, weights)


def _weight_of(ids: Tensor, stored: Rows, salt: int) -> Tensor:
    """Return a weight of every id, (L,) float32, of its row, (L, 4), or where that is."""
    if isinstance(stored, TableRows):  # F.embedding's gradient of a few values takes far longer
        return stored.weight.reshape(-1).index_select(0, _place(stored.numbers, ids, salt))
    return stored.gather(1, hash_ids(ids, LANES, salt).long().unsqueeze(1)).squeeze(1)
