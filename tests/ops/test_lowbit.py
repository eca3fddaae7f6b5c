import pytest
import torch

from torchrec_compress.ops import dequantize_rows, quantize_rows, quantized_row_bytes

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def parts(stored, dim, dtype):
    """Read FBGEMM's bytes by hand: (levels (N, D), scales (N,), biases (N,)), all float64."""
    levels, head = stored[:, 4:], stored[:, :4].contiguous().view(torch.float16).double()
    if dtype == "int4":
        levels = torch.stack([levels & 15, levels >> 4], dim=2).flatten(1)  # the even column is in the low half
    assert levels.shape[1] == dim
    return levels.double(), head[:, 0], head[:, 1]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (63, 12), (1000, 64), (0, 16)])
def test_rows_are_stored_as_levels_scale_and_bias(shape, dtype):
    rows = torch.randn(shape) * torch.rand(shape[0], 1) * 3 + 0.5
    stored = quantize_rows(rows, dtype)
    assert stored.dtype == torch.uint8
    assert stored.shape == (shape[0], quantized_row_bytes(shape[1], dtype))
    levels, scales, biases = parts(stored, shape[1], dtype)
    top = 255 if dtype == "int8" else 15
    low, high = rows.double().amin(1), rows.double().amax(1)
    torch.testing.assert_close(biases, low, rtol=1e-3, atol=1e-6)  # float16
    torch.testing.assert_close(scales, (high - low) / top, rtol=5e-3, atol=1e-6)
    exact = ((rows.double() - biases[:, None]) / scales[:, None]).clamp(0, top)
    # rounded to the nearest level, up to the rounding of FBGEMM's own float arithmetic
    assert shape[0] == 0 or (levels - exact).abs().max() <= 0.5 + 0.02
    served = dequantize_rows(stored, dtype)
    assert served.dtype == torch.float32
    torch.testing.assert_close(served.double(), levels * scales[:, None] + biases[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 6, 62])
def test_int8_takes_even_widths(width):
    rows = torch.randn(5, width)
    served = dequantize_rows(quantize_rows(rows, "int8"), "int8")
    spread = rows.amax(1) - rows.amin(1)
    assert ((served - rows).abs().amax(1) <= spread / 255 * 0.51 + rows.abs().amax(1) * 2**-9).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_constant_row_is_kept(dtype):
    rows = torch.tensor([[0.5] * 8, [0.0] * 8, [-2.0] * 8])
    torch.testing.assert_close(dequantize_rows(quantize_rows(rows, dtype), dtype), rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantising_twice_changes_nothing_more(dtype):
    once = dequantize_rows(quantize_rows(torch.randn(50, 16), dtype), dtype)
    twice = dequantize_rows(quantize_rows(once, dtype), dtype)
    torch.testing.assert_close(twice, once, rtol=0, atol=4e-3 if dtype == "int8" else 2e-2)


def test_bytes_of_a_row():
    assert quantized_row_bytes(6, "fp32") == 24
    assert quantized_row_bytes(6, "int8") == 10
    assert quantized_row_bytes(8, "int4") == 8
