"""MEmCom: hashed rows times a trainable scalar per id (arXiv 2203.10135)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import MethodConfig, TableData, TableDecoder, TableState, register, spread
from torchrec_compress.methods.buckets import BucketSums
from torchrec_compress.methods.learned import LearnedWhole
from torchrec_compress.methods.storage import NativePart, Parts, Remap, native_type
from torchrec_compress.ops import Rows, TableRows, gathered, pool_rows, pool_table, scale_rows

# FBGEMM wants row widths that are multiples of 4.
_LANES = 4
_FIT_ROUNDS = 8
_LEAST_NORM = 1e-12  # squared, of shared rows that scalars are fitted to


@register
@dataclass(frozen=True, kw_only=True)
class MEmComConfig(MethodConfig):
    """Store `num_buckets` shared rows and a multiplier per id: row(i) = U[i mod m] * v_i (+ b_i).

    Bytes: 4 (m D + N) packed, 4 (m D + 4 N) grouped; the bias adds another 4 N.

    Args:
        num_buckets: shared rows, m.
        scalars: "packed" is the paper's one scalar per id, four ids to a native row of width 4 (a row-wise optimizer
            then shares its state among the four; an element-wise one is exact). "grouped" is one scalar per quarter of
            the row: four times the bytes, strictly more expressive.
        bias: whether every id also has a trainable constant that is added to its whole row.

    Example:
        >>> MEmComConfig(num_buckets=1000).to_dict()
        {'method': 'memcom', 'num_buckets': 1000, 'scalars': 'packed', 'bias': False}
    """

    method: ClassVar[str] = "memcom"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the row of its bucket (scalar 1, bias 0)"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "all"
    num_buckets: int
    scalars: Literal["packed", "grouped"] = "packed"
    bias: bool = False

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless 1 <= num_buckets <= num_embeddings and, grouped, D is a multiple of 4."""
        super().check(table)
        if not 1 <= self.num_buckets <= table.num_embeddings:
            raise ValueError(
                f"table {table.name!r}: num_buckets must be in [1, {table.num_embeddings}], got {self.num_buckets}"
            )
        if self.scalars not in ("packed", "grouped"):
            raise ValueError(f"table {table.name!r}: scalars must be 'packed' or 'grouped', got {self.scalars!r}")
        if self.scalars == "grouped" and table.embedding_dim % _LANES:
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be a multiple of {_LANES} with grouped scalars, "
                f"got {table.embedding_dim}"
            )

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are as many rows as buckets."""
        return self.num_buckets <= table.num_embeddings

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of shared rows."""
        return (replace(self, num_buckets=number) for number in spread(table.num_embeddings))

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the shared rows, the scalars and, where asked for, the biases."""
        rows = [
            NativePart(
                "buckets",
                self.num_buckets,
                table.embedding_dim,
                Remap("mod", self.num_buckets),
                data_type=native_type(table),
            ),
            # they start at 1: l2 towards 0 would shrink whole rows away
            replace(self._per_id("scalars", table, nn.init.ones_, packed=self.scalars == "packed"), decay=False),
        ]
        if self.bias:
            rows.append(self._per_id("biases", table, nn.init.zeros_, packed=True))
        return Parts(rows=tuple(rows))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> MEmComDecoder:
        """Return the product of row and scalar."""
        return MEmComDecoder(self.scalars)

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Find the best rank-one rows of every bucket, weighted by counts, by alternating least squares.

        Ids of a bucket whose shared row is zero (below 1e-6 in norm) keep the scalar 1, so that it trains on.

        Raises:
            ValueError: rows are a sample: what a bucket's rows share is found from all of them.
        """
        self.check_fit(table, data)
        rows = data.all_rows(table)
        buckets = torch.arange(table.num_embeddings) % self.num_buckets
        weights = torch.ones(len(rows)) if data.counts is None else data.counts.float().clamp(min=1e-3)
        groups = 1 if self.scalars == "packed" else _LANES
        scalars = torch.ones(len(rows), groups)
        biases = rows.new_zeros(len(rows))
        means = BucketSums(self.num_buckets, table.embedding_dim)
        means.add(rows, buckets, weights)
        shared = means.means()
        for _ in range(_FIT_ROUNDS):
            target, mine = rows - biases.unsqueeze(1), shared[buckets]
            cut, cut_mine = target.view(len(rows), groups, -1), mine.view(len(rows), groups, -1)
            norms = cut_mine.square().sum(2)
            best = (cut * cut_mine).sum(2) / norms.clamp(min=_LEAST_NORM)
            # a factor of 0 on a row of zeros: neither would ever get a gradient
            scalars = torch.where(norms < _LEAST_NORM, 1.0, best)
            if self.bias:
                factor = scalars.repeat_interleave(mine.shape[1] // groups, dim=1)
                biases = (rows - mine * factor).mean(1)
            shared = self._best_rows(rows - biases.unsqueeze(1), scalars, buckets, weights)
        native = {"buckets": shared, "scalars": _pack(scalars) if groups == 1 else scalars}
        if self.bias:
            native["biases"] = _pack(biases.unsqueeze(1))
        return LearnedWhole(table, TableState(native=native), self.parts(table, data.seed).native)

    def _best_rows(self, target: Tensor, scalars: Tensor, buckets: Tensor, weights: Tensor) -> Tensor:
        """Return the shared rows that minimise the weighted error for given scalars: (m, D)."""
        factor = scalars.repeat_interleave(target.shape[1] // scalars.shape[1], dim=1)
        weighted = weights.unsqueeze(1) * factor
        zeros = target.new_zeros(self.num_buckets, target.shape[1])
        numerator = zeros.index_add(0, buckets, weighted * target)
        return numerator / zeros.index_add(0, buckets, weighted * factor).clamp(min=1e-12)

    def _per_id(self, name: str, table: BaseEmbeddingConfig, init_fn: object, packed: bool) -> NativePart:
        if packed:
            return NativePart(name, math.ceil(table.num_embeddings / _LANES), _LANES, Remap("div", _LANES), init_fn)  # type: ignore[arg-type]
        return NativePart(name, table.num_embeddings, _LANES, Remap(), init_fn)  # type: ignore[arg-type]


def _pack(values: Tensor) -> Tensor:
    """Lay one value per id out four to a row: (N, 1) -> (ceil(N / 4), 4), padded with zeros."""
    return nn.functional.pad(values.view(-1), (0, -len(values) % _LANES)).view(-1, _LANES)


class MEmComDecoder(TableDecoder):
    """Multiply the shared rows by the ids' scalars, add the biases, and pool."""

    def __init__(self, scalars: Literal["packed", "grouped"]) -> None:
        super().__init__()
        self._packed = scalars == "packed"

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are (L, D), (L, 4) and, with biases, (L, 4)."""
        return pool_scaled(ids, offsets, weights, rows, self._packed)


@torch.fx.wrap
def pool_scaled(
    ids: Tensor, offsets: Tensor | None, weights: Tensor | None, rows: list[Rows], is_packed: bool
) -> Tensor:
    """Return the sums over bags, (B, D); arguments as in `MEmComDecoder.forward`."""
    tables = [found for found in rows if isinstance(found, TableRows)]
    if is_packed and offsets is not None and len(tables) == len(rows):
        return _pool_in_place(ids, offsets, weights, tables)
    return pool_rows(_scale(ids, gathered(rows), is_packed), offsets, weights)


def _pool_in_place(ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: list[TableRows]) -> Tensor:
    """Pool shared rows that are never gathered: the scalars are their weights."""
    # packed scalars lie in the order of the ids; F.embedding's gradient of single values takes 15 times as long
    factors = tables[1].weight.reshape(-1).index_select(0, ids)
    if weights is not None:
        factors = scale_rows(factors.unsqueeze(1), weights, "memcom").squeeze(1)
    pooled = pool_table(tables[0], offsets, factors)
    if len(tables) == 2:
        return pooled
    return pooled + pool_table(TableRows(tables[2].weight.reshape(-1, 1), ids), offsets, weights)


def _scale(ids: Tensor, rows: list[Tensor], is_packed: bool) -> Tensor:
    """Return row times scalar plus bias, (L, D)."""
    lane = (ids % _LANES).long().unsqueeze(1)
    factor = rows[1].gather(1, lane) if is_packed else rows[1]
    embeddings = (rows[0].unflatten(1, (factor.shape[1], -1)) * factor.unsqueeze(2)).flatten(1)
    return embeddings + rows[2].gather(1, lane) if len(rows) == 3 else embeddings
