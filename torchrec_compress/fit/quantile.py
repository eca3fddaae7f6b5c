"""Quantile codes: codes without a trained table, balanced by construction (RecJPQ; Petrov & Macdonald, WSDM 2024)."""

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from torchrec_compress.fit.checks import check_seed
from torchrec_compress.fit.codes import HashEncoder, SeenEncoder
from torchrec_compress.ops import hash_ids, stable_salt

# Below this many rows or columns LAPACK's full SVD is quick, and exact where ARPACK's iterations are not.
SMALL_SIDE = 512


def quantile_codes(
    row_ids: Tensor, context_ids: Tensor, num_rows: int, num_codes: int, codebook_size: int, seed: int
) -> Tensor:
    """Code ids by quantiles of their co-occurrence with contexts.

    The id x context matrix (1 where the pair occurs, however often) is factored by a truncated SVD; code m is the
    quantile bin, one of K, of component m. So ids that share contexts share codes, and each code serves equally many
    ids (sizes differ by at most one). Ids with equal values are ordered by a hash of (seed, id). Ids that never occur
    get hashed codes, uniform and a pure function of (seed, id).

    Args:
        row_ids: [P] integer ids in [0, num_rows).
        context_ids: [P] integer ids >= 0: of the user, the session, the sample ...
        num_rows: N.
        num_codes: M, at most the number of distinct ids and of distinct contexts.
        codebook_size: K, at most N. Where fewer than K ids occur, each of them has a bin of its own.
        seed: of the hashes and of the SVD's start vector.

    Returns:
        [N, M] int64, each in [0, K).

    Raises:
        ValueError: pairs of unequal length, none, ids out of range, or M or K too large for the pairs.

    Example:
        >>> rows, contexts = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])
        >>> codes = quantile_codes(rows, contexts, num_rows=4, num_codes=1, codebook_size=2, seed=0)
        >>> bool(codes[0] == codes[1]), bool(codes[2] == codes[3]), bool(codes[0] == codes[2])
        (True, True, False)
    """
    encoder = learn_quantiles(row_ids, context_ids, num_rows, num_codes, codebook_size, seed)
    return encoder(torch.arange(num_rows), None)


def learn_quantiles(
    row_ids: Tensor,
    context_ids: Tensor,
    num_rows: int,
    num_codes: int,
    codebook_size: int,
    seed: int,
    first_size: int | None = None,
) -> SeenEncoder:
    """Return what makes `quantile_codes`; arguments and errors as there.

    Where the first codebook has `first_size` codewords, its last bins join their neighbour.
    """
    _check(row_ids, context_ids, num_rows, num_codes, codebook_size)
    seed = check_seed("quantile_codes", seed)
    seen, row = np.unique(row_ids.cpu().numpy(), return_inverse=True)
    contexts, column = np.unique(context_ids.cpu().numpy(), return_inverse=True)
    if num_codes > min(len(seen), len(contexts)):
        raise ValueError(
            f"quantile_codes: num_codes must be at most the distinct ids ({len(seen)}) and contexts ({len(contexts)}), "
            f"got {num_codes}; lower num_codes or choose finer contexts"
        )
    matrix = sparse.csr_matrix((np.ones(len(row), np.float64), (row, column)), shape=(len(seen), len(contexts)))
    matrix.data[:] = 1.0  # csr_matrix has summed repeated pairs
    factors = _left_factors(matrix, num_codes, seed)
    tie = hash_ids(torch.from_numpy(seen), 2**62, stable_salt(seed, "quantile ties")).numpy()
    salt = stable_salt(seed, "quantile codes")
    bins = np.empty((len(seen), num_codes), np.int32)
    for m in range(num_codes):
        order = np.lexsort((tie, _rounded(factors[:, m])))
        bins[order, m] = np.arange(len(seen)) * codebook_size // len(seen)
    others = HashEncoder(num_codes, codebook_size, salt, codebook_size)
    first_size = codebook_size if first_size is None else first_size
    return SeenEncoder(torch.from_numpy(seen), torch.from_numpy(bins), others, first_size)


def _check(row_ids: Tensor, context_ids: Tensor, num_rows: int, num_codes: int, codebook_size: int) -> None:
    if row_ids.dim() != 1 or row_ids.shape != context_ids.shape or len(row_ids) == 0:
        raise ValueError(
            "quantile_codes: row_ids and context_ids must be vectors of one length above 0, "
            f"got {list(row_ids.shape)} and {list(context_ids.shape)}"
        )
    if any(ids.dtype.is_floating_point or ids.dtype == torch.bool for ids in (row_ids, context_ids)):
        raise ValueError(
            f"quantile_codes: row_ids and context_ids must be integers, got {row_ids.dtype} and {context_ids.dtype}"
        )
    if num_codes < 1 or not 1 <= codebook_size <= 65536:
        raise ValueError(
            "quantile_codes: num_codes must be at least 1 and codebook_size in [1, 65536], "
            f"got {num_codes} and {codebook_size}"
        )
    if codebook_size > num_rows:
        raise ValueError(
            "quantile_codes: codebook_size must be at most the number of rows, got "
            f"K = {codebook_size} larger than the rows ({num_rows}); lower codebook_size"
        )
    low, high = int(row_ids.min()), int(row_ids.max())
    if low < 0 or high >= num_rows:
        raise ValueError(f"quantile_codes: row_ids must be in [0, {num_rows}), got {low if low < 0 else high}")
    if int(context_ids.min()) < 0:
        raise ValueError(f"quantile_codes: context_ids must be >= 0, got {int(context_ids.min())}")


def _left_factors(matrix: sparse.csr_matrix, num_components: int, seed: int) -> np.ndarray:
    """Return U * S of the truncated SVD, [rows, components] float64, largest first, the largest entry positive."""
    rows, columns = len(matrix.indptr) - 1, int(matrix.indices.max()) + 1
    side = min(rows, columns)
    if side <= max(SMALL_SIDE, num_components) and rows * columns <= 2**26:
        left, values, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    elif num_components < side:
        start = np.random.default_rng(seed).uniform(-1, 1, side)
        left, values, _ = svds(matrix, k=num_components, v0=start)
    else:
        raise ValueError(f"quantile_codes: num_codes must be below {side}, got {num_components}")
    assert left is not None  # svds may leave it out, but only when asked to
    order = np.argsort(-values, kind="stable")[:num_components]
    factors = left[:, order] * values[order]
    # A singular vector is known up to its sign: fix it, or the codes would depend on the solver's mood.
    top = np.abs(factors).argmax(axis=0)
    return factors * np.where(factors[top, np.arange(num_components)] < 0, -1.0, 1.0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round to 1e-9 of the largest, so that ids with the same contexts tie in spite of rounding errors."""
    largest = np.abs(values).max()
    return np.round(values / largest, 9) if largest > 0 else values
