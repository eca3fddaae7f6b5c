"""Residual codes: a row is the sum of M codewords, one of each codebook.

Greedy residual k-means (Chen, Guan, Wang, Sensors 2010) is the start. Then, as in additive quantisation (Babenko &
Lempitsky, CVPR 2014), rounds of codebook refit by least squares and re-coding by iterated conditional modes (ICM: one
code at a time, the others fixed). Neither step can raise the weighted error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_compress.fit.checks import check_rows, check_seed, check_sizes, check_weights
from torchrec_compress.fit.codes import CHUNK_ROWS, Encoder, FittedCodes, decode
from torchrec_compress.fit.kmeans import kmeans, nearest, sample_points, train_size
from torchrec_compress.fit.refit import refit_codebooks

NUM_FINAL_SWEEPS = 2  # ICM sweeps over all rows where the codebooks were trained on a sample
NUM_PREFIX_REFITS = 2  # of each of several lengths from one fit


@dataclass(frozen=True)
class ResidualEncoder(Encoder):
    """Greedy codes, then a sweep with each of the codebooks that follow.

    Attributes:
        trail: [M*K, D] float32 codebooks, one set after another: of the greedy codes, of the first sweep, and so on.
        sizes: M numbers; codebook m may use its first sizes[m] codewords.
    """

    trail: list[Tensor]
    sizes: list[int]

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of rows; see `Encoder`."""
        assert rows is not None
        codes = greedy_codes(rows, self.trail[0], self.sizes)
        for books in self.trail[1:]:
            codes = recode(codes, rows, books, self.sizes)
        return codes


