"""Product codes: a row is M slices, each the nearest codeword of its own codebook (Jegou et al., TPAMI 2011)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_compress.fit.checks import check_rows, check_seed, check_sizes, check_weights
from torchrec_compress.fit.codes import Encoder, FittedCodes
from torchrec_compress.fit.kmeans import learn_centroids, nearest


def check_slices(where: str, width: int, num_codes: int) -> None:
    """Refuse a width D that does not split into M equal slices (ValueError)."""
    if width % num_codes:
        raise ValueError(
            f"{where}: the width must be a multiple of num_codes, got D = {width} and M = {num_codes}; "
            "choose another num_codes or use residual codes"
        )


@dataclass(frozen=True)
class ProductEncoder(Encoder):
    """The nearest codeword of each slice.

    Attributes:
        books: M tensors, [K_m, D/M] float32, of the codewords that may be chosen.
    """

    books: list[Tensor]

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of rows; see `Encoder`."""
        assert rows is not None
        parts = rows.split(self.books[0].shape[1], dim=1)
        found = [nearest(part, book) for part, book in zip(parts, self.books, strict=True)]
        return torch.stack(found, dim=1)


def fit_product(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> FittedCodes:
    """Fit product codes: weighted k-means in each of the M slices.

    Args:
        rows: [N, D] float32, finite; D a multiple of M.
        num_codes: M.
        codebook_size: K <= N.
        first_size: codewords the first codebook may use (the others are left for escapes, as zeros); None: all K.
        weights: [N] >= 0, not all zero; None for equal weights.
        num_iterations: the most Lloyd iterations per slice.
        max_points_per_centroid: k-means trains on a weighted sample of this many rows per codeword; all rows are coded.
        seed: one seed, one result.

    Returns:
        `FittedCodes` of kind "product", codebooks [M*K, D/M].

    Raises:
        ValueError: rows, weights or sizes that do not hold; see `checks`.

    Example:
        >>> rows = torch.tensor([[0.0, 5.0], [1.0, 5.0], [0.0, 7.0], [1.0, 7.0]])
        >>> fit_product(rows, num_codes=2, codebook_size=2).error(rows)
        0.0
    """
    encoder, codebooks = learn_product(
        rows,
        num_codes,
        codebook_size,
        first_size=first_size,
        weights=weights,
        num_iterations=num_iterations,
        max_points_per_centroid=max_points_per_centroid,
        seed=seed,
    )
    return FittedCodes(encoder(torch.arange(len(rows)), rows), codebooks, "product")


def learn_product(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    num_iterations: int = 25,
    max_points_per_centroid: int = 256,
    seed: int = 0,
) -> tuple[ProductEncoder, Tensor]:
    """Return what makes the codes of `fit_product`, and its codebooks, [M*K, D/M]; arguments and errors as there."""
    seed = check_seed("fit_product", seed)
    check_rows("fit_product", rows)
    first_size = check_sizes("fit_product", len(rows), num_codes, codebook_size, first_size)
    check_slices("fit_product", rows.shape[1], num_codes)
    weights = check_weights("fit_product", weights, len(rows), rows.device)
    slice_dim = rows.shape[1] // num_codes
    codebooks = torch.zeros(num_codes, codebook_size, slice_dim, device=rows.device)
    for m, part in enumerate(rows.split(slice_dim, dim=1)):
        size = first_size if m == 0 else codebook_size
        codebooks[m, :size] = learn_centroids(
            part.contiguous(),
            size,
            weights=weights,
            num_iterations=num_iterations,
            max_points_per_centroid=max_points_per_centroid,
            seed=(seed + m) % 2**63,
        )
    sizes = [first_size] + [codebook_size] * (num_codes - 1)
    books = [book[:size] for book, size in zip(codebooks, sizes, strict=True)]
    return ProductEncoder(books), codebooks.view(-1, slice_dim)
