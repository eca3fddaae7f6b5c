"""Pointers that are learned by clustering while a table trains (CCE, NeurIPS 2023, arXiv 2210.05974)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchrec_compress.fit.clustered import ResidualSums
from torchrec_compress.fit.codes import decode
from torchrec_compress.fit.kmeans import train_size
from torchrec_compress.fit.product import ProductEncoder, learn_product
from torchrec_compress.managers.codes import CodeManager, OwnedCodes
from torchrec_compress.ops import hash_codes, mix

BLOCK_ROWS = 65536
_POINTS_PER_CENTROID = 256
_SAMPLE, _KMEANS = 1, 2  # what the seeds of a round are for


def drawn_codes(ids: Tensor, draw: Tensor, num_codes: int, codebook_size: int) -> Tensor:
    """Return the codes that a hash gives ids now.

    Args:
        ids: (L,) int32 or int64.
        draw: (1, 2) int64: the table's salt, and how often hashes were drawn anew.
        num_codes: M.
        codebook_size: K.

    Returns:
        (L, M) int64 in [0, K).

    Example:
        >>> drawn_codes(torch.arange(3), torch.tensor([[7, 0]]), num_codes=2, codebook_size=16).shape
        torch.Size([3, 2])
    """
    return hash_codes(ids, num_codes, codebook_size, mix(draw[:, 1], draw[:, 0]))


def sum_of_halves(rows: Tensor) -> Tensor:
    """Add up what pointers and what hashes picked, side by side: (B, 2 D) -> (B, D)."""
    return rows.unflatten(1, (2, -1)).sum(dim=1)


@dataclass(frozen=True)
class Clustering(CodeManager):
    """Cluster what ids are served, point every id at the nearest centroid, and leave the rest to new hashes.

    The decoder's `codebooks` are 2 M of K codewords: the first M, that pointers pick from, one for each slice of a row,
    and the last M, that hashes pick from. Of each slice: k-means of a sample of the ids' present vectors; pointers =
    the nearest centroid of every id; the first codewords = the centroids; the hashes are drawn anew; the last codewords
    = the mean of what is left of the ids of a bucket, zeros where it has none. Every id is read by old pointers, hashes
    and codewords alone.

    Args:
        num_codes: pointers of an id, M.
        codebook_size: K.
        every: steps from one clustering to the next.
        until: no clustering after so many steps.
        state: what the optimizer's state of a codebook becomes, as no codeword is what it was: "reset", zeros; or
            "mean", for each the mean of all, which keeps the rates.
        block_rows: ids that are assigned at once; nothing but memory hangs on it.
    """

    num_codes: int
    codebook_size: int
    every: int
    until: int
    state: Literal["mean", "reset"] = "reset"
    block_rows: int = BLOCK_ROWS

    def is_due(self, step: int) -> bool:
        """Return whether a clustering ends this step."""
        return (step + 1) % self.every == 0 and step + 1 <= self.until

    def change(self, table: OwnedCodes) -> None:
        """Cluster once; see `CodeManager`.

        Raises:
            ValueError: a codeword is not finite.
        """
        books = table.parameters["codebooks"].detach().clone().float()
        if not bool(torch.isfinite(books).all()):
            raise ValueError(
                f"table {table.name!r}: codebooks must be finite to be clustered, got NaN or infinity; lower the "
                "learning rate, or leave out batches whose loss is not finite"
            )
        draw = table.buffers["draw"]
        old = draw.clone()
        centroids = self._centroids(table, books, old)
        draw[0, 1] += 1
        encoder, width = ProductEncoder(list(centroids.split(self.codebook_size))), centroids.shape[1]
        sums = ResidualSums(self.num_codes, self.codebook_size, width, centroids.device)
        for ids, codes in self._blocks(table):
            vectors = self._vectors(books, ids, codes.long(), old)
            pointers = encoder(ids, vectors)
            left = vectors - decode(pointers, centroids, "product")
            sums.add(left, drawn_codes(ids, draw, self.num_codes, self.codebook_size))
            codes.copy_(pointers)
        table.added_up(sums.sums)
        table.added_up(sums.masses)
        if table.is_whole:
            table.of_first(table.codes)
        table.parameters["codebooks"].copy_(table.of_first(torch.cat([centroids, sums.means()])))
        self._settle_state(table)

    def _blocks(self, table: OwnedCodes) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the ids that lie here, block by block, and their rows of the code table."""
        for first in range(0, len(table.codes), self.block_rows):
            codes = table.codes[first : first + self.block_rows]
            start = table.first_id + first
            yield torch.arange(start, start + len(codes), device=codes.device), codes

    def _vectors(self, books: Tensor, ids: Tensor, codes: Tensor, draw: Tensor) -> Tensor:
        """Return what ids are served, (L, D) float32."""
        hashes = drawn_codes(ids, draw, self.num_codes, self.codebook_size)
        return sum_of_halves(decode(torch.cat([codes, hashes], dim=1), books, "product"))

    def _centroids(self, table: OwnedCodes, books: Tensor, draw: Tensor) -> Tensor:
        """Return the centroids of all slices, [M*K, D/M] float32, which the first rank finds."""
        ids, weights = self._sample(table.num_ids, _seed(draw, _SAMPLE))
        ids, weights = ids.to(draw.device), weights.to(draw.device)
        codes = table.codes_of(ids)
        centroids = torch.empty_like(books[: len(books) // 2])
        if table.is_first:
            vectors = self._vectors(books, ids, codes, draw)
            seed = _seed(draw, _KMEANS)
            centroids = learn_product(vectors, self.num_codes, self.codebook_size, weights=weights, seed=seed)[1]
        return table.of_first(centroids)

    def _sample(self, num_ids: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return distinct ids, ascending, (S,) int64, and what each weighs, (S,) float32: how often it was drawn."""
        size = train_size(self.codebook_size, _POINTS_PER_CENTROID)
        if num_ids <= size:
            return torch.arange(num_ids), torch.ones(num_ids)
        drawn = torch.randint(num_ids, (size,), generator=torch.Generator().manual_seed(seed))
        ids, times = drawn.unique(return_counts=True)
        return ids, times.float()

    def _settle_state(self, table: OwnedCodes) -> None:
        for state in table.optimizer_state["codebooks"].values():
            slices = state.view(2 * self.num_codes, self.codebook_size, -1)
            if self.state == "reset":
                slices.zero_()
            else:
                slices.copy_(slices.mean(dim=1, keepdim=True).expand_as(slices))


def _seed(draw: Tensor, use: int) -> int:
    return int(mix(mix(draw[:, 1], draw[:, 0]), use))
