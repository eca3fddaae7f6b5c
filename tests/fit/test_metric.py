"""The metric against its definition."""

import pytest
import torch

from torchrec_compress.fit.codes import decode
from torchrec_compress.fit.metric import PLAIN_SHARE, Metric


def curvature(width=6):
    some = torch.randn(width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return some @ some.T  # half of the directions are not read at all


@pytest.mark.parametrize("num_slices", [1, 2, 3, 6])
def test_squares_of_whitened_errors_are_errors_in_the_metric(num_slices):
    matrix, errors = curvature(), torch.randn(50, 6)
    metric = Metric.of(matrix, num_slices)
    whole = matrix * 6 / matrix.trace() + PLAIN_SHARE * torch.eye(6, dtype=torch.float64)
    width = 6 // num_slices
    expected = torch.zeros(50, dtype=torch.float64)
    for first in range(0, 6, width):
        part = slice(first, first + width)
        expected += ((errors[:, part].double() @ whole[part, part]) * errors[:, part]).sum(dim=1)
    torch.testing.assert_close(metric.whiten(errors).square().sum(dim=1).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_slices", "kind"), [(1, "residual"), (3, "product")])
def test_restored_codebooks_give_restored_rows(num_slices, kind):
    metric = Metric.of(curvature(), num_slices)
    books = torch.randn(3 * 5, 6 // num_slices)
    codes = torch.randint(5, (20, 3))
    whitened = metric.whiten(decode(codes, metric.restore_codebooks(books), kind))
    torch.testing.assert_close(whitened, decode(codes, books, kind), rtol=1e-4, atol=1e-4)


def test_a_multiple_of_a_curvature_is_the_same_metric():
    one, other = Metric.of(curvature()), Metric.of(curvature() * 1e-6)
    torch.testing.assert_close(one.roots, other.roots)
