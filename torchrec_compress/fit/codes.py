"""Fitted codes: M small integers per row and the codebooks they point into; and the one definition of error."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_compress.ops import centroid_sums, hash_codes

CodeKind = Literal["product", "residual"]
CHUNK_ROWS = 65536


def weighted_error(rows: Tensor, approximation: Tensor, weights: Tensor | None = None) -> float:
    """Weighted mean squared error: sum_i w_i ||x_i - y_i||^2 / (D * sum_i w_i).

    This is the error of the whole package: the mean square per stored float that a lookup meets when rows are looked
    up in proportion to their weights. Summed over rows in float64.

    Args:
        rows: [N, D] float32.
        approximation: [N, D] float32.
        weights: [N] >= 0, not all zero, or None (all rows alike).

    Example:
        >>> weighted_error(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1), torch.tensor([3.0, 1.0]))
        0.25
    """
    squares = (rows - approximation).square().sum(dim=1).to(torch.float64)
    if weights is None:
        return float(squares.mean() / rows.shape[1])
    exact = weights.to(torch.float64)
    return float((squares * exact).sum() / exact.sum() / rows.shape[1])


class Encoder(ABC):
    """Make the codes of a row, once it is learned what codes mean: a function of that row and its id alone.

    So rows are coded in blocks, in any order and on any rank.
    """

    @abstractmethod
    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return codes.

        Args:
            ids: [L] int64.
            rows: [L, D] float32 of these ids; None where codes are made of ids alone.

        Returns:
            [L, M] int64.
        """


@dataclass(frozen=True)
class HashEncoder(Encoder):
    """Codes that are hashes of the id.

    Attributes:
        num_codes: M.
        codebook_size: K.
        salt: of the hashes.
        first_size: codewords of the first codebook.
    """

    num_codes: int
    codebook_size: int
    salt: int
    first_size: int

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of ids; see `Encoder`."""
        return hash_codes(ids, self.num_codes, self.codebook_size, self.salt, self.first_size)


@dataclass(frozen=True)
class SeenEncoder(Encoder):
    """Codes that were made for the ids that have contexts, hashes for the others.

    Attributes:
        seen: [S] int64, ascending.
        codes: [S, M] int32, each in [0, K).
        others: of ids that were not seen.
        first_size: codewords of the first codebook; codes beyond the last join it.
    """

    seen: Tensor
    codes: Tensor
    others: HashEncoder
    first_size: int

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of ids; see `Encoder`."""
        codes = self.others(ids, None)
        place = torch.searchsorted(self.seen, ids).clamp(max=len(self.seen) - 1)
        is_seen = self.seen[place] == ids
        codes[is_seen] = self.codes[place[is_seen]].long()
        codes[:, 0].clamp_(max=self.first_size - 1)
        return codes


@dataclass(frozen=True)
class FittedCodes:
    """Codes of a table and the codebooks they point into.

    Attributes:
        codes: [N, M] int64, each in [0, K).
        codebooks: [M*K, width] float32; rows m*K .. (m+1)*K - 1 are codebook m. width = D/M (product) or D (residual).
        kind: "product": a row is the concatenation of its M codewords; "residual": their sum.

    Example:
        >>> fitted = FittedCodes(torch.tensor([[1, 0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]]), "product")
        >>> fitted.reconstruct()
        tensor([[1., 2.]])
        >>> FittedCodes(fitted.codes, fitted.codebooks, "residual").reconstruct()
        tensor([[3.]])
    """

    codes: Tensor
    codebooks: Tensor
    kind: CodeKind

    @property
    def num_codes(self) -> int:
        """M, the codes of one row."""
        return self.codes.shape[1]

    @property
    def codebook_size(self) -> int:
        """K, the codewords of one codebook."""
        return self.codebooks.shape[0] // self.codes.shape[1]

    def reconstruct(self) -> Tensor:
        """Return the rows that the codes stand for, [N, D] float32."""
        return decode(self.codes, self.codebooks, self.kind)

    def error(self, rows: Tensor, weights: Tensor | None = None) -> float:
        """Return `weighted_error` of the reconstruction against rows [N, D]."""
        return weighted_error(rows, self.reconstruct(), weights)


def decode(codes: Tensor, codebooks: Tensor, kind: CodeKind) -> Tensor:
    """Return the rows that codes stand for.

    Args:
        codes: [N, M] int64.
        codebooks: [M*K, width] float32.
        kind: "product" or "residual".

    Returns:
        [N, D] float32; D = M * width (product) or width (residual).

    Example:
        >>> decode(torch.tensor([[0, 1]]), torch.arange(4.0).view(4, 1), "product")
        tensor([[0., 3.]])
    """
    num_codes = codes.shape[1]
    flat = codes + torch.arange(num_codes, device=codes.device) * (codebooks.shape[0] // num_codes)
    if kind == "residual":
        return F.embedding_bag(flat, codebooks, mode="sum")
    return F.embedding(flat, codebooks).flatten(1)


def weighted_means(index: Tensor, values: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return the weighted mean of each codeword's rows; a codeword that no weighted row uses keeps its start value.

    Args:
        index: [N] int64 in [0, K).
        values: [N, width] float32.
        weights: [N] float32.
        start: [K, width] float32.

    Returns:
        [K, width] float32, a new tensor.

    Example:
        >>> values, weights = torch.tensor([[0.0], [4.0]]), torch.tensor([1.0, 3.0])
        >>> weighted_means(torch.tensor([0, 0]), values, weights, torch.ones(2, 1)).tolist()
        [[3.0], [1.0]]
    """
    sums, mass = centroid_sums(index, values, weights, len(start))
    means = (sums / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(start.dtype)
    return torch.where(mass[:, None] > 0, means, start)
