"""Tensors of any layout: views are read as if they were copied, forward and backward, by every kernel."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.bags import random_codes
from tests.ops.test_codebook_bags import BACKENDS
from torchrec_compress.ops import (
    TableRows,
    code_dtype,
    code_gather,
    codebook_bag,
    dequantize_rows,
    lookup_codes,
    low_bit_bag,
    pack_codes,
    pool_rows,
    pool_table,
    quantize_rows,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def poison(*shape: int, like: Tensor) -> Tensor:
    """Return memory that shows in a sum, or is an error as an index."""
    worst = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, worst, dtype=like.dtype)


def every_second(tensor: Tensor) -> Tensor:
    around = poison(2 * len(tensor) + 1, *tensor.shape[1:], like=tensor)
    around[1::2] = tensor
    return around[1::2]


def columns(tensor: Tensor) -> Tensor:
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    around = poison(len(tensor), 2 * width + 3, like=tensor)
    view = around[:, 1 : 2 * width : 2]
    view.copy_(tensor.view(len(tensor), width))
    return view if tensor.dim() > 1 else view[:, 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def from_an_offset(tensor: Tensor) -> Tensor:
    around = poison(tensor.numel() + 8, like=tensor)
    around[3 : 3 + tensor.numel()] = tensor.reshape(-1)
    return around[3 : 3 + tensor.numel()].view(tensor.shape)


def repeated(tensor: Tensor) -> Tensor:
    """Return the first row, again and again: stride 0."""
    return tensor[:1].expand(tensor.shape)


def one_number(tensor: Tensor) -> Tensor:
    """Return the first number everywhere, as the gradient of a sum is."""
    return tensor.reshape(-1)[:1].view([1] * tensor.dim()).expand(tensor.shape) if tensor.numel() else tensor


def misaligned(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of another program, a byte behind where its numbers should be."""
    if tensor.numel() == 0:
        return tensor
    memory = bytearray(1) + bytearray(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


SAME = [torch.Tensor.contiguous, every_second, columns, transposed, from_an_offset, misaligned]  # the same values
layouts = st.sampled_from([*SAME, repeated, one_number])
# one number everywhere would be no offsets, and might be no row of codes or of bytes
LAYOUTS = {"offsets": st.sampled_from(SAME), **dict.fromkeys(["codes", "rows"], st.sampled_from([*SAME, repeated]))}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def outcome(function, arguments: dict[str, Tensor], upstream: Tensor | None) -> list[Tensor]:
    """Return the values of a function, and the gradients of its floating point arguments."""
    leaves = {name: leaf(tensor) for name, tensor in arguments.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = function(**leaves)
        if upstream is None:
            return [out]
        wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, upstream)]


def check(function, arguments: dict[str, Tensor], data: st.DataObject, has_gradient: bool = True) -> None:
    """Compare a function of views with the same one of contiguous copies."""
    views = {name: data.draw(LAYOUTS.get(name, layouts), label=name)(tensor) for name, tensor in arguments.items()}
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in views.items()}
    upstream = None
    if has_gradient:
        out = function(**plain)
        upstream = data.draw(layouts, label="upstream")(torch.randn_like(out))
    expected = outcome(function, plain, None if upstream is None else upstream.contiguous().clone())
    for got, right in zip(outcome(function, views, upstream), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def batch(data: st.DataObject, num_rows: int) -> dict[str, Tensor]:
    """Return ids, offsets and weights of a jagged batch."""
    torch.manual_seed(0)  # every example from the start
    lengths = data.draw(st.lists(st.integers(0, 4), max_size=5), label="lengths")
    index = [data.draw(st.sampled_from([torch.int32, torch.int64])) for _ in range(2)]
    return {
        "ids": torch.randint(num_rows, (sum(lengths),)).to(index[0]),
        "offsets": torch.tensor([0, *lengths]).cumsum(0).to(index[1]),
        "weights": torch.randn(sum(lengths)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    data=st.data(),
    num_codes=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 300]),
    width=st.sampled_from([1, 4]),
    structure=st.sampled_from(["product", "residual"]),
)
def test_codes(backend, data, num_codes, size, width, structure):
    dim = width * (num_codes if structure == "product" else 1)
    arguments = batch(data, 20)
    codes = random_codes(20, num_codes, size, 9).to(code_dtype(size))
    is_packed = size == 16 and data.draw(st.booleans())
    arguments |= {
        "codes": pack_codes(codes) if is_packed else codes,
        "codebooks": torch.randn(num_codes * size, width),
        "hot_rows": torch.randn(9, dim),
    }

    def look_up(codes, codebooks, offsets, **rest):
        return codebook_bag(
            codes,
            codebooks,
            offsets,
            structure=structure,
            num_packed=num_codes if is_packed else 0,
            backend=backend,
            **rest,
        )

    check(look_up, arguments, data)
    ids = arguments.pop("ids")
    check(look_up, {**arguments, "codes": arguments["codes"][ids.long()]}, data)


@given(data=st.data(), dtype=st.sampled_from(["int8", "int4"]))
def test_low_bit_rows(data, dtype):
    arguments = batch(data, 20)
    rows = arguments["rows"] = quantize_rows(torch.randn(20, 8), dtype)

    def look_up(rows, weights, ids=None, offsets=None):
        return low_bit_bag(rows, dtype, offsets, weights=weights, ids=ids)

    check(look_up, arguments, data)
    check(look_up, {name: tensor for name, tensor in arguments.items() if name != "offsets"}, data)
    ids = arguments.pop("ids")
    check(look_up, {**arguments, "rows": rows[ids.long()]}, data)


@given(data=st.data(), dtype=st.sampled_from(["int8", "int4"]))
def test_the_format_of_low_bit_rows(data, dtype):
    torch.manual_seed(0)
    rows = torch.randn(data.draw(st.integers(0, 5)), 8)
    check(lambda rows: quantize_rows(rows, dtype), {"rows": rows}, data, has_gradient=False)
    stored = quantize_rows(rows, dtype)
    check(lambda rows: dequantize_rows(rows, dtype), {"rows": stored}, data, has_gradient=False)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), width=st.sampled_from([1, 4]))
def test_rows_of_a_table(backend, data, width):
    arguments = {**batch(data, 20), "table": torch.randn(20, width)}
    check(
        lambda table, ids, offsets, weights: pool_table(TableRows(table, ids), offsets, weights, backend),
        arguments,
        data,
    )
    arguments["table"] = arguments["table"][arguments.pop("ids").long()]
    check(lambda table, offsets, weights: pool_rows(table, offsets, weights), arguments, data)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), num_codes=st.sampled_from([1, 2, 3, 8]), dtype=st.sampled_from([torch.uint8, torch.int16]))
def test_gathered_codes(backend, data, num_codes, dtype):
    arguments = {"ids": batch(data, 20)["ids"], "codes": torch.randint(99, (20, num_codes)).to(dtype)}
    check(lambda codes, ids: code_gather(codes, ids, "t", 24, backend), arguments, data, has_gradient=False)
    is_set = torch.ones(1, dtype=torch.uint8)
    check(lambda codes, ids: lookup_codes(codes, is_set, ids, "t"), arguments, data, has_gradient=False)
