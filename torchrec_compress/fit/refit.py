"""Codebooks for codes that are fixed: weighted least squares, from all rows at once or from block after block."""

import torch
from torch import Tensor

from torchrec_compress.fit.codes import CHUNK_ROWS, CodeKind, decode, weighted_means

# Above this many unknowns per column the Cholesky factor of residual codes' normal equations ((M*K)^3 / 3
# multiplications) costs more than sweeps of exact block minimisation do.
MAX_NORMAL_EQUATIONS = 2048
# Above this many there is no room for the equations themselves (8 * (M*K)^2 bytes).
MAX_UNKNOWNS = 8192
NUM_SWEEPS = 4


class RefitSums:
    """What the least squares of codebooks needs of rows and their codes, summed up over blocks of rows.

    Product codes: the weight and the weighted sum of each codeword's slices. Residual codes: the normal equations of
    all M codebooks. Bytes: 8 M K (1 + D / M) or 8 ((M K)^2 + M K D).

    Args:
        start: [M*K, width] float32 codebooks, which unused codewords keep; not written to.
        num_codes: M.
        kind: "product" or "residual"; residual codes of more than 8,192 codewords in all have no sums: see `fits`.

    Example:
        >>> sums = RefitSums(torch.zeros(2, 1), num_codes=1, kind="product")
        >>> sums.add(torch.tensor([[0]]), torch.tensor([[1.0]]), torch.ones(1))
        >>> sums.add(torch.tensor([[0]]), torch.tensor([[3.0]]), torch.ones(1))
        >>> sums.codebooks().tolist()
        [[2.0], [0.0]]
    """

    def __init__(self, start: Tensor, num_codes: int, kind: CodeKind) -> None:
        self._start, self._num_codes, self._kind = start, num_codes, kind
        size, exact = len(start), {"dtype": torch.float64, "device": start.device}
        self._weight = torch.zeros((), **exact)
        self._right = torch.zeros(start.shape, **exact)
        # product codes meet in no codeword: their equations are a diagonal
        self._gram = torch.zeros((size, size) if kind == "residual" else (size,), **exact)

    @staticmethod
    def fits(num_codewords: int, kind: CodeKind) -> bool:
        """Return whether there is room for the sums of M * K codewords."""
        return kind == "product" or num_codewords <= MAX_UNKNOWNS

    def add(self, codes: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Add a block of rows.

        Args:
            codes: [L, M] int64 in [0, K).
            rows: [L, D] float32.
            weights: [L] float32 >= 0.
        """
        for first in range(0, len(rows), CHUNK_ROWS):  # chunks bound the float64 copies
            chunk = slice(first, first + CHUNK_ROWS)
            self._add(codes[chunk], rows[chunk], weights[chunk].to(torch.float32))

    def _add(self, codes: Tensor, rows: Tensor, weights: Tensor) -> None:
        num_codes, book = self._num_codes, len(self._start) // self._num_codes
        exact = weights.to(torch.float64)
        self._weight += exact.sum()
        if self._kind == "product":
            values = rows.unflatten(1, (num_codes, -1))
        else:
            values = (rows - decode(codes, self._start, "residual"))[:, None].expand(-1, num_codes, -1)
        for m in range(num_codes):
            index = codes[:, m] + m * book
            self._right.index_add_(0, index, (values[:, m] * weights[:, None]).to(torch.float64))
            if self._kind == "product":
                self._gram.index_add_(0, index, exact)
                continue
            for other in range(num_codes):
                pair = index * len(self._start) + codes[:, other] + other * book
                self._gram.view(-1).index_add_(0, pair, exact)

    def sums(self) -> list[Tensor]:
        """Return all that was summed up, live: over several of these, of different rows, it adds up."""
        return [self._weight, self._right, self._gram]

    def codebooks(self) -> Tensor:
        """Return the codebooks of least weighted error, [M*K, width] float32."""
        start = self._start
        if self._kind == "product":
            mass = self._gram[:, None]
            means = (self._right / mass.clamp(min=torch.finfo(torch.float64).tiny)).to(start.dtype)
            return torch.where(mass > 0, means, start)
        step = self._solve() if len(start) <= MAX_NORMAL_EQUATIONS else self._sweep()
        return (start + step).to(start.dtype)

    def _solve(self) -> Tensor:
        """Minimise sum_i w_i ||x_i - sum_m B_m[c_im]||^2 + ridge * ||B - start||^2 over all codebooks at once.

        The equations are singular (a vector may move from one codebook to another), hence the ridge. It is taken
        against the start, so that the error cannot rise and unused codewords do not move.
        """
        gram = self._gram.clone()
        gram.diagonal().add_(1e-7 * float(self._weight) / len(self._start))
        return torch.cholesky_solve(self._right, torch.linalg.cholesky(gram))

    def _sweep(self) -> Tensor:
        """Minimise over one codebook after another, the others fixed (block Gauss-Seidel)."""
        book = len(self._start) // self._num_codes
        step, mass = torch.zeros_like(self._right), self._gram.diagonal()[:, None]
        for _ in range(NUM_SWEEPS):
            for first in range(0, len(step), book):
                mine = slice(first, first + book)
                left = self._right[mine] - self._gram[mine] @ step + mass[mine] * step[mine]
                step[mine] = torch.where(mass[mine] > 0, left / mass[mine].clamp(min=1e-300), 0.0)
        return step


def refit_codebooks(
    codes: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    *,
    codebook_size: int,
    kind: CodeKind,
    start: Tensor | None = None,
) -> Tensor:
    """Fit the codebooks to the rows by weighted least squares, the codes held fixed.

    Product codes: each codeword is the weighted mean of its slices. Residual codes: the normal equations of all M
    codebooks at once where M*K <= 2,048, else four sweeps over the codebooks, each minimised exactly. The weighted
    error is never above the start's. A codeword that no row of weight above zero uses keeps its start value.

    Args:
        codes: [N, M] int64 in [0, K).
        rows: [N, D] float32.
        weights: [N] >= 0, or None for equal weights.
        codebook_size: K.
        kind: "product" or "residual".
        start: [M*K, width] float32, the codebooks to start from, not written to; None: zeros.

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
    if not RefitSums.fits(len(start), kind):
        return _sweep_rows(codes, rows, weights, start)
    sums = RefitSums(start, num_codes, kind)
    sums.add(codes, rows, weights)
    return sums.codebooks()


def _sweep_rows(codes: Tensor, rows: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Minimise over one codebook after another by walks over all rows, where there is no room for their sums."""
    num_codes = codes.shape[1]
    books = start.clone().view(num_codes, -1, start.shape[1])
    missing = rows - decode(codes, start, "residual")
    for _ in range(NUM_SWEEPS):
        for m in range(num_codes):
            target = missing + books[m][codes[:, m]]
            books[m] = weighted_means(codes[:, m], target, weights, books[m])
            missing = target - books[m][codes[:, m]]
    return books.view_as(start)
