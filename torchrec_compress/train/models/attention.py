"""The blocks of HSTU and SASRec, over padded sequences that begin at position 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_heads(width: int, num_heads: int) -> None:
    """Raise ValueError where heads do not divide the width."""
    if width % num_heads:
        raise ValueError(f"model.attention.num_heads: must divide model.embedding_dim = {width}, got {num_heads}")


class PointwiseBlock(nn.Module):
    """A layer of HSTU (arXiv 2402.17152, section 3): attention without a softmax, gated, with a bias by distance.

    What each position weighs another by is the SiLU of their product plus a learnt number for their distance, divided
    by the longest length, as the authors' code does; the weighted sum is normalised, and gated by the position itself.
    The bias by time is left out: our sequences have no times.

    Args:
        width: of the rows, D.
        num_heads: H, which divide it.
        max_length: the longest sequence, L, by which sums are divided.
        dropout: of what is added to the rows.

    Shapes: (B, T, D) float32 to (B, T, D) float32, T up to L; a position sees itself and those before it.

    Raises:
        ValueError: heads that do not divide the width.

    Example:
        >>> PointwiseBlock(8, num_heads=2, max_length=5, dropout=0.0)(torch.randn(3, 4, 8)).shape
        torch.Size([3, 4, 8])
    """

    def __init__(self, width: int, num_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self._num_heads, self._max_length = num_heads, max_length
        self.norm, self.norm_sum = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(num_heads, max_length))  # by distance, from 0
        self._drop = nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the rows after this layer."""
        gate, values, queries, keys = F.silu(self.project(self.norm(rows))).chunk(4, dim=-1)
        values, queries, keys = (_by_head(part, self._num_heads) for part in (values, queries, keys))
        places = torch.arange(rows.shape[1], device=rows.device)
        distance = places[:, None] - places
        scores = queries @ keys.transpose(-1, -2) + self.bias[:, distance.clamp(min=0)]
        shares = (F.silu(scores) / self._max_length).masked_fill(distance < 0, 0.0)
        summed = (shares @ values).transpose(1, 2).reshape(rows.shape)
        return rows + self._drop(self.out(self.norm_sum(summed) * gate))


class SoftmaxBlock(nn.Module):
    """A block of SASRec (arXiv 1808.09781, section III.B): causal self-attention, then a net of each position.

    Both parts read normalised rows, and what they make of them is added to the rows.

    Args:
        width: of the rows, D.
        num_heads: H, which divide it.
        dropout: of attention weights, of the net's hidden layer and of what is added to the rows.

    Shapes: (B, T, D) float32 to (B, T, D) float32; a position sees itself and those before it.

    Raises:
        ValueError: heads that do not divide the width.

    Example:
        >>> SoftmaxBlock(8, num_heads=2, dropout=0.0)(torch.randn(3, 4, 8)).shape
        torch.Size([3, 4, 8])
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self._num_heads, self._dropout = num_heads, dropout
        self.norm, self.norm_net = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.Dropout(dropout)
        )
        self._drop = nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the rows after this block."""
        parts = self.project(self.norm(rows)).chunk(3, dim=-1)
        queries, keys, values = (_by_head(part, self._num_heads) for part in parts)
        dropout = self._dropout if self.training else 0.0
        summed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        rows = rows + self._drop(self.out(summed.transpose(1, 2).reshape(rows.shape)))
        return rows + self.net(self.norm_net(rows))


def _by_head(rows: Tensor, num_heads: int) -> Tensor:
    """Return (B, T, D) as (B, H, T, D / H)."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(1, 2)
