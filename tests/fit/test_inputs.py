"""Every fit of rows refuses the same bad input, with the same words."""

import pytest
import torch

from torchrec_compress.fit.mec import MECFit, fit_mec
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.residual import fit_residual

ROWS = torch.arange(80.0).view(10, 8)
BROKEN = ROWS.clone()
BROKEN[3, 2] = float("inf")

CASES = [
    (ROWS, 2, 11, {}, r"got K = 11 larger than the rows \(10\); lower codebook_size"),
    (ROWS, 0, 4, {}, "num_codes must be at least 1, got 0"),
    (ROWS, 2, 0, {}, r"codebook_size must be in \[1, 65536\], got 0"),
    (ROWS, 2, 70000, {}, r"codebook_size must be in \[1, 65536\], got 70000"),
    (ROWS, 2, 4, {"first_size": 5}, r"first_size must be in \[1, codebook_size = 4\], got 5"),
    (ROWS, 2, 4, {"first_size": 0}, r"first_size must be in \[1, codebook_size = 4\], got 0"),
    (BROKEN, 2, 4, {}, "rows must be finite, got NaN or infinity in row 3; repair or drop that row"),
    (ROWS.double(), 2, 4, {}, r"rows must be a non-empty float32 tensor \[N, D\], got torch.float64 \[10, 8\]"),
    (ROWS[0], 2, 4, {}, r"non-empty float32 tensor \[N, D\], got torch.float32 \[8\]"),
    (ROWS[:0], 2, 4, {}, r"got torch.float32 \[0, 8\]"),
    (ROWS, 2, 4, {"weights": torch.ones(9)}, r"weights must have shape \[10\], one per row, got \[9\]"),
    (ROWS, 2, 4, {"weights": -torch.ones(10)}, "weights must be finite and >= 0, got -1.0 for row 0"),
    (ROWS, 2, 4, {"weights": torch.full((10,), float("nan"))}, "weights must be finite and >= 0, got nan for row 0"),
    (ROWS, 2, 4, {"weights": torch.zeros(10)}, "at least one weight must be above 0, got all zeros; pass weights=None"),
]


@pytest.mark.parametrize("fit", [fit_product, fit_residual, fit_mec])
@pytest.mark.parametrize(("rows", "num_codes", "codebook_size", "options", "message"), CASES)
def test_bad_input(fit, rows: torch.Tensor, num_codes: int, codebook_size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{fit.__name__}: .*{message}"):
        fit(rows, num_codes, codebook_size, **options)


@pytest.mark.parametrize("fit", [fit_product, fit_mec])
def test_width_must_split(fit) -> None:
    with pytest.raises(ValueError, match="width must be a multiple of num_codes, got D = 8 and M = 3"):
        fit(ROWS, 3, 4)


def test_residual_takes_any_number_of_codes() -> None:
    assert fit_residual(ROWS, 3, 4).codes.shape == (10, 3)


def test_residual_refits_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="fit_residual: num_refits must be >= 0, got -1"):
        fit_residual(ROWS, 2, 4, num_refits=-1)


def test_large_finite_rows_pass_the_check() -> None:
    rows = torch.full((4, 4), 3e38)  # the sum overflows, the rows do not
    rows[1:] = 0
    with pytest.raises(ValueError, match="codebook_size"):
        fit_product(rows, 1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be finite and above 0, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0"),
        ({"usage_temperature": float("nan")}, "usage_temperature must be finite and above 0, got nan"),
        ({"contrast": -1.0}, "contrast must be finite and >= 0, got -1.0"),
        ({"num_steps": -1}, "num_steps must be finite and >= 0"),
    ],
)
def test_mec_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"MECFit: {message}"):
        MECFit(**options)


def test_contrast_needs_a_second_codeword() -> None:
    with pytest.raises(ValueError, match="fit_mec: contrast must be 0 when codebooks have one codeword"):
        fit_mec(ROWS, 1, 4, first_size=1)
    options = MECFit(contrast=0.0, num_steps=1)
    assert not fit_mec(ROWS, 1, 4, first_size=1, options=options).codes.any()
