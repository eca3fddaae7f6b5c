"""The blocks against what their papers say, position by position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_compress.train.models.attention import PointwiseBlock, SoftmaxBlock

WIDTH, LENGTH, LONGEST = 12, 5, 7


def _shares(name: str, block, queries: list[Tensor], keys: list[Tensor], head: int, i: int) -> list[Tensor]:
    """Return what position i weighs itself and those before it by."""
    products = [queries[i] @ keys[j] for j in range(i + 1)]
    if name == "sasrec":
        return list(torch.softmax(torch.stack(products) / len(queries[0]) ** 0.5, dim=0))
    return [F.silu(product + block.bias[head, i - j]) / LONGEST for j, product in enumerate(products)]


def _attended(name: str, block, rows: Tensor, num_heads: int) -> list[Tensor]:
    """Return the weighted sums of values of one sequence, (D,) by position, heads side by side."""
    projected = [block.project(block.norm(row)) for row in rows]
    if name == "hstu":
        projected = [F.silu(row) for row in projected]
        values, queries, keys = ([row.split(WIDTH)[part] for row in projected] for part in (1, 2, 3))
    else:
        queries, keys, values = ([row.split(WIDTH)[part] for row in projected] for part in (0, 1, 2))
    sums = []
    for i in range(len(rows)):
        parts = []
        for head in range(num_heads):
            mine = slice(head * WIDTH // num_heads, (head + 1) * WIDTH // num_heads)
            of_head = [[row[mine] for row in each] for each in (queries, keys, values)]
            shares = _shares(name, block, of_head[0], of_head[1], head, i)
            parts.append(sum((share * of_head[2][j] for j, share in enumerate(shares)), torch.zeros(())))
        sums.append(torch.cat(parts))
    return sums


def reference(name: str, block, rows: Tensor, num_heads: int) -> Tensor:
    """Return one sequence after a block, (T, D), from its definition."""
    found = []
    for row, attended in zip(rows, _attended(name, block, rows, num_heads), strict=True):
        if name == "hstu":
            gate = F.silu(block.project(block.norm(row)))[:WIDTH]
            found.append(row + block.out(block.norm_sum(attended) * gate))
        else:
            middle = row + block.out(attended)
            first, last = block.net[0], block.net[3]
            found.append(middle + last(torch.relu(first(block.norm_net(middle)))))
    return torch.stack(found)


def _block(name: str, num_heads: int, dropout: float = 0.0):
    torch.manual_seed(3)
    if name == "sasrec":
        return SoftmaxBlock(WIDTH, num_heads, dropout).double()
    block = PointwiseBlock(WIDTH, num_heads, LONGEST, dropout).double()
    torch.nn.init.normal_(block.bias)
    return block


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_blocks_equal_their_definition_with_gradients(name, num_heads):
    block = _block(name, num_heads)
    rows = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = torch.stack([reference(name, block, sequence, num_heads) for sequence in rows])
    torch.testing.assert_close(block(rows), wanted)
    towards = torch.randn_like(wanted)
    inputs = [rows, *block.parameters()]
    found = torch.autograd.grad(block(rows), inputs, towards, materialize_grads=True)
    for mine, its in zip(found, torch.autograd.grad(wanted, inputs, towards, materialize_grads=True), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_no_position_sees_a_later_one(name):
    block, rows = _block(name, 2), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    changed = rows.clone()
    changed[0, 3] = torch.randn(WIDTH)
    before, after = block(rows)[0], block(changed)[0]
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(1).any()


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_dropout_acts_in_training_alone(name):
    block, rows = _block(name, 2, dropout=0.5), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    assert not torch.equal(block.train()(rows), block(rows))
    assert torch.equal(block.eval()(rows), block(rows))


@pytest.mark.parametrize("make", [lambda: PointwiseBlock(12, 5, 7, 0.0), lambda: SoftmaxBlock(12, 5, 0.0)])
def test_heads_must_divide_the_width(make):
    with pytest.raises(ValueError, match=r"model\.attention\.num_heads: must divide model\.embedding_dim = 12, got 5"):
        make()
