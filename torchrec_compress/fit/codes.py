"""Fitted codes: M small integers per row and the codebooks they point into; and the one definition of error."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CodeKind = Literal["product", "residual"]
CHUNK_ROWS = 65536
# Above this many unknowns per column the dense normal equations of residual codes (8 * (M*K)^2 bytes, (M*K)^3 / 3
# multiplications) cost more than sweeps of exact block minimisation do.
MAX_NORMAL_EQUATIONS = 2048


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
    num_rows, num_codes = codes.shape
    flat = codes + torch.arange(num_codes, device=codes.device) * (codebooks.shape[0] // num_codes)
    if kind == "residual":
        return F.embedding_bag(flat, codebooks, mode="sum")
    return F.embedding(flat, codebooks).reshape(num_rows, -1)


def codeword_sums(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum the rows that share an index: out[k] = sum of values[i] over index[i] == k, [size, width] float64.

    Args:
        index: [N] int64 in [0, size).
        values: [N, width] float32.
        size: number of sums.

    Example:
        >>> codeword_sums(torch.tensor([1, 1]), torch.ones(2, 1), 2).tolist()
        [[0.0], [2.0]]
    """
    total = torch.zeros(size, values.shape[1], dtype=torch.float64, device=values.device)
    for start in range(0, len(index), CHUNK_ROWS):  # chunks bound the float64 copy
        stop = start + CHUNK_ROWS
        total.index_add_(0, index[start:stop], values[start:stop].to(torch.float64))
    return total


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
    mass = torch.bincount(index, weights.to(torch.float64), minlength=len(start))
    sums = codeword_sums(index, values * weights[:, None], len(start))
    means = (sums / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(start.dtype)
    return torch.where(mass[:, None] > 0, means, start)


def refit_codebooks(
    codes: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    *,
    codebook_size: int,
    kind: CodeKind,
    start: Tensor | None = None,
    num_sweeps: int = 4,
) -> Tensor:
    """Fit the codebooks to the rows by weighted least squares, the codes held fixed.

    Product codes: each codeword is the weighted mean of its slices. Residual codes: the normal equations of all M
    codebooks at once where M*K <= 2,048, else `num_sweeps` sweeps over the codebooks, each minimised exactly. The
    weighted error is never above the start's. A codeword that no row of weight above zero uses keeps its start value.

    Args:
        codes: [N, M] int64 in [0, K).
        rows: [N, D] float32.
        weights: [N] >= 0, or None for equal weights.
        codebook_size: K.
        kind: "product" or "residual".
        start: [M*K, width] float32, the codebooks to start from, not written to; None: zeros.
        num_sweeps: sweeps where the normal equations are too large.

    Returns:
        [M*K, width] float32.

    Example:
        >>> codes, rows = torch.tensor([[0], [0]]), torch.tensor([[1.0], [3.0]])
        >>> refit_codebooks(codes, rows, None, codebook_size=1, kind="product")
        tensor([[2.]])
    """
    num_codes = codes.shape[1]
    weights = torch.ones(len(rows), device=rows.device) if weights is None else weights.to(torch.float32)
    if start is None:
        width = rows.shape[1] // (num_codes if kind == "product" else 1)
        start = torch.zeros(num_codes * codebook_size, width, device=rows.device)
    if kind == "product":
        books = start.view(num_codes, codebook_size, -1)
        parts = rows.view(len(rows), num_codes, -1)
        return torch.cat([weighted_means(codes[:, m], parts[:, m], weights, books[m]) for m in range(num_codes)])
    if len(start) <= MAX_NORMAL_EQUATIONS:
        return _solve_residual(codes, rows, weights, start)
    return _sweep_residual(codes, rows, weights, start, num_sweeps)


def _solve_residual(codes: Tensor, rows: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Minimise sum_i w_i ||x_i - sum_m B_m[c_im]||^2 + ridge * ||B - start||^2 over all codebooks at once.

    The equations are singular (a vector may move from one codebook to another), hence the ridge. It is taken against
    the start, so that the error cannot rise and unused codewords do not move.
    """
    num_codes = codes.shape[1]
    size, book = len(start), len(start) // num_codes
    exact = weights.to(torch.float64)
    gram = torch.zeros(num_codes, book, num_codes, book, dtype=torch.float64, device=rows.device)
    for a in range(num_codes):
        for b in range(num_codes):
            pairs = torch.bincount(codes[:, a] * book + codes[:, b], exact, minlength=book * book)
            gram[a, :, b] = pairs.view(book, book)
    gram = gram.view(size, size)
    missing = (rows - decode(codes, start, "residual")) * weights[:, None]
    right = torch.cat([codeword_sums(codes[:, m], missing, book) for m in range(num_codes)])
    gram.diagonal().add_(1e-7 * float(exact.sum()) / size)
    step = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return (start + step).to(start.dtype)


def _sweep_residual(codes: Tensor, rows: Tensor, weights: Tensor, start: Tensor, num_sweeps: int) -> Tensor:
    """Minimise over one codebook after another, the others fixed (block Gauss-Seidel)."""
    num_codes = codes.shape[1]
    books = start.clone().view(num_codes, -1, start.shape[1])
    missing = rows - decode(codes, start, "residual")
    for _ in range(num_sweeps):
        for m in range(num_codes):
            target = missing + books[m][codes[:, m]]
            books[m] = weighted_means(codes[:, m], target, weights, books[m])
            missing = target - books[m][codes[:, m]]
    return books.view_as(start)
