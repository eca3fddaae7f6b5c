"""Compositional embeddings: a row of each of several small tables, picked by parts of the id (arXiv 1909.02107)."""

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
    BagDecoder,
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
from torchrec_compress.methods.width import LANES, check_width
from torchrec_compress.ops import Rows, gathered, pool_rows

_FIT_ROUNDS = 8
_LEAST = 1e-12  # sum of squared factors that a row is fitted by
_MOST_TABLES = 64  # every one has two rows at least, and an id 63 bits


@register
@dataclass(frozen=True, kw_only=True)
class QRConfig(MethodConfig):
    """Store k small tables; an id picks a row of each, no two ids the same ones, and is their sum, or product, or both.

    The quotient-remainder trick: of two tables with `num_buckets` m, id i picks row i mod m of one and row i div m of
    the other. Nothing is stored per id, and an id that was never seen is a combination of rows that were trained.

    Sums, and rows side by side, commute with pooling: the tables are pooled by TorchRec as any other, and a bag is what
    travels. Products do not: a bag of products is no product of bags. So with op="mult" rows come back unpooled, one of
    each table per id, and are multiplied before they are pooled.

    Bytes: 4 D times the rows of all tables; with "concat" a table's width for D.

    Args:
        num_buckets: m. With "quotient" rows of every table but the last, which has N / m^(k - 1), rounded up; below
            the (k - 1)th root of N. With "remainders" rows of the first table, the smallest.
        num_tables: k, from 2 to 64.
        op: how rows make an embedding: "add", their sum; "concat", side by side; "mult", their product, element by
            element, of which all tables but the first start as ones.
        partition: what picks the rows, complementary both (section 4 of the paper). "quotient": the digits of the id to
            the base m, the last one unbounded. "remainders" (Chinese): its remainders by k numbers, m and the next ones
            that have no divisor in common; of equal bytes, they share rows more evenly.
        width: with "concat" numbers of a row of every table but the last, which has the rest; a multiple of 4. None:
            D / k, rounded down to one.

    Example:
        >>> QRConfig(num_buckets=1000).to_dict()["op"]
        'add'
        >>> QRConfig(num_buckets=1000, partition="remainders").sizes(1_000_000)
        [1000, 1001]
    """

    method: ClassVar[str] = "qr"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "rows that others trained, together its own"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "all"
    num_buckets: int
    num_tables: int = 2
    op: Literal["add", "concat", "mult"] = "add"
    partition: Literal["quotient", "remainders"] = "quotient"
    width: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for settings that no table can have, and for a width that does nothing."""
        super().__post_init__()
        for name, allowed in (("op", ("add", "concat", "mult")), ("partition", ("quotient", "remainders"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"qr: {name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        if not 2 <= self.num_tables <= _MOST_TABLES:
            raise ValueError(f"qr: num_tables must be in [2, {_MOST_TABLES}], got {self.num_tables}")
        if self.num_buckets < 2:
            raise ValueError(f"qr: num_buckets must be at least 2, got {self.num_buckets}")
        if self.width is not None and self.op != "concat":
            raise ValueError(
                f"qr: width must be left out with op={self.op!r}, whose rows all have the embedding's, got "
                f"{self.width}; set op to 'concat'"
            )

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless every id has rows of its own, and name the nearest number of buckets and width."""
        super().check(table)
        where, num_ids, others = f"table {table.name!r}", table.num_embeddings, self.num_tables - 1
        if self.partition == "quotient" and self.num_buckets**others >= num_ids:
            most = _root_below(num_ids, others)
            raise ValueError(
                f"{where}: num_buckets must be in [2, {most}], so that {self.num_tables} tables have rows to choose "
                f"from, got {self.num_buckets}; the nearest is {most}"
                if most >= 2
                else f"{where}: num_tables must be at most {(num_ids - 1).bit_length()} with {num_ids} rows, got "
                f"{self.num_tables}; choose fewer, or leave the table dense"
            )
        if self.partition == "remainders" and math.prod(self.sizes(num_ids)) < num_ids:
            raise ValueError(
                f"{where}: num_buckets must be at least {_least_modulus(num_ids, self.num_tables)}, so that no two of "
                f"{num_ids} ids have the same {self.num_tables} remainders, got {self.num_buckets}"
            )
        if self.op == "concat":
            self._check_widths(table)

    def _check_widths(self, table: BaseEmbeddingConfig) -> None:
        most = table.embedding_dim // LANES
        if table.embedding_dim % LANES or most < self.num_tables:
            advice = f"num_tables={most}, or op='add'" if most >= 2 and not table.embedding_dim % LANES else "op='add'"
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be a multiple of {LANES} of at least "
                f"{LANES * self.num_tables} with {self.num_tables} rows side by side, got {table.embedding_dim}; set "
                f"{advice}"
            )
        if self.width is not None:
            widest = (table.embedding_dim - LANES) // (self.num_tables - 1)
            check_width(table, self.width, widest, f"{self.num_tables} rows side by side")

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough for quotients to differ."""
        return self.partition == "remainders" or self.num_buckets ** (self.num_tables - 1) < table.num_embeddings

    def sizes(self, num_ids: int) -> list[int]:
        """Return the rows of every table."""
        if self.partition == "remainders":
            return _coprimes(self.num_buckets, self.num_tables)
        divisor = self.num_buckets ** (self.num_tables - 1)
        return [self.num_buckets] * (self.num_tables - 1) + [-(-num_ids // divisor)]

    def widths(self, embedding_dim: int) -> list[int]:
        """Return the numbers of a row of every table."""
        if self.op != "concat":
            return [embedding_dim] * self.num_tables
        width = embedding_dim // self.num_tables // LANES * LANES if self.width is None else self.width
        return [width] * (self.num_tables - 1) + [embedding_dim - width * (self.num_tables - 1)]

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of buckets, two at least."""
        return (replace(self, num_buckets=number) for number in spread(table.num_embeddings)[1:])

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the tables: pooled natively, but for products."""
        sizes, widths = self.sizes(table.num_embeddings), self.widths(table.embedding_dim)
        tables = []
        for number, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            is_factor = self.op == "mult" and number > 0
            start = nn.init.ones_ if is_factor else partial(_start, table, self.num_tables if self.op == "add" else 1)
            name, remap = self._pick(number, size)
            # factors start at 1: l2 towards 0 would shrink whole rows away
            tables.append(NativePart(name, size, width, remap, start, not is_factor, native_type(table)))
        return Parts(rows=tuple(tables)) if self.op == "mult" else Parts(bags=tuple(tables))

    def _pick(self, number: int, size: int) -> tuple[str, Remap]:
        """Return the name of a table, and what picks its row."""
        if self.partition == "remainders" or number == 0:
            return f"remainder_{number}", Remap("mod", size)
        divisor = self.num_buckets**number
        if number == self.num_tables - 1:
            return "quotient", Remap("div", divisor)
        return f"remainder_{number}", Remap("digit", divisor, base=size)

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> BagDecoder | TableDecoder:
        """Return what puts the rows together."""
        return {"add": Sum, "concat": SideBySide, "mult": Product}[self.op]()

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> LearnedWhole:
        """Find the rows of all tables by alternating least squares, weighted by counts.

        Raises:
            ValueError: rows are a sample: what the ids of a row have in common is found from all of them.
        """
        self.check_fit(table, data)
        rows, parts = data.all_rows(table), self.parts(table, data.seed).native
        weights = torch.ones(len(rows)) if data.counts is None else data.counts.float().clamp(min=1e-3)
        numbers = [part.remap(torch.arange(len(rows))) for part in parts]
        sizes = [part.num_embeddings for part in parts]
        if self.op == "concat":
            pieces = rows.split(self.widths(table.embedding_dim), dim=1)
            found = [
                _best_rows(piece, None, weights, mine, piece.new_zeros(size, piece.shape[1]))
                for piece, mine, size in zip(pieces, numbers, sizes, strict=True)
            ]
        else:
            found = _alternate(rows, weights, numbers, sizes, self.op == "mult")
        state = TableState(native={part.name: value for part, value in zip(parts, found, strict=True)})
        return LearnedWhole(table, state, parts)


def _root_below(number: int, exponent: int) -> int:
    """Return the largest integer whose power is below a number."""
    root = round(number ** (1 / exponent)) + 1
    while root**exponent >= number:
        root -= 1
    return root


def _coprimes(first: int, count: int) -> list[int]:
    """Return the smallest integers from `first` on of which no two have a divisor in common."""
    found = [first]
    while len(found) < count:
        following = found[-1] + 1
        while any(math.gcd(following, other) > 1 for other in found):
            following += 1
        found.append(following)
    return found


def _least_modulus(num_ids: int, count: int) -> int:
    """Return the smallest integer from which so many coprime ones have a product of at least `num_ids`."""
    least = _root_below(num_ids, count) + 1
    while least > 2 and math.prod(_coprimes(least - 1, count)) >= num_ids:
        least -= 1
    return least


@torch.no_grad()
def _start(table: BaseEmbeddingConfig, num_summands: int, weight: Tensor) -> None:
    """Initialise rows in place, so that a sum of so many has the spread of the user's table."""
    if weight.numel():  # a rank may hold none, without a shape
        init_like(table, weight)
        weight /= num_summands**0.5


