"""Rows of a trained table, pooled where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.ops.checks import check_one_device, check_weight_count
from torchrec_compress.ops.dispatch import fbgemm_serves
from torchrec_compress.ops.fbgemm import virtual_table_bags
from torchrec_compress.ops.pooling import as_factors, check_offsets


class TableRows(NamedTuple):
    """Rows that nobody has gathered: the table that holds them whole, and their numbers.

    Args:
        weight: (N, D) floating point.
        numbers: (L,) int32 or int64 in [0, N).

    Example:
        >>> TableRows(torch.eye(3), torch.tensor([2])).gather()
        tensor([[0., 0., 1.]])
    """

    weight: Tensor
    numbers: Tensor

    def gather(self) -> Tensor:
        """Return the rows, (L, D)."""
        return F.embedding(self.numbers, self.weight)


Rows = Tensor | TableRows


def gathered(rows: list[Rows]) -> list[Tensor]:
    """Return rows that lie in tables gathered, (L, D), and others as they are."""
    return [found.gather() if isinstance(found, TableRows) else found for found in rows]


def pool_table(rows: TableRows, offsets: Tensor, factors: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Sum rows of a table into bags, without gathering them: by FBGEMM's dense embedding bags for float32 on a CPU.

    Args:
        rows: table and row numbers, (L,).
        offsets: (B + 1,) integer, from 0 up to L; bag b is the rows [offsets[b], offsets[b + 1]).
        factors: (L,) floating point factors of the rows, or None.
        backend: see `codebook_bags`.

    Returns:
        (B, D), dtype of the table; an empty bag is zeros. Differentiable in the table and `factors`.

    Raises:
        ValueError: types, devices or shapes do not fit; offsets decrease, or do not run from 0 to L (CPU).

    Example:
        >>> pool_table(TableRows(torch.eye(2), torch.tensor([0, 1, 1])), torch.tensor([0, 2, 3])).tolist()
        [[1.0, 1.0], [0.0, 1.0]]
    """
    weight, numbers = rows
    check_one_device("pool_table", {"weight": weight, "numbers": numbers, "offsets": offsets, "factors": factors})
    if factors is not None:
        check_weight_count(factors, numbers.shape[0], "pool_table")
        factors = as_factors(factors, weight.dtype, "pool_table").to(weight.dtype)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and fbgemm_serves(backend):
        return virtual_table_bags(numbers.unsqueeze(0), weight, offsets, factors, False)
    check_offsets(offsets, numbers.shape[0])
    return F.embedding_bag(
        numbers, weight, offsets.to(numbers.dtype), mode="sum", per_sample_weights=factors, include_last_offset=True
    )