def fit_residual(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    num_refits: int = 8,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> FittedCodes:
    """Fit residual codes.

    Args:
        rows: [N, D] float32, finite.
        num_codes: M.
        codebook_size: K <= N.
        first_size: codewords the first codebook may use (the others are left for escapes, as zeros); None: all K.
        weights: [N] >= 0, not all zero; None for equal weights.
        num_iterations: the most Lloyd iterations per codebook at the start.
        num_refits: rounds of refit and re-coding on the training sample; 0 leaves greedy residual k-means.
        max_points_per_centroid: codebooks train on a weighted sample (`kmeans.sample_points`) of `kmeans.train_size`
            rows; at the end all rows are coded and the codebooks refitted to all of them.
        seed: one seed, one result.

    Returns:
        `FittedCodes` of kind "residual", codebooks [M*K, D].

    Raises:
        ValueError: rows, weights or sizes that do not hold; see `checks`.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> round(fit_residual(rows, num_codes=2, codebook_size=2).error(rows), 6)
        0.0
    """
    encoder, codebooks = learn_residual(
        rows,
        num_codes,
        codebook_size,
        first_size=first_size,
        weights=weights,
        num_iterations=num_iterations,
        num_refits=num_refits,
        max_points_per_centroid=max_points_per_centroid,
        seed=seed,
    )
    codes = encoder(torch.arange(len(rows)), rows)
    books = refit_codebooks(codes, rows, weights, codebook_size=codebook_size, kind="residual", start=codebooks)
    return FittedCodes(codes, books, "residual")


def fit_prefixes(
    rows: Tensor,
    lengths: Sequence[int],
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    seed: int = 0,
) -> Iterator[FittedCodes]:
    """Yield residual codes of several lengths from one greedy fit, whose first codes are codes themselves.

    Each length has two refits, where a fit of its own has eight.

    Args:
        rows, codebook_size, first_size, weights, num_iterations, seed: as for `fit_residual`; no sample is drawn.
        lengths: numbers of codes, ascending.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> [round(fitted.error(rows), 2) for fitted in fit_prefixes(rows, [1, 2], codebook_size=2)]
        [0.25, 0.0]
    """
    seed = check_seed("fit_prefixes", seed)
    check_rows("fit_prefixes", rows)
    first_size = check_sizes("fit_prefixes", len(rows), max(lengths), codebook_size, first_size)
    weights = check_weights("fit_prefixes", weights, len(rows), rows.device)
    sizes = [first_size] + [codebook_size] * (max(lengths) - 1)
    all_codes, all_books = _greedy_kmeans(rows, weights, sizes, codebook_size, num_iterations, seed)
    for length in lengths:
        codes, books = all_codes[:, :length], all_books[: length * codebook_size]
        # one codebook: k-means has left nothing to refit
        for number in range(NUM_PREFIX_REFITS if length > 1 else 0):
            codes = recode(codes, rows, books, sizes[:length]) if number else codes
            books = refit_codebooks(codes, rows, weights, codebook_size=codebook_size, kind="residual", start=books)
        yield FittedCodes(codes, books, "residual")


def learn_residual(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    num_refits: int = 8,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> tuple[ResidualEncoder, Tensor]:
    """Return what makes the codes of `fit_residual`, and the codebooks, [M*K, D], before the last refit to all rows.

    Arguments and errors as there.
    """
    seed = check_seed("fit_residual", seed)
    check_rows("fit_residual", rows)
    first_size = check_sizes("fit_residual", len(rows), num_codes, codebook_size, first_size)
    weights = check_weights("fit_residual", weights, len(rows), rows.device)
    if num_refits < 0:
        raise ValueError(f"fit_residual: num_refits must be >= 0, got {num_refits}")
    sizes = [first_size] + [codebook_size] * (num_codes - 1)
    train, train_weights = rows, weights
    num_train = train_size(codebook_size, max_points_per_centroid)
    if len(rows) > num_train:
        index, train_weights = sample_points(weights, num_train, torch.Generator().manual_seed(seed))
        train = rows[index]
    codes, books = _greedy_kmeans(train, train_weights, sizes, codebook_size, num_iterations, seed)
    num_refits = num_refits if num_codes > 1 else 0  # one codebook: k-means has left nothing to refit
    trail = [books]
    for number in range(num_refits):
        if number:
            codes = recode(codes, train, books, sizes)
        books = refit_codebooks(codes, train, train_weights, codebook_size=codebook_size, kind="residual", start=books)
        trail.append(books)
    if train is not rows:  # other rows have no codes to go on from, and need less than all that led there
        trail = [books] * (1 + min(num_refits, NUM_FINAL_SWEEPS))
    return ResidualEncoder(trail, sizes), books


def _greedy_kmeans(
    rows: Tensor, weights: Tensor, sizes: list[int], codebook_size: int, num_iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cluster the rows, then what the first codebook leaves, and so on: codes [N, M] and codebooks [M*K, D]."""
    books = torch.zeros(len(sizes), codebook_size, rows.shape[1], device=rows.device)
    codes = torch.empty(len(rows), len(sizes), dtype=torch.int64, device=rows.device)
    left = rows
    for m, size in enumerate(sizes):
        # The rows are a sample already: no second one within it.
        fitted = kmeans(
            left,
            size,
            weights=weights,
            num_iterations=num_iterations,
            max_points_per_centroid=len(rows),
            seed=(seed + m) % 2**63,
        )
        books[m, :size], codes[:, m] = fitted.centroids, fitted.assignment
        left = left - fitted.centroids[fitted.assignment]
    return codes, books.view(-1, rows.shape[1])


def greedy_codes(rows: Tensor, codebooks: Tensor, sizes: list[int]) -> Tensor:
    """Code rows one codebook after another, each the nearest codeword to what is left.

    Args:
        rows: [N, D] float32.
        codebooks: [M*K, D] float32.
        sizes: M numbers; codebook m may use its first sizes[m] codewords.

    Returns:
        [N, M] int64.

    Example:
        >>> greedy_codes(torch.tensor([[11.0]]), torch.tensor([[0.0], [10.0], [0.0], [1.0]]), [2, 2])
        tensor([[1, 1]])
    """
    books = codebooks.view(len(sizes), -1, rows.shape[1])
    codes = torch.empty(len(rows), len(sizes), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), CHUNK_ROWS):
        left = rows[start : start + CHUNK_ROWS]
        for m, size in enumerate(sizes):
            best = nearest(left, books[m, :size])
            codes[start : start + CHUNK_ROWS, m] = best
            left = left - books[m][best]
    return codes


def recode(codes: Tensor, rows: Tensor, codebooks: Tensor, sizes: list[int]) -> Tensor:
    """Choose each code anew, one codebook after another with the other codes fixed (one ICM sweep).

    No row's error rises. Arguments and result as `greedy_codes`, with the codes [N, M] to start from (not written to).
    """
    books = codebooks.view(len(sizes), -1, rows.shape[1])
    codes = codes.clone()
    for start in range(0, len(rows), CHUNK_ROWS):
        some = codes[start : start + CHUNK_ROWS]  # a view: writes go to `codes`
        missing = rows[start : start + CHUNK_ROWS] - decode(some, codebooks, "residual")
        for m, size in enumerate(sizes):
            target = missing + books[m][some[:, m]]
            some[:, m] = nearest(target, books[m, :size])
            missing = target - books[m][some[:, m]]
    return codes