def _alternate(
    rows: Tensor, weights: Tensor, numbers: list[Tensor], sizes: list[int], is_product: bool
) -> list[Tensor]:
    """Return tables, each in turn the best for the others; before its turn one is zeros, or ones of a product."""
    found = [(rows.new_ones if is_product else rows.new_zeros)(size, rows.shape[1]) for size in sizes]
    for _ in range(_FIT_ROUNDS):
        for number, mine in enumerate(numbers):
            others = [found[other][picked] for other, picked in enumerate(numbers) if other != number]
            if is_product:
                found[number] = _best_rows(rows, _product(others), weights, mine, found[number])
            else:
                found[number] = _best_rows(rows - sum(others), None, weights, mine, found[number])
    return found


def _best_rows(target: Tensor, factor: Tensor | None, weights: Tensor, numbers: Tensor, before: Tensor) -> Tensor:
    """Return the rows of one table that come nearest, times a factor, to a target; `before` where nothing says which.

    Args:
        target: (N, width).
        factor: (N, width), or None for ones.
        weights: (N,) of the squared errors.
        numbers: (N,) int64, the row of each id.
        before: (rows, width).
    """
    each = weights.unsqueeze(1)
    weighted = each.expand_as(target) if factor is None else each * factor
    squares = torch.zeros_like(before).index_add_(0, numbers, weighted if factor is None else weighted * factor)
    best = torch.zeros_like(before).index_add_(0, numbers, weighted * target) / squares.clamp(min=_LEAST)
    return torch.where(squares < _LEAST, before, best)


def _product(rows: list[Tensor]) -> Tensor:
    found = rows[0]
    for other in rows[1:]:
        found = found * other
    return found


class Sum(BagDecoder):
    """Add the bags of all tables."""

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return embeddings, (B, D), of (B, D) each."""
        return torch.stack(bags).sum(0)


class SideBySide(BagDecoder):
    """Lay the bags of all tables side by side."""

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return embeddings, (B, D), of widths that sum up to D."""
        return torch.cat(bags, dim=1)


class Product(TableDecoder):
    """Multiply the rows of an id, and pool."""

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `rows` are (L, D) each."""
        return pool_products(rows, offsets, weights)


@torch.fx.wrap
def pool_products(rows: list[Rows], offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return the sums over bags, (B, D), of products of rows, (L, D) each."""
    return pool_rows(_product(gathered(rows)), offsets, weights)
